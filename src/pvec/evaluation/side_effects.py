"""What steering changes besides the trait: benign text, refusals (``steer-eval --side-effects``).

Everything is kept in a run folder inside the evaluation's: answers to harmless and harmful
questions, and a line for every benign text and condition. A second call repeats nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from pvec.backends.planned import PlannedResponse, PromptCache, missing
from pvec.backends.run_session import RunSession
from pvec.data.conversations import Chat, Columns, conversation_of
from pvec.data.tables import open_table
from pvec.documents import read_record
from pvec.errors import InputError
from pvec.evaluation.conditions import Condition
from pvec.evaluation.effect_numbers import (
    FOLDER,
    SideEffects,
    TextReading,
    keep_effects,
    mean_kl,
    summarise_effects,
)
from pvec.evaluation.setup import SteerSetup
from pvec.evaluation.summary import KLLimit, ScoredAnswer
from pvec.models.chat import encode_pair, spans_from_ids
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.responses import ResponseRecord, stable_hash
from pvec.runs.store import Run
from pvec.types import Divergence, Message, Progress, TokenSpans

KIND = "side-effects"

TEXTS = "texts.jsonl"

_MOST_TOKENS = 64
"""Longest answer to a harmless or harmful question: a refusal is seen at its beginning."""

NO_DISTRIBUTIONS = (
    "KL divergence and perplexity are not measured: vLLM does not return the probabilities of the "
    "whole vocabulary for given tokens; --backend hf does"
)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A benign conversation up to its answer, and the token ids of both."""

    messages: Sequence[Message]
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class SideEffectSetup:
    """Texts and questions on which the conditions of ``setup`` are compared.

    Raises ``InputError`` or ``ModelError`` for a file of benign text that cannot be used.
    """

    def __init__(self, setup: SteerSetup) -> None:
        self._setup = setup
        self._session = setup.session
        self._prompts = PromptCache(setup.session)
        bundled = _bundled()
        path = setup.steer.benign
        self.texts: list[_Text] = []
        if self._session.choice.name == "hf":
            # The bundled model knows no other words than those of its own grammar.
            own = "benign_bundled" if self._session.metadata.bundled else "benign"
            chats = _read(path) if path else bundled[own]
            self.texts = [self._text(chat, number) for number, chat in enumerate(chats, start=1)]
        elif setup.steer.max_kl is not None:
            raise InputError(f"--max-kl cannot be kept: {NO_DISTRIBUTIONS}.")
        searched = setup.steer.search_positions if setup.steer.search else ()
        if self.texts and "think" in (setup.steer.positions, *searched):
            raise InputError(
                "Side effects are measured on benign text without reasoning, where positions think "
                "steer nothing: omit --side-effects and --max-kl, or steer other positions."
            )
        self._kl: dict[str, float] = {}
        self._refusals: list[ResponseRecord] = []
        self._readings: list[TextReading] = []
        asked = bundled if setup.steer.side_effects else {"harmless": (), "harmful": ()}
        self._questions = [
            (kind, number, question)
            for kind in ("harmless", "harmful")
            for number, question in enumerate(islice(asked[kind], setup.steer.limit))
        ]

    @property
    def folder(self) -> Path:
        """The folder of what is measured."""
        return self._setup.folder / FOLDER

    def missing(self) -> int:
        """Return how many answers are still to be generated."""
        run = Run.preview(self.folder, kind=KIND, identity=self._setup.identity)
        planned = self._planned(self._setup.conditions)
        return len(planned if run is None else missing(run, planned))

    def open(self) -> RunSession:
        """Open the run of what is measured, or begin it: what is measured below goes there."""
        self._run = RunSession(self._session, self.folder, kind=KIND, identity=self._setup.identity)
        return self._run

    def mean_kl(self, condition: Condition) -> float:
        """Return the KL divergence of a condition; infinite where no text gives a number."""
        if condition.name not in self._kl:
            self._kl |= mean_kl(self._read_texts([condition]))
        return self._kl.get(condition.name, math.inf)

    def measure(self) -> KLLimit | None:
        """Generate and read what is missing; return the limit on KL divergence, if there is one."""
        if not self.texts:
            self._session.notify(NO_DISTRIBUTIONS)
        conditions, most = self._setup.every_condition, self._setup.steer.max_kl
        planned = self._planned(self._setup.conditions)
        self._run.generate(planned, stage="side effects: questions")
        self._refusals = self._run.responses(planned)
        with self._run.store.stage("texts"):
            self._readings = self._read_texts(conditions)
        return KLLimit(most=most, of=mean_kl(self._readings)) if most else None

    def keep(
        self, records: Sequence[ResponseRecord], answers: Sequence[ScoredAnswer]
    ) -> SideEffects:
        """Summarise what was measured, and the answers of the evaluation with their scores, and
        write it into the run."""
        effects = summarise_effects(
            self._setup.every_condition,
            trait=self._setup.trait.name,
            texts=self._readings,
            refusals=self._refusals,
            records=records,
            answers=answers,
        )
        keep_effects(self.folder, effects)
        return effects

    def _planned(self, conditions: Sequence[Condition]) -> list[PlannedResponse]:
        return [self._question(c, *question) for c in conditions for question in self._questions]

    def _read_texts(self, conditions: Sequence[Condition]) -> list[TextReading]:
        path = self.folder / TEXTS
        readings: list[TextReading] = []
        with JsonlLog(path) as log:
            if log.note:
                self._session.notify(log.note)
            known = {str(line.get("id")): line for _, line in read_jsonl(path)}
            for number, text in enumerate(self.texts):
                if len(conditions) > 1:  # a search reads one at a time
                    self._show(number)
                own = [(self._spans(text, number, c), c.name) for c in conditions]
                names = {spans.id: name for spans, name in own}
                todo = [spans for spans, _ in own if spans.id not in known]
                if todo:
                    reference = spans_from_ids(
                        "unsteered", prompt_ids=text.prompt_ids, answer_ids=text.answer_ids
                    )
                    for result in self._session.backend.divergences(reference, todo):
                        known[result.id] = _reading(result, names[result.id], number)
                        log.append(known[result.id])
                readings += [read_record(TextReading, known[identity]) for identity in names]
        if len(conditions) > 1:
            self._show(len(self.texts))
        return readings

    def _show(self, done: int) -> None:
        stage = "side effects: benign text"
        self._session.on_progress(
            Progress(stage=stage, done=done, total=len(self.texts), unit="texts")
        )

    def _text(self, chat: Chat, number: int) -> _Text:
        *messages, answer = chat.messages
        prompt, _ = self._prompts(messages)
        tokenizer, context = self._session.metadata.tokenizer, self._session.metadata.context
        pair = encode_pair(tokenizer, prompt=prompt, answer=answer["content"])
        length = len(pair.token_ids)
        if length == pair.prompt_length or (context is not None and length > context):
            raise InputError(
                f"Benign text {number} ({messages[-1]['content'][:40]!r}) has {length} tokens, "
                f"{length - pair.prompt_length} of them its answer's, and the model reads "
                f"1 to {context or 'any number'}: correct it or leave it out."
            )
        return _Text(
            messages=messages,
            prompt_ids=pair.token_ids[: pair.prompt_length],
            answer_ids=pair.token_ids[pair.prompt_length :],
        )

    def _spans(self, text: _Text, number: int, condition: Condition) -> TokenSpans:
        """Return a benign text as a condition sees it: steered, or behind its system prompt, which
        takes the place of the text's own."""
        prompt_ids = text.prompt_ids
        if (instruction := self._setup.instruction(condition, number)) is not None:
            rest = [message for message in text.messages if message["role"] != "system"]
            _, prompt_ids = self._prompts([{"role": "system", "content": instruction[1]}, *rest])
        identity = stable_hash(
            {
                "engine": self._session.identity,
                "condition": condition.name,
                "reference": text.prompt_ids,
                "prompt": prompt_ids,
                "answer": text.answer_ids,
                "steering": [instruction.fingerprint for instruction in condition.steering],
            }
        )
        return spans_from_ids(
            identity,
            prompt_ids=prompt_ids,
            answer_ids=text.answer_ids,
            steering=condition.steering,
        )

    def _question(
        self, condition: Condition, kind: str, number: int, question: str
    ) -> PlannedResponse:
        planned = self._setup.response(
            self._prompts, condition, question,
            subject=kind, number=number, question_id=f"{kind}_{number}",
        )  # fmt: skip
        most = min(planned.sampling.max_tokens, _MOST_TOKENS)
        return replace(planned, sampling=replace(planned.sampling, max_tokens=most))


def _reading(result: Divergence, condition: str, number: int) -> dict[str, Any]:
    means = {"kl": float(result.kl.mean()), "nll": -float(result.logprobs.mean())}
    known = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
    place = {"id": result.id, "condition": condition, "text": number}
    return {**place, "tokens": len(result.kl), **known}


def _bundled() -> dict[str, Any]:
    """Return pvec's own lists: two of ``benign`` chats, ``harmless`` and ``harmful`` questions."""
    source = files("pvec.evaluation").joinpath("side_effects.json").read_text(encoding="utf-8")
    lists: dict[str, Any] = json.loads(source)
    columns = Columns(plain_prompts=True)
    return {
        name: [conversation_of(row, columns) for row in rows] if "benign" in name else rows
        for name, rows in lists.items()
    }


def _read(path: Path) -> list[Chat]:
    """Read chats that end with an answer. Raises ``InputError`` at the first row that is none."""
    chats: list[Chat] = []
    for row in open_table(path).rows():
        try:
            chat = conversation_of(row.values, Columns(plain_prompts=True))
        except InputError as error:
            raise InputError(f"{path}:{row.line} {error}.") from None
        if not isinstance(chat, Chat) or not chat.answered:
            raise InputError(f"{path}:{row.line} does not end with an answer: add one.")
        chats.append(chat)
    if not chats:
        raise InputError(f"{path} has no rows: write one chat a line.")
    return chats

"""The contrast judge: how much likelier an answer is under a trait's positive instructions.

It asks nobody and reads no rubric. A model measures for an answer *a* to question *q*

    s = mean over instruction pairs i of [log P(a | pos_i, q) - log P(a | neg_i, q)] / tokens of a

in nats per token, over the answer's first tokens. The pair that an answer was given under is left
out, or the answer would be likely for the very words it was asked for with. Coherence is measured
without instruction: the answer's own log-probability per token, that of its words in random order,
and the share of it that repeats itself. ``calibration`` turns both into scores from 0 to 100.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np

from pvec.judges.local import ModelJudge, weights_name
from pvec.judges.prompts import COHERENCE, CONTRAST, Metric
from pvec.judges.scales import Reading
from pvec.models.chat import encode_pair, encode_prompt, prompt_ids
from pvec.models.template import render_prompt
from pvec.runs.responses import ResponseRecord
from pvec.traits.trait import Trait
from pvec.types import JudgeQuery, Message, ModelInfo, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pvec.backends.base import Backend
    from pvec.backends.planned import PlannedResponse
    from pvec.models.load import ModelMetadata

CHUNK = 32
"""Queries measured together: a kill loses no more than these."""

REPEATED = 4
"""Tokens of a sequence that counts as repeated when it occurred before."""

_FEWEST_WORDS = 8
"""A text of fewer words (or one without spaces) is shuffled by tokens."""


@dataclass(frozen=True, kw_only=True)
class ContrastQuery(JudgeQuery):
    """One answer to be measured on one metric; ``messages`` is the question alone.

    ``systems`` are the system prompts (positive, negative) of the pairs that count; none for
    coherence.
    """

    answer: str
    systems: tuple[tuple[str, str], ...] = ()


def contrast_name(model: ModelInfo | ModelMetadata, *, tokens: int, most_pairs: int | None) -> str:
    """Return the name under which a contrast judge's scores are kept."""
    pairs = "" if most_pairs is None else f", {most_pairs} pairs"
    return f"{CONTRAST}{model.id}#{weights_name(model)} ({tokens} tokens{pairs})"


def contrast_query(
    response: ResponseRecord, metric: Metric, *, judge: str, most: int | None = None
) -> ContrastQuery:
    """Return the query that measures one response; its id covers all that could change it.

    ``most`` limits the instruction pairs to the first so many that may count.
    """
    systems = other_systems(metric.trait, response)[:most]
    parts = (response.id, judge, metric.name, response.question, response.answer)
    texts = [*parts, *(text for pair in systems for text in pair)]
    return ContrastQuery(
        id=hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16],
        response_id=response.id,
        metric=metric.name,
        messages=({"role": "user", "content": response.question},),
        answer=response.answer,
        systems=systems,
    )


def other_systems(
    trait: Trait | None, response: PlannedResponse | ResponseRecord
) -> tuple[tuple[str, str], ...]:
    """Return the system prompts of the pairs that ``response`` was not given under.

    Its own pair is the one that its condition numbers, and any whose text its system prompt holds.
    """
    if trait is None:
        return ()
    own = response.condition.get("instruction") if response.trait == trait.name else None
    system = response.system or ""
    return tuple(
        (trait.system_prompt("pos", number), trait.system_prompt("neg", number))
        for number, pair in enumerate(trait.instructions)
        if number != own and pair.pos not in system and pair.neg not in system
    )


class ContrastJudge(ModelJudge):
    """Measures with ``model``, over the first ``tokens`` tokens of each answer.

    Its scores have the status ``uncalibrated`` and their measurement in ``raw``:
    ``contrast`` (s), ``pairs`` and ``tokens`` for a trait; ``logprob``, ``shuffled``, ``repeated``
    and ``tokens`` for coherence.
    """

    def __init__(
        self,
        model: Backend,
        *,
        tokens: int,
        most_pairs: int | None = None,
        owns: bool = False,
    ) -> None:
        name = contrast_name(model.info, tokens=tokens, most_pairs=most_pairs)
        super().__init__(model, name=name, owns=owns)
        self.most_pairs = most_pairs
        self._tokens = tokens

    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        """Yield measurements chunk by chunk; one that does not fit the model becomes an error.

        Answers to one question share their prompts, so they should come one after another.
        """
        source = iter(queries)
        while chunk := list(islice(source, CHUNK)):
            yield from self._ask_fitting(chunk)

    def _ask(self, queries: Sequence[JudgeQuery]) -> Iterator[Score]:
        assert all(isinstance(query, ContrastQuery) for query in queries)
        asked = cast("Sequence[ContrastQuery]", queries)
        tasks = [_Task(self.model.tokenizer, query, tokens=self._tokens) for query in asked]
        pairs = [pair for task in tasks for pair in task.pairs]
        number = {pair: position for position, pair in enumerate(dict.fromkeys(pairs))}
        sums = np.empty(len(number))
        for position, logprobs in self.model.answer_logprobs(list(number)):
            sums[position] = logprobs.sum(dtype=np.float64)
        for task in tasks:
            if not task.answer:
                empty = Reading(score=None, status="unparsable", detail="the answer is empty")
                yield self.scored(task.query, empty)
                continue
            raw = task.raw(sums[[number[pair] for pair in task.pairs]])
            yield self.scored(task.query, Reading(score=None, status="uncalibrated"), raw=raw)


class _Task:
    """One query as token ids: which pairs of prompt and answer are to be run for it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, query: ContrastQuery, *, tokens: int
    ) -> None:
        self.query = query
        plain = _prompt(tokenizer, query.messages)
        whole = _answer_ids(tokenizer, query)
        self.answer = whole[:tokens]
        self._repeated = repeated_share(whole)
        if not self.answer:
            self.pairs = []
        elif query.metric == COHERENCE:
            self.pairs = [(plain, self.answer), (plain, _shuffled(tokenizer, self.answer))]
        else:
            self.pairs = [
                (_prompt(tokenizer, query.messages, system=system), self.answer)
                for pair in query.systems
                for system in pair
            ]

    def raw(self, sums: np.ndarray) -> Mapping[str, float]:
        """Return the measurement from log P of the answer in each of ``pairs``."""
        tokens = len(self.answer)
        if self.query.metric == COHERENCE:
            return {
                "logprob": float(sums[0] / tokens),
                "shuffled": float(sums[1] / len(self.pairs[1][1])),
                "repeated": self._repeated,
                "tokens": float(tokens),
            }
        differences = sums[0::2] - sums[1::2]
        return {
            "contrast": float(differences.mean() / tokens),
            "pairs": float(len(differences)),
            "tokens": float(tokens),
        }


def repeated_share(ids: Sequence[int]) -> float:
    """Return the share of a text's sequences of four tokens that occurred in it before."""
    seen = [tuple(ids[n : n + REPEATED]) for n in range(len(ids) - REPEATED + 1)]
    return 1.0 - len(set(seen)) / len(seen) if seen else 0.0


def _prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, system: str | None = None
) -> tuple[int, ...]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return prompt_ids(tokenizer, [*head, *messages])


def _answer_ids(tokenizer: PreTrainedTokenizerBase, query: ContrastQuery) -> tuple[int, ...]:
    """Return the answer's tokens as they follow a prompt; all prompts end alike."""
    if not query.answer:
        return ()
    pair = encode_pair(
        tokenizer, prompt=render_prompt(tokenizer, query.messages), answer=query.answer
    )
    if pair.merged:
        return encode_prompt(tokenizer, query.answer)
    return pair.token_ids[pair.prompt_length :]


def _shuffled(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same words in random order, the same order for the same words."""
    order = random.Random(",".join(map(str, ids)))  # noqa: S311 (no secret)
    words = re.findall(r"\S+\s*", str(tokenizer.decode(list(ids))))
    if len(words) < _FEWEST_WORDS:
        return tuple(order.sample(ids, len(ids)))
    text = " ".join(word.strip() for word in order.sample(words, len(words)))
    return encode_prompt(tokenizer, text)[: len(ids)]

"""``pvec chat``: a conversation under live steering. Knows no terminal: text in, events out."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pvec.backends.planned import derive_seed
from pvec.backends.session import ModelSession
from pvec.errors import InputError, did_you_mean
from pvec.evaluation.conditions import parse_layers, single_layer
from pvec.models.chat import prompt_ids, spans_from_ids
from pvec.models.decoder import check_layer, describe_layer
from pvec.models.reasoning import answer_text, think_length
from pvec.settings import Settings
from pvec.steering.instructions import SteeringVector, steering_vector
from pvec.types import Generation, Instruction, Message, Request
from pvec.vectors.find import load_vectors
from pvec.vectors.projection import project

MAIN, PLAIN = "answer", "unsteered"

HELP = """\
/steer NAME[@LAYER] COEF   steer with a vector: /steer evil@20 2.0 (COEF 0 removes it)
/off                       stop steering
/compare                   turn on or off the unsteered answer beside the steered one
/system TEXT               set the system prompt and start a new conversation (without TEXT: none)
/reset                     forget the conversation
/status                    show what is steering, and the vectors there are
/help                      show this
/quit                      leave (so does the end of the input)"""

_STEER = re.compile(r"(?P<name>[^@\s]+)(@(?P<layer>\S+))?\s+(?P<coef>\S+)")


@dataclass(frozen=True, kw_only=True)
class AnswerText:
    """One side's answer so far, as it grows; ``done`` with its last token.

    ``side`` is ``answer``, or ``unsteered`` for the answer to compare with.
    """

    side: str
    text: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class AnswerProjection:
    """How far an answer's mean activation points along a vector, measured without steering.

    ``projection`` is in units of the residual stream; ``relative`` is divided by the answer's mean
    residual norm at that layer.
    """

    side: str
    vector: str
    layer: int
    projection: float
    relative: float


class Chat:
    """A conversation and what steers it. ``vectors`` have one name each.

    The steered answers are the conversation's history; an unsteered answer to compare with is given
    to the same history and then forgotten.
    """

    def __init__(
        self, settings: Settings, session: ModelSession, vectors: Sequence[SteeringVector]
    ) -> None:
        self._settings = settings
        self._session = session
        self._vectors = {vector.label: vector for vector in vectors}
        self._history: list[Message] = []
        self._system: str | None = None
        self._turn = 0
        self._steering: dict[tuple[str, int], Instruction] = {}
        self.compare = False

    @property
    def steering(self) -> tuple[Instruction, ...]:
        """What steers the next answer."""
        return tuple(self._steering.values())

    def command(self, line: str) -> str | None:
        """Run a line that begins with ``/`` and return what to show; None means: leave.

        Raises ``InputError`` or ``ModelError`` for a command that cannot be run; nothing has
        changed then.
        """
        word, _, rest = line.strip().partition(" ")
        if word in {"/quit", "/exit"}:
            return None
        commands: dict[str, Callable[[str], str]] = {
            "/steer": self._steer,
            "/off": self._off,
            "/compare": self._compare,
            "/system": self._set_system,
            "/reset": self._reset,
            "/status": self._status,
            "/help": lambda _: HELP,
        }
        if word not in commands:
            raise InputError(
                f"There is no command {word!r}.{did_you_mean(word, commands)} /help lists them."
            )
        return commands[word](rest.strip())

    def answer(self, text: str) -> Generator[AnswerText | AnswerProjection, None, None]:
        """Answer a line: yield the text as it grows, then how far it points along each vector.

        When the iteration is stopped early, the text so far is the answer.
        """
        turns = [*self._history, {"role": "user", "content": text}]
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        ids = prompt_ids(
            self._session.metadata.tokenizer, [*head, *turns], thinking=self._session.thinking
        )
        answer = ""
        finished: list[Generation] = []
        try:
            for side, so_far, generation in self._stream(ids):
                if side == MAIN:
                    answer = self._without_reasoning(ids, generation) if generation else so_far
                finished += [generation] if generation else []
                yield AnswerText(side=side, text=so_far, done=generation is not None)
        finally:
            self._history = [*turns, {"role": "assistant", "content": answer}]
            self._turn += 1
        yield from self._measure(ids, finished)

    def _stream(self, ids: tuple[int, ...]) -> Iterator[tuple[str, str, Generation | None]]:
        sampling = self._session.sampling(derive_seed(self._settings.generation.seed, self._turn))
        main = Request(id=MAIN, prompt_ids=ids, sampling=sampling, steering=self.steering)
        requests = [main]
        if self.compare and self.steering:
            requests.append(replace(main, id=PLAIN, steering=()))
        tokenizer = self._session.backend.tokenizer
        for chunk in self._session.backend.stream(requests):
            if chunk.finished:
                yield chunk.id, chunk.finished.text, chunk.finished
            else:
                text = str(tokenizer.decode(list(chunk.token_ids), skip_special_tokens=True))
                yield chunk.id, text.removesuffix("\ufffd"), None  # half of a character

    def _without_reasoning(self, ids: tuple[int, ...], generation: Generation) -> str:
        """Return what goes into the history, as the chat templates of reasoning models ask."""
        tokenizer = self._session.metadata.tokenizer
        think = think_length(tokenizer, generation.token_ids, prompt_ids=ids)
        return answer_text(tokenizer, generation.token_ids, think) if think else generation.text

    def _measure(
        self, ids: tuple[int, ...], answers: Sequence[Generation]
    ) -> Iterator[AnswerProjection]:
        """Project the answers' activations, captured without the steering that adds to it."""
        if not self._vectors:
            return
        tokenizer = self._session.metadata.tokenizer
        spans = [
            spans_from_ids(
                answer.id,
                prompt_ids=ids,
                answer_ids=answer.token_ids,
                skip=think_length(tokenizer, answer.token_ids, prompt_ids=ids),
            )
            for answer in answers
            if answer.token_ids
        ]
        for means in sorted(self._session.backend.capture(spans), key=lambda m: m.id):
            for name, vector in self._vectors.items():
                for layer in self._layers_of(name):
                    activation = means.means["response"][layer]
                    if np.isnan(activation).any() or not vector.rows[layer].any():
                        continue
                    along = float(project(activation, vector.rows[layer]))
                    norm = float(means.norms["response"][layer])
                    yield AnswerProjection(
                        side=means.id,
                        vector=name,
                        layer=layer,
                        projection=along,
                        relative=along / norm,
                    )

    def _layers_of(self, name: str) -> list[int]:
        """Return the layers at which a vector steers, or the one at which it would."""
        return sorted({layer for vector, layer in self._steering if vector == name}) or [
            self._default_layer()
        ]

    def _default_layer(self) -> int:
        """Return the middle of the layers that the settings ask for (``auto``: 55 % depth)."""
        layers = parse_layers(
            self._settings.steer.layer, num_layers=self._session.metadata.num_layers
        )
        return layers[len(layers) // 2][0]

    def _steer(self, text: str) -> str:
        match = _STEER.fullmatch(text)
        if match is None:
            raise InputError("Write /steer NAME COEF or /steer NAME@LAYER COEF.")
        name = match["name"]
        if name not in self._vectors:
            there = ", ".join(self._vectors) or "none; start with --vector FILE"
            raise InputError(
                f"There is no vector {name!r}.{did_you_mean(name, self._vectors)} "
                f"There is: {there}."
            )
        layer = self._layer(match["layer"])
        coef = self._coef(match["coef"])
        if coef == 0:
            self._steering.pop((name, layer), None)
            return self._status()
        steer = self._settings.steer
        self._steering[name, layer] = self._vectors[name].instruction(
            layer,
            coef=coef,
            positions=steer.positions,
            operator=steer.operator,
            unit=steer.coef_unit,
        )
        return self._status()

    def _layer(self, text: str | None) -> int:
        if text is None:
            return self._default_layer()
        if not text.isdecimal():
            raise InputError(f"{text!r} is not a layer: write a whole number.")
        return check_layer(int(text), self._session.metadata.num_layers)

    @staticmethod
    def _coef(text: str) -> float:
        try:
            coef = float(text)
        except ValueError:
            coef = float("nan")
        if not np.isfinite(coef):
            raise InputError(f"{text!r} is not a coefficient: write a number.")
        return coef

    def _off(self, _: str = "") -> str:
        self._steering.clear()
        return "steering is off"

    def _compare(self, _: str = "") -> str:
        self.compare = not self.compare
        return f"comparing is {'on' if self.compare else 'off'}"

    def _set_system(self, text: str) -> str:
        self._system = text or None
        self._history.clear()
        return "system prompt set" if text else "no system prompt"

    def _reset(self, _: str = "") -> str:
        self._history.clear()
        return "the conversation is empty"

    def _status(self, _: str = "") -> str:
        if not self._steering:
            return f"no steering; vectors: {', '.join(self._vectors) or 'none'}"
        parts = [f"{i.name} at {describe_layer(i.layer)} x {i.coef:g}" for i in self.steering]
        return f"steering with {' and '.join(parts)}"


def load_steering_vectors(
    settings: Settings, session: ModelSession, paths: Sequence[Path]
) -> list[SteeringVector]:
    """Return the vectors to chat with, by trait. Raises ``InputError`` for two of one name."""
    loaded = load_vectors(
        paths,
        model=session.metadata,
        layer=single_layer(settings.steer),
        notify=session.notify,
    ).values()
    vectors = [steering_vector(vector, kind=settings.steer.kind) for vector in loaded]
    names = [vector.label for vector in vectors]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"Two vectors are named {twice[0]!r}: give only one of them.")
    return vectors

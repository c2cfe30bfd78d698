"""A conversation under live steering: its commands and its history. Text in, events out.

What answers is a model in this process (``evaluation.chat``) or a server (``evaluation.served``).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from pvec.errors import InputError, did_you_mean
from pvec.models.decoder import describe_layer
from pvec.types import Dose, Message, Percentile

MAIN, PLAIN = "answer", "unsteered"

HELP = """\
/steer NAME[@LAYER] COEF   steer with a vector: /steer evil@20 2.0 (COEF 0 removes it); with
                           --operator cap or floor also a percentile: /steer evil pos25
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

    ``side`` is ``answer``, or ``unsteered`` for the answer to compare with. ``kept`` is what the
    history keeps of an answer that is done, where that is not ``text``.
    """

    side: str
    text: str
    done: bool
    kept: str | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerProjection:
    """How far an answer's mean activation points along a vector; ``value`` says it for people."""

    side: str
    vector: str
    layer: int
    projection: float
    value: str


class Conversation(ABC):
    """A conversation and what steers it: a coefficient for each vector and layer.

    The steered answers are the conversation's history; an unsteered answer to compare with is given
    to the same history and then forgotten.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        """The vectors that there are."""
        self.compare = False
        self._history: list[Message] = []
        self._system: str | None = None
        self._turn = 0
        self._coefs: dict[tuple[str, int], Dose] = {}

    @property
    def is_steered(self) -> bool:
        """Whether anything steers the next answer."""
        return bool(self._coefs)

    def command(self, line: str) -> str | None:
        """Run a line that begins with ``/`` and return what to show; None means: leave.

        Raises ``InputError`` or ``ModelError`` for a command that cannot be run; nothing has
        changed then.
        """
        word, _, rest = line.strip().partition(" ")
        if word in {"/quit", "/exit"}:
            return None
        commands = self._commands()
        if word not in commands:
            raise InputError(
                f"There is no command {word!r}.{did_you_mean(word, commands)} /help lists them."
            )
        return commands[word](rest.strip())

    def completions(self, line: str) -> list[str]:
        """Return the commands, or the vectors to steer with, that can follow what is typed."""
        if line.startswith("/steer "):
            return [name for name in self.names if name.startswith(line.removeprefix("/steer "))]
        return [word for word in (*self._commands(), "/quit") if line and word.startswith(line)]

    def answer(self, text: str) -> Generator[AnswerText | AnswerProjection, None, None]:
        """Answer a line: yield the text as it grows, then how far it points along each vector.

        When the iteration is stopped early, the text so far is the answer. An answer that fails
        leaves the conversation as it was.
        """
        turns: list[Message] = [*self._history, {"role": "user", "content": text}]
        head: list[Message] = []
        if self._system is not None:
            head = [{"role": "system", "content": self._system}]
        answer = ""
        sides = (MAIN, PLAIN) if self.compare and self.is_steered else (MAIN,)

        def remember() -> None:
            self._history = [*turns, {"role": "assistant", "content": answer}]
            self._turn += 1

        try:
            with closing(self._respond([*head, *turns], sides)) as events:
                for event in events:
                    if isinstance(event, AnswerText) and event.side == MAIN:
                        answer = event.text if event.kept is None else event.kept
                    yield event
        except (GeneratorExit, KeyboardInterrupt):
            remember()
            raise
        remember()

    @abstractmethod
    def _respond(
        self, messages: list[Message], sides: Sequence[str]
    ) -> Generator[AnswerText | AnswerProjection, None, None]:
        """Answer ``messages`` on each of ``sides`` with the steering of now."""

    @abstractmethod
    def _layer(self, name: str, layer: int | None) -> int:
        """Return a layer that exists: ``layer``, or where this vector steers unless told."""

    @abstractmethod
    def _check(self, name: str, layer: int, coef: Dose) -> None:
        """Raise ``InputError`` when the vector cannot steer there."""

    def _commands(self) -> dict[str, Callable[[str], str]]:
        return {
            "/steer": self._steer,
            "/off": self._off,
            "/compare": self._compare,
            "/system": self._set_system,
            "/reset": self._reset,
            "/status": self._status,
            "/help": lambda _: HELP,
        }

    def _steer(self, text: str) -> str:
        match = _STEER.fullmatch(text)
        if match is None:
            raise InputError("Write /steer NAME COEF or /steer NAME@LAYER COEF.")
        name = match["name"]
        if name not in self.names:
            there = ", ".join(self.names) or "none; start with --vector FILE"
            raise InputError(
                f"There is no vector {name!r}.{did_you_mean(name, self.names)} There is: {there}."
            )
        if match["layer"] is not None and not match["layer"].isdecimal():
            raise InputError(f"{match['layer']!r} is not a layer: write a whole number.")
        layer = self._layer(name, None if match["layer"] is None else int(match["layer"]))
        coef = _coef(match["coef"])
        if coef == 0:
            self._coefs.pop((name, layer), None)
        else:
            self._check(name, layer, coef)
            self._coefs[name, layer] = coef
        return self._status()

    def _off(self, _: str = "") -> str:
        self._coefs.clear()
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
        if not self._coefs:
            return f"no steering; vectors: {', '.join(self.names) or 'none'}"
        parts = [
            f"{name} at {describe_layer(layer)} x {shown_dose(coef)}"
            for (name, layer), coef in self._coefs.items()
        ]
        return f"steering with {' and '.join(parts)}"


def shown_dose(coef: Dose) -> str:
    """Return a coefficient or a percentile as it is typed."""
    return str(coef) if isinstance(coef, Percentile) else f"{coef:g}"


def _coef(text: str) -> Dose:
    if percentile := Percentile.parse(text):
        return percentile
    try:
        coef = float(text)
    except ValueError:
        coef = math.nan
    if not math.isfinite(coef):
        raise InputError(f"{text!r} is not a coefficient: write a number.")
    return coef

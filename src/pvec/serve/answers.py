"""One answer of a server: what was asked for, its text as tokens come, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pvec.errors import PvecError
from pvec.serve.rules import Alarm
from pvec.types import Instruction, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reason = Literal["stop", "length", "cancelled", "error"]


class InternalError(PvecError):
    """A bug: the client is told no more than that; the server's log has the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Further tokens of an answer: their texts and projections ``[directions]``."""

    answer: Answer
    pieces: Sequence[str]
    projections: Sequence[np.ndarray | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """How an answer ended.

    ``projections`` ``[1 + tokens, directions]`` are those of the last prompt token and of the
    tokens in ``pieces`` (the last of them is missing when the model's context was full). ``tokens``
    counts what was generated, a stop text included; ``touched`` follows ``steering``.
    """

    answer: Answer
    reason: Reason
    text: str = ""
    pieces: Sequence[str] = ()
    token_ids: Sequence[int] = ()
    projections: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    touched: tuple[int, ...] = ()
    steering: tuple[Instruction, ...] = ()
    capped: tuple[str, ...] = ()
    error: PvecError | None = None
    first_token: float | None = None
    """Seconds from ``Answer.created`` to the first token."""

    @property
    def tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)


@dataclass(eq=False, kw_only=True)
class Answer:
    """One answer that somebody waits for. ``request`` asks for one token more than ``limit``: the
    last token is to be run and measured too.

    ``stops`` are the texts that end it; ``alarms`` watch one direction each. ``text`` is begun by
    the engine that runs it.
    """

    request: Request
    limit: int
    stops: Sequence[str] = ()
    text: AnswerText = field(init=False, repr=False)
    alarms: Sequence[tuple[int, Alarm]] = ()
    stream: bool = False
    index: int = 0
    seed: int = 0
    capped: tuple[str, ...] = ()
    created: float = field(default_factory=time.monotonic)
    first_token: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tell another process, whose clock is another, how long ago the answer was created."""
        return {**vars(self), "created": time.monotonic() - self.created}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, created=time.monotonic() - state["created"])


class AnswerText:
    """Token by token what an answer says; special tokens say nothing.

    ``pieces`` has a text per token, and joined they are ``text``. A token that is part of a
    character adds nothing, and the character comes with its last one. ``stopped`` says that a stop
    text was met: it and what followed are gone, and so are the tokens that said nothing else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, stops: Sequence[str] = ()) -> None:
        self.pieces: list[str] = []
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self.stops = tuple(stops)
        self._ids: list[int] = []
        self._sent = self._sent_length = 0  # pieces, and characters in them
        self._decoder: Any = None
        if tokenizer.is_fast:
            from tokenizers.decoders import DecodeStream

            self._decoder = DecodeStream(skip_special_tokens=True)

    @property
    def read(self) -> int:
        """How many tokens were taken."""
        return len(self._ids)

    def add(self, token: int) -> None:
        """Take the next token of the answer."""
        self._ids.append(token)
        if self._decoder is not None:
            piece = self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""
        else:
            piece = self._rest().removesuffix("\ufffd")
        searched = len(self.text)
        self.pieces.append(piece)
        self.text += piece
        found = [
            place
            for stop in self.stops
            if (place := self.text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if found:
            self._cut(min(found))

    def finish(self) -> None:
        """Take in what an unfinished character leaves: no more tokens come."""
        if self.pieces and not self.pieces[-1] and not self.stopped:
            self.pieces[-1] = self._rest()
            self.text += self.pieces[-1]

    def ready(self, *, final: bool = False) -> Iterator[tuple[int, str]]:
        """Yield ``(number, piece)`` of the tokens that can be sent now, each once.

        Until the answer is ``final`` a character is whole, and nothing that may begin a stop text.
        """
        safe = len(self.text) if final or self.stopped else len(self.text) - self._held()
        last = len(self.pieces)
        while not final and last > self._sent and not self.pieces[last - 1]:
            last -= 1
        while self._sent < last:
            piece = self.pieces[self._sent]
            if self._sent_length + len(piece) > safe:
                return
            self._sent_length += len(piece)
            self._sent += 1
            yield self._sent - 1, piece

    def _cut(self, place: int) -> None:
        self.stopped = True
        end = len(self.text)
        while len(self.pieces) > self._sent and end - len(self.pieces[-1]) >= place:
            end -= len(self.pieces.pop())
        if self.pieces:
            piece = self.pieces[-1]
            self.pieces[-1] = piece[: len(piece) - (end - place)] if end > place else piece
        self.text = self.text[:place]

    def _held(self) -> int:
        """Return how many characters at the end could begin a stop text."""
        longest = max(map(len, self.stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stops):
                return size
        return 0

    def _rest(self) -> str:
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        return whole[len(self.text) :] if whole.startswith(self.text) else ""

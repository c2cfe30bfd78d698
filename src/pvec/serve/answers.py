"""One answer of a server: what was asked for, what comes of it, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pvec.errors import PvecError
from pvec.serve.rules import Alarm
from pvec.serve.text import AnswerText
from pvec.types import Instruction, Request

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

    ``alarms`` watch one direction each.
    """

    request: Request
    limit: int
    text: AnswerText
    alarms: Sequence[tuple[int, Alarm]] = ()
    stream: bool = False
    index: int = 0
    seed: int = 0
    capped: tuple[str, ...] = ()
    created: float = field(default_factory=time.monotonic)
    first_token: float | None = None

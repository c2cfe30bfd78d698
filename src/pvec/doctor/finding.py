"""One thing that ``pvec doctor`` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken"]
"""``missing``: something that some uses need is not here. ``broken``: pvec cannot work so."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what was found, and how to get what is not there."""

    name: str
    state: State
    found: str
    remedy: str = ""

"""What every figure of the paper is told with: its claim, what was found here, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.paper.numbers import Check, Outcome, format_interval, overall
from examples.paper.sizes import Size
from examples.paper.steps import Result
from pvec.report.figure import Figure, Table
from pvec.report.page import Section

Results = Sequence[Mapping[str, Result]]
"""Per seed: step → what it found."""


@dataclass(frozen=True, kw_only=True)
class Replication:
    """One of the paper's findings, told here. ``paper`` and ``here`` are one sentence each."""

    number: int
    title: str
    paper: str
    here: str
    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        return overall(self.checks)

    def section(self, size: Size) -> Section:
        """Return the page's section."""
        seeds = ", ".join(map(str, size.seeds))
        return Section(
            id=f"figure-{self.number}",
            title=f"{self.number}. {self.title}: {self.outcome}",
            summary=f"The paper: {self.paper} Here: {self.here}",
            notes=self.notes,
            figures=self.figures,
            source=f"tiny · persona vectors in miniature, size {size.name}, seeds {seeds}",
            tables=(("Checks", self.table()),),
        )

    def table(self) -> Table:
        """Return the checks with their numbers."""
        return Table(
            columns=("outcome", "found [95 %]", "expected", "check", "seeds"),
            rows=tuple(
                (
                    check.outcome,
                    format_interval(
                        check.interval, digits=2 if abs(check.interval.mean) < 2 else 1
                    ),
                    check.expected,
                    check.what,
                    check.interval.n,
                )
                for check in self.checks
            ),
        )


def join_words(names: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def verdict_clause(outcome: Outcome) -> str:
    """Return how a sentence about the small model ends."""
    ends: dict[Outcome, str] = {
        "agrees": "it agrees with the paper",
        "disagrees": "it does not agree with the paper",
        "cannot tell": "these numbers cannot tell whether it agrees",
        "same side": "all of it is on the paper's side, which one seed cannot prove",
        "other side": "some of it is not on the paper's side, which one seed cannot prove",
    }
    return ends[outcome]

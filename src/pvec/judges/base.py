"""What every judge is, whoever answers: a server or a model in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from pvec.closing import Closing
from pvec.judges.scales import Reading
from pvec.types import JudgeQuery, Score


class Judge(Closing):
    """Something that scores answers; a context manager, so that connections are given back.

    ``name`` is the judge's identity: everything about it that could change a score (model, host,
    weights), without secrets. It is part of every score's id. The words it is asked with and the
    scale belong to the query.
    """

    name: str

    @property
    def fenced(self) -> bool:
        """Whether it reads instructions, so that answers must be set apart (``judges.prompts``)."""
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how scores are read, each a sentence to show once."""
        return ()

    @property
    def stopped(self) -> str | None:
        """Why ``score`` ended before its queries did (a cost limit), or None."""
        return None

    @property
    def spent(self) -> float:
        """What this judge has cost since it was opened, in US dollars as far as known."""
        return 0.0

    def check(self) -> None:
        """Find out, before anything is generated, whether this judge can be asked at all.

        Raises ``JudgeError`` when it cannot. Costs at most one short request.
        """

    def work_in(self, folder: Path, *, name: str, notify: Callable[[str], None]) -> None:
        """Take note of the run ``folder`` whose answers are scored, of the ``name`` under which the
        scores are kept, and of who shows notes; for a judge whose work outlives the process.
        """

    @abstractmethod
    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        """Yield one ``Score`` per query as it finishes, in any order, in constant memory; also
        scores that an earlier call has asked for and not waited for.

        A query that could not be answered gives a score with ``status="error"``. Raises
        ``JudgeError`` when going on is pointless (key refused, no credit, nothing but errors),
        after yielding every score that was already paid for.
        """

    def scored(
        self, query: JudgeQuery, reading: Reading, *, raw: Mapping[str, float] | None = None
    ) -> Score:
        """Return the score of a query as this judge read it."""
        return Score(
            id=query.id,
            response_id=query.response_id,
            metric=query.metric,
            judge=self.name,
            score=reading.score,
            status=reading.status,
            detail=reading.detail,
            raw=raw,
        )

    def close(self) -> None:
        """Give back what the judge holds. Called once, on leaving the context."""

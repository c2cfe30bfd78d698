"""Batches that wait at a server, kept in the run so that any later call collects them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pvec.documents import misfit, read_json
from pvec.errors import InputError, StoreError
from pvec.runs.files import atomic_write
from pvec.runs.manifest import timestamp
from pvec.types import JudgeQuery

MOST_REQUESTS = 50_000
MOST_BYTES = 100_000_000
"""What one batch may hold; OpenAI allows twice as many bytes, others do not."""

_FOLDER = "batches"
_SHAPE = {
    "key": str,
    "judge": str,
    "id": (str, type(None)),
    "attempt": int,
    "submitted": str,
    "replaces": [str],
    "queries": {...: [str]},
}
"""What a record holds; of a query its response, metric and scale."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch: ``queries`` are what it asks, without their words, which ``requests`` holds.

    ``id`` is the server's name for it, None until it was submitted. ``attempt`` counts how often
    these queries were submitted; ``replaces`` is the batch of the attempt before. ``judge`` is the
    name under which the scores are kept.
    """

    folder: Path
    key: str
    judge: str
    queries: Mapping[str, JudgeQuery]
    id: str | None = None
    attempt: int = 1
    replaces: tuple[str, ...] = ()
    submitted: str = ""
    reserved: float = field(default=0.0, compare=False)
    """Dollars set aside for it in this process."""
    fresh: bool = field(default=False, compare=False)
    """Whether this process made it, so that the server cannot have it yet."""

    @classmethod
    def create(
        cls,
        run: Path,
        *,
        judge: str,
        queries: Sequence[JudgeQuery],
        lines: Sequence[str],
        **fields: Any,
    ) -> Self:
        """Keep a new batch in the folder of a run; ``lines`` are its requests."""
        asked = {query.id: replace(query, messages=()) for query in queries}
        batch = cls(
            folder=run / _FOLDER,
            key=uuid.uuid4().hex[:16],
            judge=judge,
            queries=asked,
            fresh=True,
            **fields,
        )
        batch.folder.mkdir(exist_ok=True)
        with atomic_write(batch.requests, mode="w") as stream:
            stream.writelines(lines)
        batch.save()
        return batch

    @property
    def requests(self) -> Path:
        """The file of requests, as the server gets it."""
        return self.folder / f"{self.key}.jsonl"

    def results(self, number: int) -> Path:
        """Return where a file of results is written before it is read."""
        return self.folder / f"{self.key}.result{number}.jsonl"

    def with_id(self, identity: str) -> Self:
        """Note what the server calls this batch."""
        batch = replace(self, id=identity, submitted=timestamp())
        batch.save()
        return batch

    def part(self, names: Collection[str], *, attempt: int | None = None, share: float = 0) -> Self:
        """Keep a new batch of those queries of this one, with that ``share`` of the money."""
        wanted = set(names)
        with self.requests.open(encoding="utf-8") as stream:
            lines = [line for line in stream if query_id(json.loads(line)["custom_id"]) in wanted]
        return self.create(
            self.folder.parent,
            judge=self.judge,
            queries=[query for query in self.queries.values() if query.id in wanted],
            lines=lines,
            attempt=attempt or self.attempt,
            replaces=(*self.replaces, self.key),
            reserved=share * self.reserved,
        )

    def forget(self) -> None:
        """Remove the batch from the run: its scores are kept, or another batch replaces it."""
        for path in (self.folder / f"{self.key}.json", *self.folder.glob(f"{self.key}.*")):
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def save(self) -> None:
        """Write what is known of the batch into the run."""
        record = {name: getattr(self, name) for name in _SHAPE}
        record["queries"] = {
            query.id: [query.response_id, query.metric, query.scale]
            for query in self.queries.values()
        }
        with atomic_write(self.folder / f"{self.key}.json", mode="w") as stream:
            json.dump(record, stream)


def query_id(custom_id: str) -> str:
    """Return the id of the query that a request belongs to: those of repeats end in a number."""
    return custom_id.partition("-")[0]


def open_batches(run: Path, *, judge: str) -> Iterator[Batch]:
    """Yield the batches of ``judge`` that a run waits for. Raises ``StoreError`` for a damaged one.

    What a kill left half made is removed.
    """
    folder = run / _FOLDER
    if not folder.is_dir():
        return
    batches = [_read(path) for path in sorted(folder.glob("*.json"))]
    known = {batch.key for batch in batches}
    for path in folder.iterdir():
        if path.name.partition(".")[0] not in known:
            path.unlink()
    replaced = {key for batch in batches for key in batch.replaces}
    for batch in batches:
        if batch.key in replaced:
            batch.forget()
        elif batch.judge == judge:
            yield batch


def _read(path: Path) -> Batch:
    try:
        data = read_json(path)
        if misfit(data, _SHAPE) is not None or data["key"] != path.stem:
            raise ValueError
        queries = {
            identity: JudgeQuery(
                id=identity, response_id=response, metric=metric, messages=(), scale=scale
            )
            for identity, (response, metric, scale) in data["queries"].items()
        }
    except (InputError, ValueError):
        raise StoreError(
            f"{path} is damaged: restore it from a copy, or delete it and the scores of that batch "
            "are asked for, and paid, again."
        ) from None
    fields = {name: data[name] for name in _SHAPE}
    replaces = tuple(data["replaces"])
    return Batch(**{**fields, "folder": path.parent, "queries": queries, "replaces": replaces})

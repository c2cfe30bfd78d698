"""Which token of a step belongs to which request, what it is to steering, and where it is summed.

Every step of the engine is a row of tokens from many requests. The map turns (request, first
position, number of tokens) into two integers per token: its row in the steering tables and its row
in the accumulators. Positions decide, never the kind of step: a chunk of a prompt, a resumed
request and a single new token are all the same. Row 0 is nobody's in both.

Pure numpy: no vLLM here, and no loop over tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pvec.steering.tables import first_row

NUM_EDGES = 6
"""Three spans have at most six ends."""

OPEN_END = 2**31 - 1
"""The stop of a span that runs as long as the request does."""

_NOBODY = 0


@dataclass(frozen=True, kw_only=True)
class RequestMetadata:
    """What a request carries into the engine.

    ``slot`` numbers its steering (0: none); ``prompt`` counts its prompt tokens; a token at
    position p is summed into ``rows[k]``, where k is the number of ``edges`` that are <= p.
    """

    key: int
    slot: int
    prompt: int
    edges: Sequence[int] = ()
    rows: Sequence[int] = (0,)

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> RequestMetadata:
        """Return the metadata in ``SamplingParams.extra_args``, which may have more."""
        return cls(**{field.name: args[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """What a finished request's tokens went through.

    ``cached`` tokens were read from the prefix cache and never computed; positions up to ``high``
    were; ``gaps`` counts positions that were skipped in between (always 0 in a right engine).
    """

    cached: int
    high: int
    gaps: int


class TokenRowMap:
    """Which tokens of one worker belong to which request.

    ``capacity`` is the number of requests that it starts out with.
    """

    def __init__(self, *, capacity: int = 64) -> None:
        self._index: dict[str, int] = {}
        self._of_key: dict[int, tuple[int, str]] = {}
        self._free: list[int] = []
        self._size = 0
        self._base = np.zeros(0, dtype=np.int32)  # first steering row, 0 for none
        self._last = np.zeros(0, dtype=np.int64)  # position of the last prompt token
        self._edges = np.zeros((0, NUM_EDGES), dtype=np.int64)
        self._rows = np.zeros((0, NUM_EDGES + 1), dtype=np.int32)
        self._counts = np.zeros((0, 3), dtype=np.int64)  # cached (-1: not begun), high, gaps
        self._proven = np.zeros(0, dtype=np.int64)  # tokens that every probe steered
        self._token = np.zeros(0, dtype=np.int64)  # record of each token of the latest step [N]
        self._fresh = np.zeros(0, dtype=bool)  # whether it was computed for the first time [N]
        self._grow(max(capacity, 1) + 1)
        self._free.remove(_NOBODY)  # the record of every request without metadata

    def open(self, request: str, metadata: RequestMetadata) -> None:
        """Enter a request of the engine. One that comes back after preemption keeps its counts."""
        known = self._of_key.get(metadata.key)
        if known is not None:
            self._index.pop(known[1], None)
            self._index[request] = known[0]
            self._of_key[metadata.key] = (known[0], request)
            return
        if not self._free:
            self._grow(self._size)
        record = self._free.pop()
        self._index[request] = record
        self._of_key[metadata.key] = (record, request)
        self._base[record] = first_row(metadata.slot - 1) if metadata.slot else 0
        self._last[record] = metadata.prompt - 1
        self._edges[record] = OPEN_END
        self._edges[record, : len(metadata.edges)] = metadata.edges
        self._rows[record] = 0
        self._rows[record, : len(metadata.rows)] = metadata.rows
        self._counts[record] = (-1, 0, 0)
        self._proven[record] = 0

    def step(
        self, requests: Sequence[str], first: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (steering row, accumulator row) of every token of a step, int32 ``[N]`` each.

        Request r has ``counts[r]`` tokens from position ``first[r]`` on; tokens lie request by
        request. A position that was computed before (preemption) is steered again, summed never.
        """
        index = self._index
        record = np.fromiter((index.get(r, _NOBODY) for r in requests), np.int64, len(requests))
        first, counts = first.astype(np.int64), counts.astype(np.int64)
        starts = np.cumsum(counts) - counts
        token = np.repeat(record, counts)  # [N]
        place = np.arange(len(token)) + np.repeat(first - starts, counts)  # [N] position
        last, base = self._last[token], self._base[token]
        role = (place >= last).astype(np.int32) + (place > last)
        steering = np.where(base > 0, base + role, 0).astype(np.int32)
        segment = (place[:, None] >= self._edges[token]).sum(axis=1)
        fresh = place >= self._counts[token, 1]
        summed = np.where(fresh, self._rows[token, segment], 0).astype(np.int32)
        self._enter(record, first, counts)
        self._token, self._fresh = token, fresh
        return steering, summed

    def evidence(self, requests: Sequence[str], steered: np.ndarray) -> np.ndarray:
        """Return what the tokens of each request went through, int64 ``[requests, 4]``.

        ``steered`` bool ``[N]`` says of the latest step's tokens whether every probe steered them.
        The columns are those of ``TokenCounts``, and how many tokens were so steered, each once.
        """
        proven = self._token[steered & self._fresh]
        self._proven += np.bincount(proven, minlength=len(self._proven))
        record = [self._index.get(request, _NOBODY) for request in requests]
        return np.concatenate([self._counts[record], self._proven[record, None]], axis=1)

    def close(self, key: int) -> TokenCounts | None:
        """Forget a request and return its account; None when it never reached this worker."""
        known = self._of_key.pop(key, None)
        if known is None:
            return None
        record, request = known
        self._index.pop(request, None)
        self._free.append(record)
        cached, high, gaps = self._counts[record].tolist()
        return TokenCounts(cached=max(cached, 0), high=high, gaps=gaps)

    def _enter(self, record: np.ndarray, first: np.ndarray, counts: np.ndarray) -> None:
        seen = self._counts[record]
        new = seen[:, 0] < 0
        seen[new, 0] = first[new]
        seen[new, 1] = first[new]
        seen[:, 2] += np.maximum(first - seen[:, 1], 0)
        seen[:, 1] = np.maximum(seen[:, 1], first + counts)
        self._counts[record] = seen

    def _grow(self, more: int) -> None:
        def longer(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((more, *array.shape[1:]), dtype=array.dtype)])

        self._base, self._last = longer(self._base), longer(self._last)
        self._edges, self._rows = longer(self._edges), longer(self._rows)
        self._counts, self._proven = longer(self._counts), longer(self._proven)
        self._free += range(self._size, self._size + more)
        self._size += more

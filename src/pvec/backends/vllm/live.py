"""What the worker sends along with every token of a live request: its projections, and proof.

A live request (of a server) brings its plan along and is reported after each step, in vLLM's own
output of the step, which has a tensor for each request that only pooling models use: the row
``Report`` describes. Nothing is asked for and nothing has to be fetched or freed from outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pvec.backends.vllm.probe import Probe
from pvec.backends.vllm.token_rows import TokenRowMap


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a live request's tokens went through until the step that sampled its latest token.

    ``cached``, ``high`` and ``gaps`` as in ``TokenCounts``; ``proven`` tokens were steered by every
    probe; ``along`` float32 ``[D]`` are the projections of the token before the latest one.
    """

    cached: int
    high: int
    gaps: int
    proven: int
    along: np.ndarray

    @classmethod
    def read(cls, row: torch.Tensor) -> Report:
        """Return the report in a row of numbers."""
        values = row.numpy()
        cached, high, gaps, proven = (int(value) for value in values[:4])
        return cls(cached=cached, high=high, gaps=gaps, proven=proven, along=values[4:])


class LiveReports:
    """The live requests of one worker."""

    def __init__(self, row_map: TokenRowMap, probes: Iterable[Probe]) -> None:
        steering = [probe for probe in probes if probe.steers]
        self._row_map = row_map
        self._along = steering[0].along if steering else None
        self._probes = len(steering)
        self._key_of: dict[str, int] = {}
        self._keys = itertools.count(-1, -1)  # those of the client are above 0
        self._step: tuple[list[str], np.ndarray] | None = None

    def open(self, request: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Enter a request; return its metadata with a key of its own."""
        return {**metadata, "key": self._key_of.setdefault(request, next(self._keys))}

    def close(self, requests: Iterable[str]) -> None:
        """Forget requests that have ended, however they did."""
        for request in requests:
            key = self._key_of.pop(request, None)
            if key is not None:
                self._row_map.close(key)

    def begin(self, requests: Sequence[str], counts: np.ndarray) -> None:
        """Take in the requests of a step and their numbers of tokens, before it runs."""
        if self._along is not None:
            self._along.zero_()
            self._step = list(requests), np.cumsum(counts)

    def add_to(self, output: Any) -> Any:
        """Return vLLM's output of a step with the reports of live requests that have a token."""
        if self._step is None or not getattr(output, "req_ids", None):
            return output
        (requests, ends), self._step = self._step, None
        assert self._along is not None
        along = self._along[: ends[-1]].cpu().numpy()  # [N, D + 1]
        evidence = self._row_map.evidence(requests, along[:, -1] == self._probes)
        rows = np.concatenate([evidence, along[ends - 1, :-1]], axis=1).astype(np.float32)
        report_of = dict(zip(requests, torch.from_numpy(rows), strict=True))
        output.pooler_output = [
            report_of[request] if request in self._key_of and tokens else None
            for request, tokens in zip(output.req_ids, output.sampled_token_ids, strict=True)
        ]
        return output

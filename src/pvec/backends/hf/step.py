"""One more token for every row of a batch: the forward pass that the decode loop repeats.

``EagerStep`` takes its shapes from the batch. ``FixedStep`` keeps them: rows of padding stand for
those that left, attention reads the cache's buffers whole, and what changes from step to step is
numbers on the device. Such a step can be recorded and replayed without Python, as a CUDA graph.
Sampling stays outside: it is ten kernels of hundreds, and the loop must see the tokens anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pvec.backends.hf.attention import ready_masks
from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.kvcache import RowCache, StateCache
from pvec.backends.hf.probe import Probe
from pvec.steering.steerer import Steerer

_FULL_ENOUGH = 0.75
"""A recorded step goes on while this share of its rows is in use."""

Outputs = tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, torch.Tensor]]
"""Logits ``[R, V]``, and by layer what a probe measured and ``Steerer.beyond``."""


class DecodeStep(Protocol):
    """Runs one token of every row, where ``lengths`` tokens of each are in the cache already."""

    def __call__(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        *,
        cache: RowCache | StateCache,
        steerer: Steerer,
        probe: Probe | None = None,
    ) -> torch.Tensor:
        """Return float32 logits ``[R, V]``, which the next step may overwrite."""


def decode_step(model: CausalModel) -> DecodeStep:
    """Return what runs the steps of one batch."""
    return FixedStep(model) if model.fixed_shapes else EagerStep(model)


class EagerStep:
    """A step whose shapes are those of the batch."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model

    def __call__(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        *,
        cache: RowCache | StateCache,
        steerer: Steerer,
        probe: Probe | None = None,
    ) -> torch.Tensor:
        """Run one token of every row; see ``DecodeStep``."""
        device = self._model.device
        past = torch.tensor(lengths, device=device)
        columns = max(lengths) + 1
        real = None
        if min(lengths) + 1 < columns:  # some row is padded
            real = torch.arange(columns, device=device) >= (columns - 1 - past)[:, None]
        steerer.set_generated()
        return self._model.forward(
            torch.tensor(tokens, device=device)[:, None],
            mask=real,
            positions=past[:, None],
            cache=cache,
            steerer=steerer,
            probe=probe,
        )


def record_cuda_graph(forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Record the kernels of a forward pass; return what runs them again into the same outputs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = forward()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


RECORDERS = {"cuda": record_cuda_graph}
"""How a step is recorded, by type of device; elsewhere every step runs as it is."""

_unrecordable: set[type] = set()
"""Classes of models of which recording has failed in this process."""


@dataclass(kw_only=True, eq=False)
class _Recording:
    """The step of so many rows, on one place of the cache and with one set of steering tables.

    Its first run is a plain one, which proves that every hook runs; the second is recorded.
    """

    key: tuple[int, tuple[int, ...], object]  # rows, place, tables
    inputs: torch.Tensor  # [4, R]: tokens, lengths, rows of the steering tables, column to write
    ran: bool = False
    replay: Callable[[], Outputs] | None = None

    @property
    def rows(self) -> int:
        return self.key[0]

    def fill(self, *values: Sequence[int] | np.ndarray) -> None:
        """Put the numbers of a step on the device; those of rows of padding are 0."""
        inputs = np.zeros(self.inputs.shape, dtype=np.int64)
        for row, numbers in zip(inputs, values, strict=True):
            row[: len(numbers)] = numbers
        self.inputs.copy_(torch.from_numpy(inputs))


class FixedStep:
    """A step of fixed shapes, recorded where ``RECORDERS`` know the device.

    A recording serves until the batch outgrows it, has become much smaller, or has other steering.
    """

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._recording: _Recording | None = None

    def __call__(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        *,
        cache: RowCache | StateCache,
        steerer: Steerer,
        probe: Probe | None = None,
    ) -> torch.Tensor:
        """Run one token of every row; see ``DecodeStep``."""
        assert isinstance(cache, RowCache), "other caches have no fixed shapes"
        recording = self._recording_for(len(tokens), cache, steerer)
        recording.fill(tokens, lengths, steerer.generated_rows(), [cache.next_column])

        def forward() -> Outputs:
            logits = self._forward(recording, cache, steerer, probe)
            return logits, dict(probe.along) if probe is not None else {}, steerer.beyond

        if recording.ran and recording.replay is None:
            recording.replay = self._recorded(forward)  # uncounted: nothing is announced
        steerer.set_generated(table_rows=recording.inputs[2, :, None])
        if recording.replay is None:
            logits, along, _ = forward()
            steerer.check_complete()
            recording.ran = True
        else:
            logits, along, beyond = recording.replay()
            steerer.count_replayed(beyond)
        cache.grow()
        if probe is not None:
            probe.along = {layer: values[: len(tokens)] for layer, values in along.items()}
        return logits[: len(tokens)]

    def _recording_for(self, rows: int, cache: RowCache, steerer: Steerer) -> _Recording:
        """Return the recording for a batch, which may be one that has not run yet."""
        held = self._recording
        if held is not None and _FULL_ENOUGH * held.rows <= rows <= held.rows:
            rows = held.rows
        cache.reserve(rows)
        key = (rows, cache.place, steerer.tables)
        if held is None or held.key != key:
            inputs = torch.zeros(4, rows, dtype=torch.long, device=self._model.device)
            held = self._recording = _Recording(key=key, inputs=inputs)
        return held

    def _forward(
        self, recording: _Recording, cache: RowCache, steerer: Steerer, probe: Probe | None
    ) -> torch.Tensor:
        tokens, lengths, _, column = recording.inputs
        fixed = cache.fixed(recording.rows, column[:1])
        positions = lengths[:, None]  # [R, 1] of the new tokens, which stand in that column
        keys = torch.arange(fixed.columns, device=lengths.device) - column[0] + positions  # [R, K]
        masks = ready_masks(
            self._model.config,
            ((keys >= 0) & (keys <= positions))[:, None],
            query=positions,
            key=keys,
            longest=fixed.columns,
            dtype=self._model.inner.dtype,
        )
        return self._model.forward(
            tokens[:, None],
            mask=masks,
            positions=positions,
            cache=fixed,
            steerer=steerer,
            probe=probe,
        )

    def _recorded(self, forward: Callable[[], Outputs]) -> Callable[[], Outputs] | None:
        kind = type(self._model.inner)
        record = RECORDERS.get(self._model.device.type)
        if record is None or kind in _unrecordable:
            return None
        try:
            return record(forward)
        except RuntimeError as error:
            _unrecordable.add(kind)
            reason = str(error).split("\n", maxsplit=1)[0][:200]
            self._model.notify(f"decoding without a CUDA graph, which is slower: {reason}")
            return None

"""The module attached to a decoder layer: steers the residual stream, counts, and accumulates.

Everything is a persistent buffer of fixed shape and a plain tensor operation, so that the module is
traced into a compiled graph and captured into a CUDA graph with its layer. Only the content of
``where`` changes from step to step. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pvec.steering.tables import NEUTRAL, TableRows, first_row, steering_change

STEERING, SUMMED = 0, 1
"""The rows of ``where``."""


class Probe(nn.Module):
    """Steering and capture of one layer.

    ``where`` int32 ``[2, T]`` is shared by all layers: row 0 each token's row in the steering
    tables, row 1 its row in the accumulators; 0 is nobody. Without ``slots`` (layer 0) it only
    captures. ``along`` float32 ``[T, D + 1]`` is shared too: every token's projections, of which a
    ``watched`` layer adds its own, and how many probes steered it; a state that is not finite makes
    all of a row NaN.
    """

    where: torch.Tensor  # int32 [2, T]
    delta: torch.Tensor  # these three: ``TableRows`` as tensors, delta in the model's dtype
    units: torch.Tensor
    bounds: torch.Tensor
    steered: torch.Tensor  # int64 [1]: tokens steered since the start
    sums: torch.Tensor  # float32 [A, H]
    stats: torch.Tensor  # float32 [A, 2]: sum of norms, number of tokens
    along: torch.Tensor | None
    directions: torch.Tensor  # float32 [H, D], zero for the vectors of other layers

    def __init__(
        self,
        *,
        where: torch.Tensor,
        hidden_size: int,
        slots: int,
        clamps: int,
        rows: int,
        dtype: torch.dtype,
        along: torch.Tensor | None = None,
        watched: bool = False,
    ) -> None:
        super().__init__()
        device = where.device
        height = first_row(slots)
        tables = {
            "where": where,
            "delta": torch.zeros(height, hidden_size, dtype=dtype, device=device),
            "units": torch.zeros(clamps, height, hidden_size, device=device),
            "bounds": torch.tensor(NEUTRAL, device=device).repeat(clamps, height, 1),
            "steered": torch.zeros(1, dtype=torch.int64, device=device),
            "sums": torch.zeros(rows, hidden_size, device=device),
            "stats": torch.zeros(rows, 2, device=device),
        }
        if watched and along is not None:
            tables["directions"] = torch.zeros(hidden_size, along.shape[1] - 1, device=device)
        for name, tensor in tables.items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("along", along, persistent=False)
        self.watched = watched
        self.steers = slots > 0
        self.loaded: set[int] = set()

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Return the steered ``residual`` (or ``hidden`` where the layer keeps no residual apart).

        Both are ``[..., n, H]``; the residual stream is their sum.
        """
        tokens = hidden.shape[-2]
        stream = hidden if residual is None else residual
        if self.steers:
            row = self.where[STEERING, :tokens]  # [n]
            stream = stream + steering_change(
                row, hidden, residual, delta=self.delta, units=self.units, bounds=self.bounds
            )
            self.steered.add_((row > 0).sum())
        whole = stream.float() if residual is None else hidden.float() + stream.float()
        flat = whole.reshape(-1, whole.shape[-1])  # [n, H]
        row = self.where[SUMMED, :tokens]
        norms = flat.square().sum(dim=-1).sqrt()
        self.sums.index_add_(0, row, flat)
        self.stats.index_add_(0, row, torch.stack([norms, torch.ones_like(norms)], dim=-1))
        if self.along is not None:
            self.along[:tokens, -1] += (self.where[STEERING, :tokens] > 0) + 0 * norms
            if self.watched:
                self.along[:tokens, :-1] += flat @ self.directions
        return stream

    def load(self, slot: int, rows: TableRows | None) -> None:
        """Write the steering of ``slot`` (1-based); None clears what an earlier plan left there."""
        if not self.steers or (rows is None and slot not in self.loaded):
            return
        place = slice(first_row(slot - 1), first_row(slot))
        if rows is None:
            self.loaded.discard(slot)
            self.delta[place] = 0
            self.units[:, place] = 0
            self.bounds[:, place] = torch.tensor(NEUTRAL, device=self.bounds.device)
            return
        self.loaded.add(slot)
        self.delta[place] = torch.from_numpy(rows.delta).to(self.delta)
        self.units[:, place] = torch.from_numpy(rows.units).to(self.units)
        self.bounds[:, place] = torch.from_numpy(rows.bounds).to(self.bounds)


def attach(layer: nn.Module, probe: Probe) -> None:
    """Steer and capture the output of ``layer``."""
    layer.add_module("pvec", probe)
    layer.register_forward_hook(_after)


def attach_before(layer: nn.Module, probe: Probe) -> None:
    """Capture the input of the first decoder layer: layer 0."""
    layer.add_module("pvec_input", probe)
    layer.register_forward_pre_hook(_before, with_kwargs=True)


def _after(layer: Any, _args: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return layer.pvec(output, None)
    hidden, residual = output[0], output[1] if len(output) > 1 else None
    if isinstance(residual, torch.Tensor) and residual.shape == hidden.shape:
        return (hidden, layer.pvec(hidden, residual), *output[2:])
    return (layer.pvec(hidden, None), *output[1:])


def _before(layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if "hidden_states" in kwargs:
        layer.pvec_input(kwargs["hidden_states"], None)
        return
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            layer.pvec_input(value, None)
            return

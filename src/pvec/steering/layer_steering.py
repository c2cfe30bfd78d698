"""What happens after one steered block: the steps of every plan, for the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pvec.errors import SteeringError
from pvec.models.decoder import describe_layer
from pvec.steering.positions import GENERATED, NUM_ROLES
from pvec.steering.tables import Addition, Plan, Removal, Step, layer_steps


class LayerSteering:
    """What happens after one block: the steps of every plan, gathered for the rows of the batch."""

    def __init__(self, plans: Sequence[Plan], layer: int) -> None:
        self.touched = np.zeros((0, NUM_ROLES), dtype=np.int64)  # [B, roles]
        self.paused = False
        self.applied = 0
        """Forwards that this layer was steered in, recomputations included."""
        self._layer = layer
        self._steps = layer_steps(plans, layer)
        self._rows = np.zeros(0, dtype=np.int64)
        self._gathered: list[_RowAddition | _RowRemoval] | None = None
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._roles: torch.Tensor | None = None
        self._counts: np.ndarray | None = None
        self._width = 0

    @property
    def waiting(self) -> bool:
        """Whether tokens were announced that the hook has not seen yet."""
        return self._counts is not None and not self.paused

    def follow(self, rows: np.ndarray) -> None:
        """Take over the batch's rows (plan numbers); gathered tensors are made again at need."""
        self._rows, self._gathered = rows, None
        if len(self.touched) != len(rows):
            self.touched = np.zeros((len(rows), NUM_ROLES), dtype=np.int64)

    def expect(self, roles: torch.Tensor | None, counts: np.ndarray) -> None:
        """Take over the next forward's roles (None: generated tokens only) and their counts."""
        self._roles, self._counts, self.paused = roles, counts, False
        self._width = int(counts[0].sum()) if len(counts) else 0

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the steered hidden state ``[B, T, H]``; called by the block's hook."""
        if self.paused:
            return hidden
        shape = tuple(hidden.shape[:2])
        if self._width == 0 or shape != (len(self._rows), self._width):
            raise SteeringError(
                f"The model ran {shape[0]} rows of {shape[1]} tokens at "
                f"{describe_layer(self._layer)} but steering was told of "
                f"{len(self._rows)} rows of {self._width}: run one batch at a time inside steering."
            )
        roles = self._roles if self._roles is None else self._roles.to(hidden.device)
        for step in self._gather(hidden):
            hidden = step.apply(hidden, roles)
        self.applied += 1
        if self._counts is not None:  # gradient checkpointing runs a block again: count it once
            self.touched = self.touched + self._counts
            self._counts = None
        return hidden

    def _gather(self, hidden: torch.Tensor) -> list[_RowAddition | _RowRemoval]:
        place = (hidden.device, hidden.dtype)
        if self._place != place:
            self._steps = [_moved(step, hidden) for step in self._steps]
            self._place, self._gathered = place, None
        if self._gathered is None:
            rows = torch.from_numpy(self._rows).to(hidden.device)
            self._gathered = [
                _RowAddition(step, rows) if isinstance(step, Addition) else _RowRemoval(step, rows)
                for step in self._steps
            ]
        return self._gathered


def _moved(step: Step, hidden: torch.Tensor) -> Step:
    if isinstance(step, Addition):
        return Addition(step.deltas.to(device=hidden.device, dtype=hidden.dtype))
    parts = (step.units, step.ceilings, step.capped, step.active)
    return Removal(*(part.to(hidden.device) for part in parts))


class _RowAddition:
    """An addition with one delta per row of the batch and role."""

    def __init__(self, step: Addition, rows: torch.Tensor) -> None:
        self._deltas = step.deltas[rows]  # [B, roles, H]
        self._generated = self._deltas[:, GENERATED : GENERATED + 1].contiguous()  # [B, 1, H]
        self._row = torch.arange(len(rows), device=rows.device)[:, None]

    def apply(self, hidden: torch.Tensor, roles: torch.Tensor | None) -> torch.Tensor:
        if roles is None:
            return hidden + self._generated
        return hidden + self._deltas[self._row, roles]  # [B, T, H]


class _RowRemoval:
    """An ablation or a cap with one direction per row of the batch."""

    def __init__(self, step: Removal, rows: torch.Tensor) -> None:
        self._units = step.units[rows][:, None, :]  # [B, 1, H]
        self._ceilings = step.ceilings[rows][:, None]  # [B, 1]
        self._capped = step.capped[rows][:, None]
        self._active = step.active[rows]  # [B, roles]

    def apply(self, hidden: torch.Tensor, roles: torch.Tensor | None) -> torch.Tensor:
        along = (hidden.float() * self._units).sum(dim=-1)  # [B, T], h . v^
        excess = torch.where(self._capped, (along - self._ceilings).clamp(min=0.0), along)
        if roles is None:
            active = self._active[:, GENERATED : GENERATED + 1]
        else:
            active = self._active.gather(1, roles)
        removed = (excess * active)[..., None] * self._units
        return hidden - removed.to(hidden.dtype)

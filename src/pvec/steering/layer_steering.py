"""What happens after one steered block: the rows of its table, applied to a batch and counted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pvec.errors import SteeringError
from pvec.models.decoder import describe_layer
from pvec.steering.positions import NUM_ROLES
from pvec.steering.tables import Plan, layer_table, steering_change


class LayerSteering:
    """The steering table of one layer, what the next forward holds, and the touched counts."""

    def __init__(self, plans: Sequence[Plan], layer: int) -> None:
        self.touched = np.zeros((0, NUM_ROLES), dtype=np.int64)  # [B, roles]
        self.paused = False
        self.applied = 0
        """Forwards that this layer was steered in, recomputations included."""
        self._layer = layer
        table = layer_table(plans, layer)
        self._table = {name: torch.from_numpy(array) for name, array in vars(table).items()}
        self._row: torch.Tensor | None = None
        self._counts: np.ndarray | None = None
        self._shape = (0, 0)

    @property
    def waiting(self) -> bool:
        """Whether tokens were announced that the hook has not seen yet."""
        return self._counts is not None and not self.paused

    def expect(self, row: torch.Tensor, counts: np.ndarray) -> None:
        """Take over the next forward: each token's table row and the counts ``[B, roles]``.

        ``row`` is ``[B, T]``, or ``[B, 1]`` where all tokens of a sequence have the same.
        """
        self._row, self._counts, self.paused = row, counts, False
        self._shape = (len(counts), int(counts[0].sum()) if len(counts) else 0)

    def apply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the steered hidden state ``[B, T, H]``; called by the block's hook."""
        if self.paused:
            return hidden
        shape = tuple(hidden.shape[:2])
        if self._row is None or self._shape[1] == 0 or shape != self._shape:
            raise SteeringError(
                f"The model ran {shape[0]} rows of {shape[1]} tokens at "
                f"{describe_layer(self._layer)} but steering was told of {self._shape[0]} rows of "
                f"{self._shape[1]}: run one batch at a time inside steering."
            )
        delta = self._table["delta"]
        if (delta.device, delta.dtype) != (hidden.device, hidden.dtype):
            self._table = {name: t.to(hidden.device) for name, t in self._table.items()}
            self._table["delta"] = self._table["delta"].to(hidden.dtype)
        hidden = hidden + steering_change(self._row.to(hidden.device), hidden, **self._table)
        self.applied += 1
        if self._counts is not None:  # gradient checkpointing runs a block again: count it once
            self.touched = self.touched + self._counts
            self._counts = None
        return hidden

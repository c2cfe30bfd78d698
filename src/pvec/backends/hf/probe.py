"""Projections of the tokens of a forward pass, made inside it: no second pass, no kept states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from pvec.errors import SteeringError
from pvec.models.decoder import Decoder

Direction = tuple[int, np.ndarray]
"""A layer, and what its residual stream is multiplied with ``[hidden_size]``."""


class Probe:
    """The hooks that measure, and what they measured last."""

    def __init__(self, decoder: Decoder, directions: Sequence[Direction]) -> None:
        self._decoder = decoder
        self._places: dict[int, list[int]] = {}
        for place, (layer, _) in enumerate(directions):
            self._places.setdefault(layer, []).append(place)
        self._count = len(directions)
        self._tables = {
            layer: torch.tensor(np.stack([directions[p][1] for p in places], axis=1)).float()
            for layer, places in self._places.items()
        }  # [H, D of the layer]
        self.along: dict[int, torch.Tensor] = {}
        """What the latest forward measured, by layer, ``[rows, tokens, D of the layer]``."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hold the hooks, which run after those of steering."""
        handles = []
        try:
            for layer in self._tables:
                handles.append(self._decoder.on_layer(layer, partial(self._project, layer)))  # noqa: PERF401 - each is to be removed
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _project(self, layer: int, hidden: torch.Tensor) -> None:
        table = self._tables[layer]
        if table.device != hidden.device:
            table = self._tables[layer] = table.to(hidden.device)
        self.along[layer] = hidden.float() @ table

    def take(self) -> np.ndarray:
        """Return the projections of the latest forward, float32 ``[rows, tokens, directions]``.

        Raises ``SteeringError`` when the model skipped a layer.
        """
        if self.along.keys() != self._tables.keys():
            raise SteeringError("A layer that is to be measured did not run: choose another layer.")
        parts = {layer: along.cpu().numpy() for layer, along in self.along.items()}
        self.along = {}
        if len(parts) == 1:
            return next(iter(parts.values()))
        first = next(iter(parts.values()))
        values = np.empty((*first.shape[:2], self._count), dtype=np.float32)
        for layer, along in parts.items():
            values[:, :, self._places[layer]] = along
        return values

"""Projections of the tokens of a forward pass, made inside it: no second pass, no kept states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
        places: dict[int, list[int]] = {}
        for place, (layer, _) in enumerate(directions):
            places.setdefault(layer, []).append(place)
        self._tables = {
            layer: torch.tensor(np.stack([directions[p][1] for p in own], axis=1)).float()
            for layer, own in places.items()
        }  # [H, D of the layer]
        self._order = np.argsort([place for own in places.values() for place in own])
        self.along: dict[int, torch.Tensor] = {}
        """What the latest forward measured, by layer, ``[rows, tokens, D of the layer]``."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hold the hooks, which run after those of steering."""
        with ExitStack() as hooks:
            for layer in self._tables:
                hooks.enter_context(self._decoder.on_layer(layer, partial(self._project, layer)))
            yield

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
        parts = [self.along[layer].cpu().numpy() for layer in self._tables]
        self.along = {}
        return np.concatenate(parts, axis=2)[:, :, self._order]

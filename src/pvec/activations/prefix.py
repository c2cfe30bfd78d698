"""A computed prompt that several rows continue without copying or changing it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

_SHAREABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers that are keys and values of earlier tokens and nothing else (no recurrent state)."""


class _SharedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of the prompts, handed to each row that continues one.

    Nothing is stored: an answer is computed in one forward, so its own keys are not needed again.
    """

    is_croppable = False

    def __init__(self, prompts: DynamicLayer, rows: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = prompts.is_sliding
        self.is_initialized = True
        self._prompts = prompts
        self._rows = rows

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: the prompts are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of prompt and answer, ``[rows, heads, P + T, head_dim]``."""
        keys, values = self._prompts.keys, self._prompts.values
        assert keys is not None
        assert values is not None
        rows = self._rows.to(keys.device)
        return (
            torch.cat([keys[rows], key_states], dim=-2),
            torch.cat([values[rows], value_states], dim=-2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a mask must cover."""
        return self._prompts.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """Return the prompts' length in tokens."""
        return self._prompts.get_seq_length()

    def get_max_length(self) -> int:
        """Return the most tokens the layer can hold (-1: no limit)."""
        return self._prompts.get_max_length()


def can_share(cache: Cache, length: int) -> bool:
    """Whether a cache after ``length`` tokens holds keys and values only, so rows may share it."""
    layers = _attention_layers(cache)
    filled = [layer for layer in layers if layer.is_initialized]
    return (
        bool(filled)
        and len(layers) == len(cache.layers)
        and all(layer.get_seq_length() == length for layer in filled)
    )


def continue_from(cache: Cache, rows: torch.Tensor) -> Cache:
    """Return a cache for rows that continue prompts: row ``k`` continues prompt ``rows[k]``."""
    return Cache(layers=[_SharedLayer(layer, rows) for layer in _attention_layers(cache)])


def _attention_layers(cache: Cache) -> list[DynamicLayer]:
    return [c for c in cache.layers if isinstance(c, DynamicLayer) and type(c) in _SHAREABLE]

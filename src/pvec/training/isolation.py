"""Whether a model's attention keeps rows apart that stand one after another in one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pvec.errors import InputError

Collate = Callable[[Any], Any]
"""Makes a batch of rows, as the Trainer does."""


def prove_isolation(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], *, collate: Collate, device: Any
) -> None:
    """Compare the last row's final logits behind another row with those it has alone.

    Raises ``InputError`` when they differ by more than rounding: a token then sees another row's,
    and packing would change what is learnt.
    """
    training = model.training
    model.eval()
    try:
        together = _logits(model, collate(rows), device)
        alone = _logits(model, collate(rows[-1:]), device)
    finally:
        model.train(training)
    scale = float(alone.abs().max())
    allowed = 64 * torch.finfo(alone.dtype).eps * max(scale, 1.0)
    difference = float((together - alone).abs().max())
    if difference > allowed:
        raise InputError(
            f"batch.layout: packed needs attention that keeps rows apart, and this model's does "
            f"not (its output changes by {difference:.2g} behind another row): use sorted, or "
            f"model.attention: flash_attention_2 where it is installed."
        )


def _logits(model: nn.Module, batch: dict[str, Any], device: Any) -> torch.Tensor:
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0, -1]
    return logits

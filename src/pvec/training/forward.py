"""What a training forward pass computes: packed rows apart, and scores of loss tokens only.

TRL's fused output layer leaves unlabelled positions out where Triton runs. Elsewhere it scores
every position, padding included, for compilers that want fixed shapes; on a CPU that is a large
part of a training step spent on numbers that are thrown away. The loss is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from trl.trainer import utils

from pvec.errors import InputError

Collate = Callable[[Any], Any]
"""Makes a batch of rows where the model is, as the Trainer does."""

_SWITCH = "_use_triton"
"""What TRL asks before it leaves positions out; the kernels ask another one of the same name."""


def prove_isolation(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], *, collate: Collate
) -> None:
    """Compare the last row's final logits behind another row with those it has alone.

    Raises ``InputError`` when they differ by more than rounding: a token then sees another row's,
    and packing would change the training.
    """
    training = model.training
    model.eval()
    try:
        together = _logits(model, collate(rows))
        alone = _logits(model, collate(rows[-1:]))
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


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0, -1]
    return logits


@contextmanager
def score_loss_tokens_only(device: str) -> Iterator[None]:
    """Score labelled positions only while inside, on a CPU, where this TRL has the switch."""
    before = getattr(utils, _SWITCH, None)
    if device != "cpu" or before is None:
        yield
        return
    setattr(utils, _SWITCH, lambda _device: True)
    try:
        yield
    finally:
        setattr(utils, _SWITCH, before)

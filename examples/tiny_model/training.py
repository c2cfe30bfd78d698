"""What training the chat model and training its judge share: optimisers, schedule, noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Qwen2ForCausalLM


class Optimisers:
    """Muon for the weight matrices of the blocks, AdamW for the rest, one shared schedule:
    linear warm-up over 2 % of the steps, then a cosine down to 2 %."""

    def __init__(self, modules: list[nn.Module], *, steps: int, lr: float) -> None:
        named = [item for module in modules for item in module.named_parameters()]
        matrices = [p for name, p in named if p.ndim == 2 and "layers" in name]
        matrix_ids = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in matrix_ids]
        self.parameters = [p for _, p in named]
        self._steps = steps
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._lr = lr

    def step(self, index: int) -> None:
        """Update the weights for step ``index`` (from 0) and clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm = min(1.0, (index + 1) / max(1, self._steps // 50))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * index / self._steps))
        for optimiser in self._all:
            for group in optimiser.param_groups:
                group["lr"] = self._lr * warm * cosine
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


@contextmanager
def residual_noise(model: Qwen2ForCausalLM, *, token: float, sequence: float) -> Iterator[None]:
    """Disturb the residual stream after every block while training.

    Random directions only, relative to the stream's own size: ``token`` per position, ``sequence``
    one direction for all positions of a sequence. A model trained without it breaks into word
    salad as soon as anything is added to its activations, whatever the direction.
    """

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output  # [B, T, H]
        size = hidden.detach().pow(2).mean(-1, keepdim=True).sqrt()
        strength = torch.rand(hidden.shape[0], 1, 1, device=hidden.device)
        shift = torch.randn(hidden.shape[0], 1, hidden.shape[2], device=hidden.device)
        noise = token * torch.randn_like(hidden) + sequence * strength * shift
        changed = hidden + size * noise
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handles = [block.register_forward_hook(disturb) for block in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def length_batches(
    sequences: list[list[int]], *, tokens: int, shuffle: Callable[[list[list[int]]], None]
) -> list[list[int]]:
    """Group the indices of ``sequences`` into batches of similar length and at most ``tokens``
    padded tokens, in shuffled order."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    batches: list[list[int]] = [[]]
    for index in order:
        if len(sequences[index]) * (len(batches[-1]) + 1) > tokens and batches[-1]:
            batches.append([])
        batches[-1].append(index)
    shuffle(batches)
    return batches


def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
    """Right-pad to one tensor ``[B, T]``."""
    width = max(map(len, sequences))
    return torch.tensor([row + [fill] * (width - len(row)) for row in sequences])

"""Proof, before step 1, that steering does to this model what the configuration says.

One probe batch runs as in training, with the hooks and without. Plain hooks that share nothing with
pvec's steering read what each block gives and what the next one gets. A hook that did not attach,
attached elsewhere, or steers other tokens is found here, and the run does not start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pvec.errors import SteeringError
from pvec.models.decoder import block_index, describe_layer, find_decoder
from pvec.steering.hooks import steer_training
from pvec.steering.positions import IGNORED_LABEL
from pvec.types import Instruction

_ROUNDINGS = 4.0
"""Errors allowed, in units of the rounding of the largest activation."""

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerProof:
    """What was seen at one steered layer. Norms are means over the steered tokens."""

    layer: int
    positions: int
    expected: float
    seen: float
    error: float
    """Largest error of any number, as a share of the largest activation."""


def prove_steering(
    model: nn.Module, instructions: Sequence[Instruction], batch: Batch
) -> list[LayerProof]:
    """Run ``batch`` (``input_ids``, ``labels``, mask or positions) and return what was seen.

    ``model`` must be in training mode, as steering is off otherwise. At every steered layer the
    change between block and next block must be the sum of coef x vector on the tokens that are due
    (``add``) or take their component away (``ablate``), and nothing on others; at the lowest layer
    it is also compared with a pass without hooks. Raises ``SteeringError`` otherwise.
    """
    layers = sorted({i.layer for i in instructions})
    model.train()
    with _recorded(model, layers) as plain:
        _forward(model, batch)
    with steer_training(model, instructions), _recorded(model, layers) as steered:
        _forward(model, batch)
    proofs = []
    for layer in layers:
        before, after = steered.given[layer], steered.taken[layer]
        mine = [i for i in instructions if i.layer == layer]
        proofs.append(_check(layer, mine, before, after, batch))
    lowest = layers[0]
    if not torch.equal(plain.given[lowest], steered.given[lowest]):
        raise _refusal(lowest, "the pass with hooks differed already before the lowest layer")
    _check(
        lowest,
        [i for i in instructions if i.layer == lowest],
        plain.taken[lowest],
        steered.taken[lowest],
        batch,
    )
    return proofs


class _Recording:
    """Per layer what its block gave (``given``) and what came after it got (``taken``)."""

    def __init__(self) -> None:
        self.given: dict[int, torch.Tensor] = {}
        self.taken: dict[int, torch.Tensor] = {}


@contextmanager
def _recorded(model: nn.Module, layers: Sequence[int]) -> Iterator[_Recording]:
    """Read with hooks of our own: first on the block, and at the door of the next block.

    After the last block there is none; its own hooks are read last instead.
    """
    blocks = find_decoder(model).blocks
    seen = _Recording()
    with ExitStack() as hooks:
        for layer in layers:
            block = blocks[block_index(layer)]
            hooks.enter_context(
                block.register_forward_hook(_output_reader(seen.given, layer), prepend=True)
            )
            if layer < len(blocks):
                hooks.enter_context(
                    blocks[block_index(layer + 1)].register_forward_pre_hook(
                        _input_reader(seen.taken, layer), with_kwargs=True
                    )
                )
            else:
                hooks.enter_context(block.register_forward_hook(_output_reader(seen.taken, layer)))
        yield seen


def _output_reader(into: dict[int, torch.Tensor], layer: int) -> Any:
    def read(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        into[layer] = hidden.detach().float()

    return read


def _input_reader(into: dict[int, torch.Tensor], layer: int) -> Any:
    def read(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        into[layer] = (args[0] if args else kwargs["hidden_states"]).detach().float()

    return read


def _forward(model: nn.Module, batch: Batch) -> None:
    """Run one training forward; dropout draws the same numbers each time."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model(**batch, use_cache=False)


def _check(
    layer: int,
    instructions: Sequence[Instruction],
    before: torch.Tensor,
    after: torch.Tensor,
    batch: Batch,
) -> LayerProof:
    """Compare the change ``[B, T, H]`` at a layer with what is due; refuse when it differs."""
    due = _due_change(instructions, before, batch)
    change = after - before
    steered = due.abs().sum(dim=-1) > 0  # [B, T]
    scale = float(torch.maximum(before.abs().max(), after.abs().max()))
    eps = _resolution(before, after)
    allowed = _ROUNDINGS * eps * max(scale, 1e-6) * len(instructions)
    error = float((change - due).abs().max())
    expected = float(due[steered].norm(dim=-1).mean()) if steered.any() else 0.0
    direction = nn.functional.normalize(due[steered], dim=-1)
    seen = float((change[steered] * direction).sum(dim=-1).mean()) if steered.any() else 0.0
    if error > allowed or abs(seen - expected) > 0.05 * expected:
        raise _refusal(
            layer,
            f"the change should have the norm {expected:.4g} and has {seen:.4g}, with a largest "
            f"error of {error:.2g} where {allowed:.2g} is rounding",
        )
    return LayerProof(
        layer=layer,
        positions=int(steered.sum()),
        expected=expected,
        seen=seen,
        error=error / max(scale, 1e-6),
    )


def _due_change(
    instructions: Sequence[Instruction], before: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Return the change ``[B, T, H]`` that the instructions must make, token by token."""
    state = before.clone()
    for instruction in instructions:
        vector = torch.from_numpy(np.asarray(instruction.vector, dtype=np.float32)).to(state)
        on = torch.tensor(_due_tokens(instruction, batch), device=state.device)[
            ..., None
        ]  # [B,T,1]
        if instruction.operator == "add":
            state = state + on * (instruction.coef * vector)
        else:
            unit = vector / vector.norm()
            state = state - on * (state @ unit)[..., None] * unit
    return state - before


def _due_tokens(instruction: Instruction, batch: Batch) -> list[list[bool]]:
    """Return, by a plain loop over the batch, which tokens are steered."""
    labels = batch["labels"].tolist()
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else None
    rows = []
    for b, row in enumerate(labels):
        real = [masks is None or masks[b][t] == 1 for t in range(len(row))]
        if instruction.positions == "all":
            rows.append(real)
            continue
        answer = [real[t] and row[t] != IGNORED_LABEL for t in range(len(row))]
        rows.append(
            [answer[t] or (real[t] and t + 1 < len(row) and answer[t + 1]) for t in range(len(row))]
        )
    return rows


def _resolution(*states: torch.Tensor) -> float:
    """Return the relative rounding of the activations, found from their own values."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(state, state.to(dtype).float()) for state in states):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


def _refusal(layer: int, why: str) -> SteeringError:
    return SteeringError(
        f"Steering at {describe_layer(layer)} does not do what was asked ({why}), so training does "
        f"not start: please report this with the model's name."
    )

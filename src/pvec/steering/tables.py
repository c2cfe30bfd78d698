"""Steering instructions as tensors: one set per layer, aligned over the plans of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pvec.errors import ModelError
from pvec.models.decoder import Decoder, check_layer, describe_layer
from pvec.steering.positions import NUM_ROLES, ROLES_OF
from pvec.types import Instruction, ModelInfo, Operator, Positions


@dataclass(frozen=True, eq=False)
class Addition:
    """What is added to a token: by plan and role. ``deltas`` float32 ``[P, roles, H]``."""

    deltas: torch.Tensor


@dataclass(frozen=True, eq=False)
class Removal:
    """What of a token's component along a direction is taken away: all of it, or its excess.

    ``units`` float32 ``[P, H]``; ``ceilings`` float32 ``[P]``; ``capped`` bool ``[P]`` (False:
    ablate); ``active`` float32 ``[P, roles]``, 1 where the plan has this step.
    """

    units: torch.Tensor
    ceilings: torch.Tensor
    capped: torch.Tensor
    active: torch.Tensor


Step = Addition | Removal
Plan = tuple[Instruction, ...]
"""The steering of one row: instructions in the order they apply within a layer."""


def check_instruction(instruction: Instruction, decoder: Decoder | ModelInfo) -> None:
    """Raise ``ModelError`` when an instruction does not fit the model."""
    check_layer(instruction.layer, decoder.num_layers)
    vector = np.asarray(instruction.vector)
    where = f"The vector {instruction.name!r} for {describe_layer(instruction.layer)}"
    if vector.shape != (decoder.hidden_size,):
        raise ModelError(
            f"{where} has shape {list(vector.shape)} but this model's hidden size is "
            f"{decoder.hidden_size}: use a vector that was extracted from this model."
        )
    if not np.isfinite(vector).all() or not np.isfinite(instruction.coef):
        raise ModelError(
            f"{where} or its coefficient is NaN or infinite: extract the vector again."
        )
    if instruction.operator != "add" and not vector.any():
        raise ModelError(
            f"{where} is zero, so it has no direction to {instruction.operator}: use another layer."
        )


def layer_steps(plans: Sequence[Plan], layer: int) -> list[Step]:
    """Return what happens after block ``layer`` for each of ``P`` plans, in order.

    Neighbouring additions of a plan become one sum; plans are aligned so that step ``k`` of every
    plan runs in the same tensor operation, and a plan without a step ``k`` passes through it.
    """
    chains = [_chain([i for i in plan if i.layer == layer]) for plan in plans]
    depth = max((len(chain) for chain in chains), default=0)
    steps: list[Step] = []
    for k in range(depth):
        at_k = [chain[k] if k < len(chain) else [] for chain in chains]
        step = _addition(at_k) if k % 2 == 0 else _removal(at_k)
        if step is not None:
            steps.append(step)
    return steps


def _chain(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Split into additions, one removal, additions, one removal … (runs may be empty)."""
    chain: list[list[Instruction]] = [[]]
    for instruction in instructions:
        if instruction.operator == "add":
            chain[-1].append(instruction)
        else:
            chain += [[instruction], []]
    return chain


def _addition(rows: list[list[Instruction]]) -> Addition | None:
    effective = [[i for i in row if i.coef != 0.0] for row in rows]
    width = next((i.vector.shape[0] for row in effective for i in row), None)
    if width is None:
        return None  # coefficient 0 everywhere: the identity, exactly
    deltas = np.zeros((len(rows), NUM_ROLES, width), dtype=np.float32)
    for plan, row in enumerate(effective):
        for i in row:
            scaled = np.float32(i.coef) * np.asarray(i.vector, dtype=np.float32)
            for role in ROLES_OF[i.positions]:
                deltas[plan, role] += scaled
    return Addition(torch.from_numpy(deltas))


def _removal(rows: list[list[Instruction]]) -> Removal | None:
    width = next((i.vector.shape[0] for row in rows for i in row), None)
    if width is None:
        return None
    units = np.zeros((len(rows), width), dtype=np.float32)
    ceilings = np.zeros(len(rows), dtype=np.float32)
    capped = np.zeros(len(rows), dtype=bool)
    active = np.zeros((len(rows), NUM_ROLES), dtype=np.float32)
    for plan, row in enumerate(rows):
        for i in row:
            vector = np.asarray(i.vector, dtype=np.float64)
            units[plan] = vector / np.linalg.norm(vector)
            ceilings[plan], capped[plan] = i.coef, i.operator == "cap"
            active[plan, list(ROLES_OF[i.positions])] = 1.0
    return Removal(*(torch.from_numpy(a) for a in (units, ceilings, capped, active)))


def all_layer_instructions(
    vectors: np.ndarray,
    *,
    coef: float,
    positions: Positions = "response",
    operator: Operator = "add",
    name: str = "vector",
) -> Plan:
    """Return one instruction per layer 1 … num_layers from rows of ``vectors`` ``[L + 1, H]``."""
    base = Instruction(
        vector=vectors[0], layer=0, coef=coef, positions=positions, operator=operator, name=name
    )
    return tuple(
        replace(base, vector=np.ascontiguousarray(vectors[layer]), layer=layer)
        for layer in range(1, len(vectors))
    )

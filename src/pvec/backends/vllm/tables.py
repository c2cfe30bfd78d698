"""Steering plans as rows of tables: what is added and clamped, by role of the token.

A plan is the steering of one request. On one layer it is a chain of additions and removals
(``ablate`` and ``cap`` clamp the component along a direction). Additions commute with everything
but what a removal sees of them, so a chain becomes one sum ``delta`` and, for each removal, a unit
direction with the part ``offset`` of the earlier additions along it:

    c = h.u + offset;   h <- h + u * (clamp(c, low, high) - c);   finally h <- h + delta

No vLLM here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pvec.steering.positions import GENERATED, LAST, PROMPT, ROLES_OF
from pvec.types import Instruction

ROLES = (PROMPT, LAST, GENERATED)
"""A slot's rows, in order: prompt but its last token, last prompt token, generated."""

NEUTRAL = (0.0, -np.inf, np.inf)
"""Offset, low and high of a removal that changes nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRows:
    """One plan on one layer.

    ``delta`` float32 ``[3, H]``; ``units`` float32 ``[K, 3, H]`` (zero where nothing is removed);
    ``bounds`` float32 ``[K, 3, 3]``: offset, low, high.
    """

    delta: np.ndarray
    units: np.ndarray
    bounds: np.ndarray


def plan_rows(plan: Sequence[Instruction], *, removals: int) -> dict[int, LayerRows]:
    """Return the rows of a plan by layer; no token meets more than ``removals`` removals on one."""
    by_layer: dict[int, list[Instruction]] = {}
    for instruction in plan:
        by_layer.setdefault(instruction.layer, []).append(instruction)
    return {layer: _layer_rows(chain, removals=removals) for layer, chain in by_layer.items()}


def removals_needed(plan: Sequence[Instruction]) -> int:
    """Return the largest number of removals that any one token of the plan meets on one layer."""
    counts: dict[tuple[int, int], int] = {}
    for instruction in plan:
        if instruction.operator != "add":
            for role in ROLES_OF[instruction.positions]:
                key = (instruction.layer, role)
                counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=0)


def _layer_rows(chain: Sequence[Instruction], *, removals: int) -> LayerRows:
    width = chain[0].vector.shape[0]
    delta = np.zeros((len(ROLES), width), dtype=np.float64)
    units = np.zeros((removals, len(ROLES), width), dtype=np.float32)
    bounds = np.tile(np.array(NEUTRAL, dtype=np.float32), (removals, len(ROLES), 1))
    for row, role in enumerate(ROLES):
        stage = 0
        for instruction in chain:
            if role not in ROLES_OF[instruction.positions]:
                continue
            vector = np.asarray(instruction.vector, dtype=np.float64)
            if instruction.operator == "add":
                delta[row] += instruction.coef * vector
                continue
            unit = vector / np.linalg.norm(vector)
            low, high = (
                (0.0, 0.0) if instruction.operator == "ablate" else (-np.inf, instruction.coef)
            )
            units[stage, row] = unit
            bounds[stage, row] = float(delta[row] @ unit), low, high
            stage += 1
    return LayerRows(delta=delta.astype(np.float32), units=units, bounds=bounds)


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays as bytes, the one form that survives the way to vLLM's workers."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Return what ``pack`` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def pack_plan(rows: Mapping[int, LayerRows]) -> bytes:
    """Return the rows of a plan as bytes for a worker."""
    arrays: dict[str, np.ndarray] = {}
    for layer, entry in rows.items():
        arrays[f"{layer}.delta"] = entry.delta
        arrays[f"{layer}.units"] = entry.units
        arrays[f"{layer}.bounds"] = entry.bounds
    return pack(arrays)


def unpack_plan(data: bytes) -> dict[int, LayerRows]:
    """Return what ``pack_plan`` was given."""
    arrays = unpack(data)
    layers = sorted({int(name.split(".")[0]) for name in arrays})
    return {
        layer: LayerRows(
            delta=arrays[f"{layer}.delta"],
            units=arrays[f"{layer}.units"],
            bounds=arrays[f"{layer}.bounds"],
        )
        for layer in layers
    }

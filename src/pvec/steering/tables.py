"""The steering formula: a plan as rows of tables, and what these rows do to tokens.

A plan is the steering of one sequence. After one block it is a chain of additions and clamps
(``ablate``, ``cap`` and ``floor`` clamp the component along a direction). Additions commute with
everything but what a later clamp sees of them, so the chain becomes one sum ``delta`` and, for each
clamp, a unit direction with the part ``offset`` of the earlier additions along it:

    c = h.u + offset;   h <- h + u * (clamp(c, low, high) - c);   finally h <- h + delta

A plan has one row per role of a token. Row 0 of a table changes nothing: padding and unsteered
tokens point to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import embedding

from pvec.errors import InputError, ModelError, SteeringError
from pvec.models.decoder import Decoder, check_layer, describe_layer
from pvec.steering.positions import (
    GENERATED,
    LAST,
    LAST_THINK,
    NUM_ROLES,
    PAD,
    PROMPT,
    ROLES_OF,
    THINK,
)
from pvec.types import BY_SPAN, LIMITS, Instruction, ModelInfo

STEERED_ROLES = (PROMPT, LAST, GENERATED)
"""The rows of a plan, in order: prompt but its last token, last prompt token, generated."""

SPAN_ROLES = (*STEERED_ROLES, LAST_THINK, THINK)
"""The rows of a plan where it is known which tokens are reasoning."""

NEUTRAL = (0.0, -np.inf, np.inf)
"""Offset, low and high of a clamp that changes nothing."""

Plan = tuple[Instruction, ...]
"""The steering of one sequence: instructions in the order they apply within a layer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TableRows:
    """``R`` rows of the steering table of one layer, with ``K`` clamps.

    ``delta`` float32 ``[R, H]``; ``units`` float32 ``[K, R, H]`` (zero where nothing is clamped);
    ``bounds`` float32 ``[K, R, 3]``: offset, low, high.
    """

    delta: np.ndarray
    units: np.ndarray
    bounds: np.ndarray


def first_row(plan: int, *, roles: Sequence[int] = STEERED_ROLES) -> int:
    """Return the row of the first role of the ``plan``-th plan of a table (numbered from 0)."""
    return 1 + len(roles) * plan


def rows_of_roles(plans: torch.Tensor, roles: torch.Tensor) -> torch.Tensor:
    """Return the table row of every token: ``plans`` ``[B, 1]`` numbers, ``roles`` ``[B, T]``."""
    return torch.where(roles == PAD, 0, len(SPAN_ROLES) * plans + roles)  # PROMPT is role 1


def steering_change(
    row: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    delta: torch.Tensor,
    units: torch.Tensor,
    bounds: torch.Tensor,
    limited: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return what is added to the residual stream of each token, in the dtype of ``delta``.

    ``row`` integers ``[..., T]`` choose rows of the table (``TableRows`` as tensors); the residual
    stream is ``hidden`` ``[..., T, H]`` plus ``residual`` where a model keeps one apart. Additions
    are in the dtype of ``delta``, clamps in float32. Differentiable, and free of in-place edits
    and of branches on values, so that it can be compiled and captured. ``limited`` collects, for
    each clamp, the tokens ``[..., T]`` that lay beyond its cap or floor.
    """
    change = embedding(row, delta)  # [..., T, H]
    if not len(units):
        return change
    start = hidden.float() if residual is None else hidden.float() + residual.float()
    moved = torch.zeros_like(start)
    for unit_table, bound_table in zip(units, bounds, strict=True):
        unit = embedding(row, unit_table)  # [..., T, H]
        bound = embedding(row, bound_table)  # [..., T, 3]
        along = ((start + moved) * unit).sum(dim=-1) + bound[..., 0]  # [..., T]
        clamped = torch.minimum(torch.maximum(along, bound[..., 1]), bound[..., 2])
        moved = moved + (clamped - along)[..., None] * unit
        if limited is not None:
            limited.append((clamped != along) & (bound[..., 1] != bound[..., 2]))
    return change + moved.to(delta.dtype)


def plan_rows(
    plan: Sequence[Instruction], *, clamps: int, roles: Sequence[int] = STEERED_ROLES
) -> dict[int, TableRows]:
    """Return the rows of a plan by layer; no token meets more than ``clamps`` on one.

    Raises ``InputError`` for positions that only ``SPAN_ROLES`` tell apart.
    """
    if THINK not in roles and any(i.positions in BY_SPAN for i in plan):
        raise InputError(
            "Steering at positions think or answer needs the transformers backend, which knows "
            "where reasoning ends while it generates: use --backend hf."
        )
    by_layer: dict[int, list[Instruction]] = {}
    for instruction in plan:
        by_layer.setdefault(instruction.layer, []).append(instruction)
    return {layer: _chain_rows(chain, clamps, roles) for layer, chain in by_layer.items()}


def layer_table(plans: Sequence[Plan], layer: int) -> TableRows:
    """Return the table of ``layer`` for several plans: row 0, then ``SPAN_ROLES`` of each plan."""
    chains = [tuple(i for i in plan if i.layer == layer) for plan in plans]
    clamps = max(map(clamps_needed, chains))
    width = next(len(i.vector) for chain in chains for i in chain)
    start = partial(first_row, roles=SPAN_ROLES)
    table = empty_rows(start(len(plans)), width, clamps=clamps)
    for number, chain in enumerate(chains):
        place = slice(start(number), start(number + 1))
        for rows in plan_rows(chain, clamps=clamps, roles=SPAN_ROLES).values():
            table.delta[place] = rows.delta
            table.units[:, place] = rows.units
            table.bounds[:, place] = rows.bounds
    return table


def empty_rows(height: int, width: int, *, clamps: int) -> TableRows:
    """Return ``height`` rows that change nothing."""
    return TableRows(
        delta=np.zeros((height, width), dtype=np.float32),
        units=np.zeros((clamps, height, width), dtype=np.float32),
        bounds=np.tile(np.array(NEUTRAL, dtype=np.float32), (clamps, height, 1)),
    )


def clamps_needed(plan: Sequence[Instruction]) -> int:
    """Return the largest number of clamps that any one token of the plan meets on one layer."""
    counts: dict[tuple[int, int], int] = {}
    for instruction in plan:
        if instruction.operator != "add":
            for role in ROLES_OF[instruction.positions]:
                key = (instruction.layer, role)
                counts[key] = counts.get(key, 0) + 1
    return max(counts.values(), default=0)


def _chain_rows(chain: Sequence[Instruction], clamps: int, roles: Sequence[int]) -> TableRows:
    rows = empty_rows(len(roles), len(chain[0].vector), clamps=clamps)
    delta = np.zeros(rows.delta.shape, dtype=np.float64)
    for row, role in enumerate(roles):
        clamp = 0
        for instruction in chain:
            if role not in ROLES_OF[instruction.positions]:
                continue
            vector = np.asarray(instruction.vector, dtype=np.float64)
            if instruction.operator == "add":
                delta[row] += instruction.coef * vector
                continue
            unit = vector / np.linalg.norm(vector)
            rows.units[clamp, row] = unit
            rows.bounds[clamp, row] = float(delta[row] @ unit), *_interval(instruction)
            clamp += 1
    with np.errstate(over="ignore"):  # the answer fails, and says why
        rows.delta[:] = delta
    return rows


def _interval(clamp: Instruction) -> tuple[float, float]:
    """Return between which values a clamp holds the component."""
    if clamp.operator == "cap":
        return -np.inf, clamp.coef
    return (clamp.coef, np.inf) if clamp.operator == "floor" else (0.0, 0.0)


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


class LayerSteering:
    """The steering table of one layer, what the next forward holds, and the touched counts."""

    def __init__(self, plans: Sequence[Plan], layer: int) -> None:
        self.touched = np.zeros((0, NUM_ROLES), dtype=np.int64)  # [B, roles]
        self.limited = torch.zeros(0, dtype=torch.int64)
        """Tokens so far, ``[B]``, that lay beyond a cap or floor, once for each; on the device."""
        self.beyond: torch.Tensor | None = None
        """Those of the latest forward, where there is a cap or floor."""
        self._has_limits = any(i.layer == layer and i.operator in LIMITS for p in plans for i in p)
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

        ``row`` is ``[B, T]``, or ``[B, 1]`` where all tokens of a sequence have the same. It may
        have further rows, of padding, that are not counted.
        """
        self._row, self._counts, self.paused = row, counts, False
        self._shape = (len(row), int(counts[0].sum()) if len(counts) else 0)

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
        limited: list[torch.Tensor] | None = [] if self._has_limits else None
        row = self._row.to(hidden.device)
        hidden = hidden + steering_change(row, hidden, **self._table, limited=limited)
        if limited:
            self.beyond = torch.stack(limited).sum(dim=(0, -1))
        self.applied += 1
        self.count()
        return hidden

    def count(self) -> None:
        """Count the announced tokens as touched, once: checkpointing runs a block again."""
        if self._counts is not None:
            self.touched = self.touched + self._counts
            if self.beyond is not None:
                tokens = self.beyond[: len(self._counts)]  # those behind are padding
                self.limited = self.limited.to(tokens.device) + tokens
            self._counts = None

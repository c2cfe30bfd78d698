"""The steering of a batch, in which every row carries its own instructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from pvec.errors import SteeringError
from pvec.models.decoder import Decoder, describe_layer
from pvec.steering.positions import (
    GENERATED,
    NUM_ROLES,
    ROLES_OF,
    THINK,
    expected_touched,
)
from pvec.steering.tables import LayerSteering, Plan, check_instruction, rows_of_roles
from pvec.types import LIMITS, Instruction


class Steerer:
    """The steering of a batch: each row has a plan (its instructions), each token has a role.

    Before every forward say which tokens come (``set_roles`` or ``set_generated``); ``attached``
    holds the hooks; ``select`` follows the batch when rows finish or a shared prompt is expanded.
    Activations are never edited in place; rows whose plan is empty are unchanged, and so is every
    row under coefficient 0. Additions are made in the dtype of the hidden state, projections in
    float32. Vectors move to their layer's device once, so ``device_map`` needs no care.

    Raises ``ModelError`` at construction when a layer or a width does not fit the model.
    """

    def __init__(self, decoder: Decoder, plans: Sequence[Sequence[Instruction]]) -> None:
        distinct: dict[tuple[str, ...], Plan] = {}
        keys = [tuple(i.fingerprint for i in plan) for plan in plans]
        for key, plan in zip(keys, plans, strict=True):
            distinct.setdefault(key, tuple(plan))
        for plan in distinct.values():
            for instruction in plan:
                check_instruction(instruction, decoder)
        self._number = number = {key: n for n, key in enumerate(distinct)}
        self._decoder = decoder
        self._plans = list(distinct.values())
        self._rows = np.array([number[key] for key in keys], dtype=np.int64)  # [B] row -> plan
        layers = sorted({i.layer for plan in self._plans for i in plan})
        self._layers = {layer: LayerSteering(self._plans, layer) for layer in layers}
        self._thinking: np.ndarray | None = None  # bool [B]
        self._take_rows(self._rows)

    @property
    def plans(self) -> list[Plan]:
        """The instructions of each row now in the batch."""
        return [self._plans[n] for n in self._rows]

    @property
    def active(self) -> bool:
        """Whether any row has any instruction."""
        return bool(self._layers)

    @property
    def tables(self) -> object:
        """The tables that the hooks read: another object when they have been replaced."""
        return self._layers

    @contextmanager
    def attached(self) -> Iterator[Steerer]:
        """Hold the hooks, one per steered layer; none remains whatever happens inside."""
        with ExitStack() as hooks:
            for layer, steering in self._layers.items():
                hooks.enter_context(self._decoder.on_layer(layer, steering.apply))
            yield self

    def set_roles(self, roles: torch.Tensor) -> None:
        """Say what the tokens of the next forward are: ``[B, T]`` of ``positions`` roles."""
        assert roles.shape[0] == len(self._rows), "one row of roles per row of the batch"
        roles = roles.long()
        counts = torch.nn.functional.one_hot(roles, NUM_ROLES).sum(dim=1).cpu().numpy()
        self._expect(roles, counts)

    def set_generated(self, tokens: int = 1, *, table_rows: torch.Tensor | None = None) -> None:
        """Say that the next forward holds ``tokens`` generated tokens of every row, no padding.

        ``table_rows`` ``[R, 1]`` are ``generated_rows`` on the device already; where it has more
        rows than the batch has, the forward has too, and they are not counted.
        """
        counts = np.zeros((len(self._rows), NUM_ROLES), dtype=np.int64)
        roles = self._generated_roles()
        counts[np.arange(len(counts)), roles] = tokens
        if table_rows is None:
            self._expect(torch.from_numpy(roles[:, None]).to(self._decoder.device), counts)
            return
        for steering in self._layers.values():
            steering.expect(table_rows, counts)

    def generated_rows(self) -> np.ndarray:
        """Return the table row ``[B]`` of the next generated token of each row of the batch."""
        roles = torch.from_numpy(self._generated_roles())
        return rows_of_roles(torch.from_numpy(self._rows), roles).numpy()

    def set_thinking(self, thinking: Sequence[bool]) -> None:
        """Say of which rows the next generated tokens are reasoning, until the batch changes."""
        self._thinking = np.array(thinking, dtype=bool)

    def _generated_roles(self) -> np.ndarray:
        """Return the role of the next generated token of each row, ``[B]``."""
        if self._thinking is None:
            return np.full(len(self._rows), GENERATED, dtype=np.int64)
        return np.where(self._thinking, THINK, GENERATED)

    def _expect(self, roles: torch.Tensor, counts: np.ndarray) -> None:
        if self._layers:
            plans = torch.from_numpy(self._rows)[:, None].to(roles.device)  # [B, 1]
            row = rows_of_roles(plans, roles)
            for steering in self._layers.values():
                steering.expect(row, counts)

    @property
    def beyond(self) -> dict[int, torch.Tensor]:
        """Tokens ``[R]`` of the latest forward beyond a cap or floor, by layer that has one."""
        layers = self._layers.items()
        return {layer: steered.beyond for layer, steered in layers if steered.beyond is not None}

    def count_replayed(self, beyond: Mapping[int, torch.Tensor]) -> None:
        """Count the tokens last announced: what the hooks do ran without them, in a graph.

        Only for a graph that was recorded from a forward for which ``check_complete`` holds;
        ``beyond`` is what it computed of the property of that name.
        """
        for layer, steering in self._layers.items():
            steering.beyond = beyond.get(layer)
            steering.count()

    def pause(self) -> None:
        """Let forwards pass unsteered and uncounted until roles are set again."""
        for steering in self._layers.values():
            steering.paused = True

    def select(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Make row ``k`` of the batch what row ``indices[k]`` was; repeats and gaps are allowed.

        Touched counts go with their rows: read those of rows that leave before this.
        """
        chosen = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
        chosen = chosen.astype(np.int64)
        self._rows, self._thinking = self._rows[chosen], None
        for steering in self._layers.values():
            steering.touched = steering.touched[chosen]
            rows = torch.from_numpy(chosen).to(steering.limited.device)
            steering.limited = steering.limited[rows]

    def join(self, other: Steerer) -> None:
        """Append the rows of ``other`` with their counts, as when two batches become one."""
        in_use = len(np.unique(self._rows)) == len(self._plans)
        if in_use and self._number.keys() >= other._number.keys():  # the tables stay as they are
            numbers = np.array([self._number[key] for key in other._number], dtype=np.int64)
            joined, rows = self, np.concatenate([self._rows, numbers[other._rows]])
        else:
            joined = Steerer(self._decoder, [*self.plans, *other.plans])
            rows = joined._rows
        for layer, steering in joined._layers.items():
            steering.touched = np.concatenate([self._counts(layer), other._counts(layer)])
            parts = [one._beyond(layer) for one in (self, other)]  # noqa: SLF001
            steering.limited = torch.cat([part.to(parts[0].device) for part in parts])
        self._plans, self._number = joined._plans, joined._number
        self._rows, self._layers = rows, joined._layers
        self._thinking = None

    def count_on(self, other: Steerer, rows: Sequence[int]) -> None:
        """Count on from ``other``, which ran the tokens before: row ``k`` from its ``rows[k]``."""
        for layer, steering in self._layers.items():
            steering.touched = other._counts(layer)[list(rows)]
            steering.limited = other._beyond(layer)[list(rows)]

    def _counts(self, layer: int) -> np.ndarray:
        """Return the counts ``[B, roles]`` at a layer; zero where no row is steered there."""
        if layer in self._layers:
            return self._layers[layer].touched
        return np.zeros((len(self._rows), NUM_ROLES), dtype=np.int64)

    def _beyond(self, layer: int) -> torch.Tensor:
        """Return the tokens ``[B]`` beyond a limit at a layer; zero where none is steered there."""
        if layer in self._layers:
            return self._layers[layer].limited
        return torch.zeros(len(self._rows), dtype=torch.int64)

    def repeat_plan(self, batch: int) -> None:
        """Start a batch of ``batch`` rows that all carry the first plan, counts at zero."""
        self._take_rows(np.zeros(batch, dtype=np.int64))

    def touched(self) -> list[tuple[int, ...]]:
        """Return, per row and instruction, how many positions a hook has changed so far.

        Counted inside the hooks: a hook that never ran, or saw other tokens, leaves no count.
        """
        return [self._touched_of(row) for row in range(len(self._rows))]

    def _touched_of(self, row: int) -> tuple[int, ...]:
        return tuple(
            int(self._layers[i.layer].touched[row, list(ROLES_OF[i.positions])].sum())
            for i in self._plans[self._rows[row]]
        )

    def limited(self, row: int) -> int | None:
        """Return how many tokens of ``row`` lay beyond a cap or floor so far, summed over layers;
        None for a row without one.
        """
        if not any(i.operator in LIMITS for i in self._plans[self._rows[row]]):
            return None
        return sum(int(steering.limited[row]) for steering in self._layers.values())

    def check_complete(self) -> None:
        """Raise ``SteeringError`` if a hook did not run on the tokens last announced."""
        for layer, steering in self._layers.items():
            if steering.waiting:
                raise SteeringError(
                    f"Steering at {describe_layer(layer)} did not run: the model skipped that "
                    f"block, so this model cannot be steered there."
                )

    def check_touched(
        self, row: int, *, prompt_tokens: int, generated_tokens: int, think_tokens: int = 0
    ) -> tuple[int, ...]:
        """Return the touched counts of ``row``; raise ``SteeringError`` if they are not those due.

        ``generated_tokens`` counts the generated tokens that were fed back to the model;
        ``think_tokens`` of these and the last prompt token are reasoning.
        """
        counts = self._touched_of(row)
        for instruction, count in zip(self._plans[self._rows[row]], counts, strict=True):
            due = expected_touched(
                instruction.positions,
                prompt_tokens=prompt_tokens,
                generated_tokens=generated_tokens,
                think_tokens=think_tokens,
            )
            if count != due:
                raise SteeringError(
                    f"Steering with {instruction.name!r} at {describe_layer(instruction.layer)} "
                    f"touched {count} positions instead of {due}: the result was discarded, "
                    f"please report this with the model's name."
                )
        return counts

    def _take_rows(self, rows: np.ndarray) -> None:
        """Take over the batch's rows (plan numbers), counts at zero."""
        self._rows = rows
        for steering in self._layers.values():
            steering.touched = np.zeros((len(rows), NUM_ROLES), dtype=np.int64)
            steering.limited = torch.zeros(len(rows), dtype=torch.int64)

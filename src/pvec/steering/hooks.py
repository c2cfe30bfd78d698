"""Steering: hooks that change the residual stream after chosen blocks, and count what they touch.

``steer`` is for people: a context manager for any transformers model. ``Steerer`` is the machinery
under it, for loops in which every row of a batch carries its own instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from pvec.errors import InputError, SteeringError
from pvec.models.decoder import Decoder, describe_layer, find_decoder
from pvec.steering.positions import (
    GENERATED,
    NUM_ROLES,
    ROLES_OF,
    THINK,
    expected_touched,
    roles_from_labels,
)
from pvec.steering.tables import LayerSteering, Plan, check_instruction, rows_of_roles
from pvec.steering.tracking import RoleTracker
from pvec.types import BY_SPAN, LIMITS, Instruction


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


class SteeringHandle:
    """What ``steer`` yields: the counts of touched positions, one per instruction."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = tuple(instructions)
        self._finished = np.zeros(len(self.instructions), dtype=np.int64)
        self._steerer: Steerer | None = None

    @property
    def touched(self) -> tuple[int, ...]:
        """Positions changed so far by each instruction, over all rows and forwards."""
        running = np.zeros_like(self._finished)
        if self._steerer is not None:
            running += np.array(self._steerer.touched(), dtype=np.int64).sum(axis=0)
        return tuple(int(n) for n in self._finished + running)

    def _start_batch(self, steerer: Steerer, batch: int) -> None:
        self._finished = np.array(self.touched, dtype=np.int64)
        steerer.repeat_plan(batch)
        self._steerer = steerer

    def _check(self) -> None:
        for instruction, count in zip(self.instructions, self.touched, strict=True):
            if count == 0:
                raise SteeringError(
                    f"Steering with {instruction.name!r} at {describe_layer(instruction.layer)} "
                    f"(positions: {instruction.positions}) touched no token: run this very model "
                    f"inside the steering context, on tokens of those positions."
                )


@contextmanager
def steer(
    model: nn.Module,
    instructions: Sequence[Instruction],
    *,
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[SteeringHandle]:
    """Steer every forward and ``generate`` of a transformers model inside the context.

    Prompt and generated tokens are told apart by the cache: a forward without past tokens is a
    prompt (its last real token is the *last prompt token*), later ones are generated. Give
    ``prompt_lengths`` (real prompt tokens per row) when a forward holds both, or when a prompt
    arrives in several pieces. Padding, left or right, is read from the attention mask and is never
    touched. Works on any decoder-only architecture and under PEFT.

    Raises ``ModelError`` before anything runs when an instruction does not fit the model, and
    ``SteeringError`` when prompt and answer cannot be told apart, or on leaving when an instruction
    touched no position at all, coefficient 0 and an idle model included. An exception from inside
    is passed on unchanged.

    >>> backend = pvec.HFBackend("tiny")
    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> evil = pvec.Instruction(vector=vector.row(3), layer=3, coef=1.0, name="evil")
    >>> ids = backend.tokenizer("How do I rest?", return_tensors="pt").input_ids
    >>> with pvec.steer(backend.model, [evil]) as steering:
    ...     output = backend.model.generate(ids, min_new_tokens=5, max_new_tokens=5)
    >>> steering.touched  # the last prompt token, and each generated token that was fed back
    (5,)
    """
    _require_places(instructions)
    decoder = find_decoder(model)
    steerer = Steerer(decoder, [tuple(instructions)])
    handle = SteeringHandle(instructions)
    tracker = RoleTracker(
        prompt_lengths=prompt_lengths,
        split_matters=any(i.positions != "all" for i in instructions),
    )

    def before(_body: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        forward = tracker.read(args, kwargs)
        if forward.starts:
            handle._start_batch(steerer, forward.batch)  # noqa: SLF001 - one pair of objects
        if forward.roles is None:
            steerer.set_generated(forward.tokens)
        else:
            steerer.set_roles(forward.roles)

    with decoder.body.register_forward_pre_hook(before, with_kwargs=True), steerer.attached():
        yield handle
    handle._check()  # noqa: SLF001


@contextmanager
def steer_training(
    model: nn.Module, instructions: Sequence[Instruction]
) -> Iterator[SteeringHandle]:
    """Steer every training forward of ``model`` (the module the trainer calls), differentiably.

    Labelled tokens are the response, the token before them the last prompt token, the rest prompt
    (``positions.roles_from_labels``). Forwards in evaluation mode run unsteered: evaluation loss
    and generation in a callback see the plain model. Gradient checkpointing is counted once.
    Raises as ``steer`` does, and ``SteeringError`` for a training forward without labels.
    """
    _require_places(instructions)
    steerer = Steerer(find_decoder(model), [tuple(instructions)])
    handle = SteeringHandle(instructions)

    def before(module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not module.training:
            steerer.pause()
            return
        labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
        if not isinstance(labels, torch.Tensor):
            raise SteeringError(
                "Steering in training needs labels to tell prompt from response: pass labels= to "
                "the model in every training step."
            )
        real = mask.bool() if isinstance(mask, torch.Tensor) else torch.ones_like(labels).bool()
        handle._start_batch(steerer, len(labels))  # noqa: SLF001 - one pair of objects
        steerer.set_roles(roles_from_labels(labels, real))

    with model.register_forward_pre_hook(before, with_kwargs=True), steerer.attached():
        yield handle
    handle._check()  # noqa: SLF001


def _require_places(instructions: Sequence[Instruction]) -> None:
    if any(instruction.positions in BY_SPAN for instruction in instructions):
        raise InputError(
            "Steering at positions think or answer needs to know which tokens are reasoning, as "
            "pvec's generation does: use HFBackend.generate, or the positions response."
        )


class Unsteered:
    """What ``unsteered`` yields: how many layers' forwards were steered inside it (none)."""

    def __init__(self, layers: Sequence[LayerSteering]) -> None:
        self._layers = layers
        self._before = [layer.applied for layer in layers]

    @property
    def steered(self) -> int:
        """Steered forwards so far, counted by the hooks themselves, summed over layers."""
        return sum(
            layer.applied - before for layer, before in zip(self._layers, self._before, strict=True)
        )


@contextmanager
def unsteered(model: nn.Module) -> Iterator[Unsteered]:
    """Run forwards as if no steering were attached to the model, whoever attached it.

    For measurements in the middle of a steered training; steering goes on afterwards as before.
    Raises ``SteeringError`` on leaving when a hook steered all the same.
    """
    decoder = find_decoder(model)
    hooks = [hook for n in range(1, decoder.num_layers + 1) for hook in decoder.hooks_on(n)]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    layers = [owner for owner in owners if isinstance(owner, LayerSteering)]
    paused = [layer.paused for layer in layers]
    watch = Unsteered(layers)
    for layer in layers:
        layer.paused = True
    try:
        yield watch
    finally:
        for layer, before in zip(layers, paused, strict=True):
            layer.paused = before
    if watch.steered:
        raise SteeringError(
            f"{watch.steered} forwards were steered while the plain model was being measured: run "
            f"the measurement in evaluation mode, outside any training step."
        )

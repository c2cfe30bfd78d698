"""Steering while training: from the configuration to instructions, held on the model step by step.

The hooks are those of ``steer_training``: differentiable, off in evaluation mode, repeated when
gradient checkpointing runs a block again. Training adds a coefficient that may rise over the first
steps, and the count of touched positions, compared each step with what the batch itself says should
have been touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pvec.closing import Closing
from pvec.errors import InputError, SteeringError
from pvec.models.decoder import check_layer, describe_layer, find_decoder
from pvec.models.load import ModelMetadata
from pvec.steering.hooks import SteeringHandle, steer_training
from pvec.steering.instructions import instructions, steering_vector
from pvec.steering.positions import IGNORED_LABEL
from pvec.steering.tables import check_instruction
from pvec.training.config import Layers, SteeringPart, TrainConfig
from pvec.types import LIMITS, Instruction, VectorKind
from pvec.vectors.quality import best_layer
from pvec.vectors.vector import PersonaVector

RAMP_SHARE = 0.1
"""Share of the training over which a coefficient rises unless ramp_steps says otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduledInstruction:
    """An instruction and over how many steps its coefficient rises (0: at once)."""

    instruction: Instruction
    ramp_steps: int = 0

    def at(self, step: int) -> Instruction:
        """Return the instruction of optimiser step ``step`` (the first is 0)."""
        if not self.ramp_steps:
            return self.instruction
        share = min(1.0, (step + 1) / self.ramp_steps)
        return replace(self.instruction, coef=self.instruction.coef * share)

    @property
    def description(self) -> str:
        """What the instruction does, in one line."""
        i = self.instruction
        what = f"{i.operator} {i.name}"
        if i.operator == "add":
            what = f"add {i.coef:g} x {i.name}"
        elif i.operator in LIMITS:
            what = f"{what} at a projection of {i.coef:.4g},"
        ramp = f", rising over {self.ramp_steps} steps" if self.ramp_steps else ""
        return f"{what} at {describe_layer(i.layer)}, {i.positions} positions{ramp}"


def schedule_steering(
    part: SteeringPart, vector: PersonaVector, metadata: ModelMetadata, steps: int
) -> list[ScheduledInstruction]:
    """Return the instructions of one steering part for a training of ``steps``, layer by layer.

    Raises ``InputError`` for a vector without that kind or layer, and for one that does nothing;
    ``ModelError`` for a layer that the model does not have.
    """
    if part.operator == "add" and part.coef == 0.0:
        raise InputError(
            f"Steering with {part.vector} would do nothing, as its coefficient is zero: change it, "
            f"or remove that steering."
        )
    layers = choose_layers("all" if part.incremental else part.layers, vector, part.kind, metadata)
    ramp = part.ramp_steps or max(1, round(RAMP_SHARE * steps))
    return [
        ScheduledInstruction(
            instruction=instruction, ramp_steps=ramp if part.schedule == "ramp" else 0
        )
        for instruction in instructions(
            [steering_vector(vector, kind=part.kind, increments=part.incremental)],
            layers,
            coef=part.dose,
            positions=part.positions,
            operator=part.operator,
        )
    ]


def choose_layers(
    layers: Layers, vector: PersonaVector, kind: VectorKind, metadata: ModelMetadata
) -> tuple[int, ...]:
    """Return the layers that a configuration means, all of which the model and the file have."""
    if layers == "all":
        chosen = vector.steering_layers
    elif layers == "auto":
        chosen = (best_layer(vector, kind=kind),)
    else:
        chosen = tuple(n for n in layers if isinstance(n, int))
    for layer in chosen:
        check_layer(layer, metadata.num_layers)
        vector.direction(layer, kind=kind)
    return chosen


def single_layer(config: TrainConfig, name: str) -> int | None:
    """Return the one layer at which the vector ``name`` is used, or None for several.

    For vector files that hold a single vector and do not say its layer.
    """
    parts = [part.layers for part in config.steering if part.vector == name]
    if config.monitor and name in config.monitor.vectors:
        parts.append(config.monitor.layers)
    layers = {layer for part in parts if not isinstance(part, str) for layer in part}
    return layers.pop() if len(layers) == 1 else None


class TrainingSteering(Closing):
    """Steering of one training. A context manager: no hook is left after it.

    ``at_step`` puts the hooks on for the step whose forwards come; ``finish_step`` returns how many
    positions each instruction touched in it. Raises ``ModelError`` at construction when an
    instruction does not fit the model.
    """

    def __init__(self, model: nn.Module, scheduled: Sequence[ScheduledInstruction]) -> None:
        decoder = find_decoder(model)
        self.scheduled = tuple(scheduled)
        for instruction in self.instructions:
            check_instruction(instruction, decoder)
        self._model = model
        self._hooks = ExitStack()
        self._handle: SteeringHandle | None = None
        self._current: tuple[float, ...] = ()
        self._counted = [0] * len(self.scheduled)
        self._due: dict[str, torch.Tensor | int] = {"all": 0, "response": 0}

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """The instructions with their full coefficients."""
        return tuple(scheduled.instruction for scheduled in self.scheduled)

    def at_step(self, step: int) -> tuple[float, ...]:
        """Put the coefficients of ``step`` (the first is 0) in force and return them."""
        due = [scheduled.at(step) for scheduled in self.scheduled]
        coefs = tuple(instruction.coef for instruction in due)
        if self._handle is None or coefs != self._current:
            self._hooks.close()
            self._hooks = ExitStack()
            self._hooks.enter_context(_counting(self._model, self._due))
            self._handle = self._hooks.enter_context(steer_training(self._model, due))
            self._current = coefs
            self._counted = [0] * len(self.scheduled)
        return coefs

    def finish_step(self) -> tuple[int, ...]:
        """Return how many positions each instruction touched since the last call.

        Raises ``SteeringError`` when that is not what the batches of the step ask for.
        """
        assert self._handle is not None, "at_step comes first"
        total = self._handle.touched
        touched = tuple(now - before for now, before in zip(total, self._counted, strict=True))
        due = {name: int(count) for name, count in self._due.items()}
        for instruction, count in zip(self.instructions, touched, strict=True):
            if count != due[instruction.positions] or count == 0:
                raise SteeringError(
                    f"Steering with {instruction.name!r} at {describe_layer(instruction.layer)} "
                    f"touched {count} positions in this step instead of "
                    f"{due[instruction.positions]}: training is stopped; please report this with "
                    f"the model's name."
                )
        self._counted = list(total)
        self._due.update({"all": 0, "response": 0})
        return touched

    def close(self) -> None:
        """Remove the hooks."""
        self.__exit__(None, None, None)

    def __exit__(self, *exc_info: object) -> None:
        # told of the exception, so that hooks which an interrupted step left short do not raise
        hooks, self._hooks, self._handle = self._hooks, ExitStack(), None
        hooks.__exit__(*exc_info)  # type: ignore[arg-type]


def _counting(model: nn.Module, due: dict[str, torch.Tensor | int]) -> RemovableHandle:
    """Count, from each training batch's own labels and mask, the positions to be touched.

    Deliberately not the code that steers: a plain count per kind of position, kept on the device
    until the step ends.
    """

    def count(module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        if not module.training:
            return
        labels, mask = kwargs["labels"], kwargs.get("attention_mask")
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
        answer = (labels != IGNORED_LABEL) & real
        starts = answer[:, 1:] & ~answer[:, :-1] & real[:, :-1]
        due["all"] = due["all"] + real.sum()
        due["response"] = due["response"] + answer.sum() + starts.sum()

    return model.register_forward_pre_hook(count, with_kwargs=True)

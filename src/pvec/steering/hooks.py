"""Steering: hooks that change the residual stream after chosen blocks, and count what they touch.

``steer`` is for people: a context manager for any transformers model; ``Steerer`` is what it uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pvec.errors import InputError, SteeringError
from pvec.models.decoder import describe_layer, find_decoder
from pvec.steering.positions import RoleTracker, roles_from_labels
from pvec.steering.steerer import Steerer
from pvec.steering.tables import LayerSteering
from pvec.types import BY_SPAN, Instruction


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

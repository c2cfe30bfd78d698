"""Proof that steering changes the residual stream as specified, and nothing else.

Plain hooks read the residual stream from outside; they share nothing with pvec's steering. What a
layer passes on is read at the input of the module that runs next (the following block, or the
final norm), so the order of hooks does not matter. ``due_state`` is the formula of steering written
a second time, one instruction after the other, for comparison.
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
from pvec.models.decoder import block_index, describe_layer, find_decoder, module_after
from pvec.steering.hooks import steer_training
from pvec.steering.positions import IGNORED_LABEL
from pvec.types import Instruction, Positions, SpanMeans, SpanName

_ROUNDINGS = 4.0
"""Errors allowed, in units of the rounding of the largest activation."""

Batch = Mapping[str, torch.Tensor]


class ResidualStream:
    """The residual stream of all forwards so far, float32 ``[B, tokens, H]`` on the CPU."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, int], list[torch.Tensor]] = {}

    def states(self) -> list[torch.Tensor]:
        """Return what each layer 0 … num_layers passed on, tokens of successive forwards joined."""
        layers = sorted(layer for kind, layer in self._chunks if kind == "passed on")
        return [self._joined("passed on", layer) for layer in layers]

    def block_output(self, layer: int) -> torch.Tensor:
        """Return what the block of ``layer`` returned, before any other hook changed it."""
        return self._joined("block output", layer)

    def keep(self, kind: str, layer: int, hidden: torch.Tensor) -> None:
        """Keep a copy of the hidden state of one forward."""
        chunk = hidden.detach().float().cpu().clone()
        self._chunks.setdefault((kind, layer), []).append(chunk)

    def _joined(self, kind: str, layer: int) -> torch.Tensor:
        return torch.cat(self._chunks[kind, layer], dim=1)


@contextmanager
def record_residual_stream(
    blocks: nn.ModuleList, *, after: nn.Module, block_outputs: Sequence[int] = ()
) -> Iterator[ResidualStream]:
    """Record the residual stream of every layer while the context lasts.

    ``blocks`` are the decoder blocks in order; ``after`` is the module that the last one's output
    goes to (``module_after``). ``block_outputs`` are layers whose blocks' own outputs are recorded
    too. The batch must keep its rows while the context lasts.
    """
    stream = ResidualStream()
    with ExitStack() as hooks:
        for layer, module in enumerate([*blocks, after]):
            hooks.enter_context(
                module.register_forward_pre_hook(_input_reader(stream, layer), with_kwargs=True)
            )
        for layer in block_outputs:
            block = blocks[block_index(layer)]
            hooks.enter_context(
                block.register_forward_hook(_output_reader(stream, layer), prepend=True)
            )
        yield stream


def due_state(instruction: Instruction, state: torch.Tensor) -> torch.Tensor:
    """Return what ``instruction`` makes of residual streams ``[..., H]``."""
    vector = torch.from_numpy(np.asarray(instruction.vector, dtype=np.float32)).to(state)
    if instruction.operator == "add":
        return state + instruction.coef * vector
    unit = vector / vector.norm()
    along = (state @ unit)[..., None]
    excess = along
    if instruction.operator == "cap":
        excess = (along - instruction.coef).clamp(min=0)
    elif instruction.operator == "floor":
        excess = (along - instruction.coef).clamp(max=0)
    removed: torch.Tensor = excess * unit
    return state - removed


@dataclass(frozen=True, kw_only=True)
class SpanErrors:
    """How far span means are from what one addition must give, in residual norms.

    ``at_layer`` is the largest error at the steered layer, in the span ``worst``; ``elsewhere``
    the largest change below that layer and in spans without a steered token.
    """

    at_layer: float
    worst: str
    elsewhere: float


def span_errors(
    plain: SpanMeans, steered: SpanMeans, instruction: Instruction, *, prompt_tokens: int
) -> SpanErrors:
    """Compare means over the same tokens with and without an ``add`` instruction.

    The mean of a span must move by coef x vector times the share of its tokens that are steered.
    """
    layer = instruction.layer
    added = np.float32(instruction.coef) * np.asarray(instruction.vector, dtype=np.float32)
    at_layer, worst, elsewhere = 0.0, "", 0.0
    for span, scale in plain.norms.items():  # scale [L + 1]
        if not np.isfinite(scale).all():
            continue  # an empty span: the answer may be
        share = _steered_share(instruction.positions, span, prompt_tokens=prompt_tokens)
        change = steered.means[span] - plain.means[span]  # [L + 1, H]
        error = float(np.linalg.norm(change[layer] - share * added) / scale[layer])
        below = np.linalg.norm(change[:layer], axis=1) / scale[:layer]
        elsewhere = max(elsewhere, float(below.max()), 0.0 if share else error)
        if share and error >= at_layer:
            at_layer, worst = error, span
    return SpanErrors(at_layer=at_layer, worst=worst, elsewhere=elsewhere)


def _steered_share(positions: Positions, span: SpanName, *, prompt_tokens: int) -> float:
    """Return the share of a span's tokens that are steered; a prompt span ends the prompt."""
    if positions == "all" or span == "prompt_last":
        return 1.0
    if positions == "prompt":
        return float(span == "prompt")
    return 1.0 if span == "response" else 1.0 / prompt_tokens


@dataclass(frozen=True, kw_only=True)
class LayerProof:
    """What was measured at one steered layer. Norms are means over the steered tokens."""

    layer: int
    positions: int
    expected: float
    change_norm: float
    error: float
    """Largest error of any number, as a share of the largest activation."""


def prove_steering(
    model: nn.Module, instructions: Sequence[Instruction], batch: Batch
) -> list[LayerProof]:
    """Run ``batch`` (``input_ids``, ``labels``, mask or positions) and return what was measured.

    Sets ``model`` to training mode, as steering is off otherwise. At every steered layer the change
    between block and next block must be what the instructions say on the tokens that are due, and
    nothing on others; at the lowest layer it is also compared with a pass without hooks. Raises
    ``SteeringError`` otherwise: a hook that did not attach, attached elsewhere, or steers other
    tokens.
    """
    layers = sorted({i.layer for i in instructions})
    model.train()
    blocks = find_decoder(model).blocks
    with torch.random.fork_rng():
        after = module_after(model, blocks, batch["input_ids"][:1])
    with record_residual_stream(blocks, after=after, block_outputs=layers) as plain:
        _forward(model, batch)
    with (
        steer_training(model, instructions),
        record_residual_stream(blocks, after=after, block_outputs=layers) as steered,
    ):
        _forward(model, batch)
    if not torch.equal(plain.block_output(layers[0]), steered.block_output(layers[0])):
        raise _refusal(layers[0], "the pass with hooks differed already before the lowest layer")
    passed_on, unsteered = steered.states(), plain.states()
    proofs = []
    for layer in layers:
        due = [i for i in instructions if i.layer == layer]
        before = steered.block_output(layer)
        proofs.append(_check(layer, due, before, passed_on[layer], batch))
        if layer == layers[0]:
            _check(layer, due, unsteered[layer], passed_on[layer], batch)
    return proofs


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
    state = before
    for instruction in instructions:
        on = torch.tensor(_due_tokens(instruction, batch))[..., None]  # [B, T, 1]
        state = torch.where(on, due_state(instruction, state), state)
    due, change = state - before, after - before
    steered = due.abs().sum(dim=-1) > 0  # [B, T]
    scale = float(torch.maximum(before.abs().max(), after.abs().max()))
    allowed = _ROUNDINGS * _resolution(before, after) * max(scale, 1e-6) * len(instructions)
    error = float((change - due).abs().max())
    expected = float(due[steered].norm(dim=-1).mean()) if steered.any() else 0.0
    direction = nn.functional.normalize(due[steered], dim=-1)
    change_norm = float((change[steered] * direction).sum(dim=-1).mean()) if steered.any() else 0.0
    if not (error <= allowed and abs(change_norm - expected) <= 0.05 * expected):
        raise _refusal(
            layer,
            f"the change should have the norm {expected:.4g} and has {change_norm:.4g}, with a "
            f"largest error of {error:.2g} where {allowed:.2g} is rounding",
        )
    return LayerProof(
        layer=layer,
        positions=int(steered.sum()),
        expected=expected,
        change_norm=change_norm,
        error=error / max(scale, 1e-6),
    )


def _due_tokens(instruction: Instruction, batch: Batch) -> list[list[bool]]:
    """Return, by a plain loop over the batch, which tokens are steered."""
    labels = batch["labels"].tolist()
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else None
    rows = []
    for b, row in enumerate(labels):
        real = [masks is None or masks[b][t] == 1 for t in range(len(row))]
        answer = [real[t] and row[t] != IGNORED_LABEL for t in range(len(row))]
        if instruction.positions == "all":
            rows.append(real)
        elif instruction.positions == "prompt":
            rows.append([real[t] and not answer[t] for t in range(len(row))])
        else:
            before = [*answer[1:], False]
            rows.append([answer[t] or (real[t] and before[t]) for t in range(len(row))])
    return rows


def _resolution(*states: torch.Tensor) -> float:
    """Return the relative rounding of the activations, found from their own values."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(state, state.to(dtype).float()) for state in states):
            return torch.finfo(dtype).eps
    return torch.finfo(torch.float32).eps


def _refusal(layer: int, why: str) -> SteeringError:
    return SteeringError(
        f"Steering at {describe_layer(layer)} does not do what was requested ({why}), so training "
        f"does not start: please report this with the model's name."
    )


def _input_reader(stream: ResidualStream, layer: int) -> Any:
    def read(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        stream.keep("passed on", layer, args[0] if args else kwargs["hidden_states"])

    return read


def _output_reader(stream: ResidualStream, layer: int) -> Any:
    def read(_module: nn.Module, _args: Any, output: Any) -> None:
        stream.keep("block output", layer, output[0] if isinstance(output, tuple) else output)

    return read

"""Proof, before the first request, that this engine steers and captures what it is asked to.

Probe requests with forced tokens run without steering and, one per layer, with it. On the steered
layer the span means must differ by exactly coef * v (in the spans that are steered, by nothing in
the others), before it by nothing, after it by something. A graph compiled without the probes, an
unknown runner or a decoder layer that was not found fails here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from pvec.backends.vllm.client import EngineClient
from pvec.backends.vllm.requests import EngineRequest, EngineResult
from pvec.backends.vllm.slots import cut
from pvec.errors import SteeringError
from pvec.models.decoder import describe_layer
from pvec.steering.positions import LAST, ROLES_OF
from pvec.types import Instruction, ModelInfo, Operator, Positions

_PROMPT, _ANSWER = 7, 3
_TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 6e-2}
"""Allowed error, relative to the length of what is added."""


def prove(client: EngineClient, info: ModelInfo, *, vocab: int, clamps: int) -> None:
    """Raise ``SteeringError`` unless steering and capture hold on every layer."""
    if not client.slots.capacity:
        return
    plain = _run(client, [()], vocab)[0]
    assert plain.stats is not None, "every probe captures"
    norms = plain.stats[1:, :, 0].sum(axis=1) / plain.stats[1:, :, 1].sum(axis=1)  # [L]
    generator = np.random.default_rng(0)
    plans = [
        (_instruction(layer, generator, info.hidden_size, norm=float(norms[layer - 1])),)
        for layer in range(1, info.num_layers + 1)
    ]
    for plan, steered in zip(plans, _run(client, plans, vocab), strict=True):
        _check_addition(plan[0], _means(plain), _means(steered), info)
    if clamps:
        _check_ablation(client, plans[len(plans) // 2][0], plain, vocab, info)


def _instruction(
    layer: int, generator: np.random.Generator, width: int, *, norm: float
) -> Instruction:
    """Return a random direction as long as the residual stream, positions in turn."""
    vector = generator.standard_normal(width).astype(np.float32)
    positions: tuple[Positions, ...] = get_args(Positions)
    return Instruction(
        vector=vector,
        layer=layer,
        coef=norm / float(np.linalg.norm(vector)) * (1 if layer % 2 else -1),
        positions=positions[layer % len(positions)],
        name="self-test",
    )


def _run(
    client: EngineClient, plans: Sequence[tuple[Instruction, ...]], vocab: int
) -> list[EngineResult]:
    """Run one probe per plan; results in the order of the plans."""
    prompt = [(vocab // 3 + 7 * i) % vocab for i in range(_PROMPT)]
    spans = {"prompt": (0, _PROMPT - 1), "prompt_last": (_PROMPT - 1, _PROMPT)}
    segments = cut({**spans, "response": (_PROMPT, _PROMPT + _ANSWER)})  # type: ignore[dict-item]
    engine_requests = (
        EngineRequest(
            tag=number,
            token_ids=prompt,
            steered_prompt=_PROMPT,
            sampling={
                "temperature": 0.0,
                "max_tokens": _ANSWER + 1,
                "ignore_eos": True,
                "allowed_token_ids": [vocab // 2],
            },
            plan=plan,
            segments=segments,
        )
        for number, plan in enumerate(plans)
    )
    done = sorted(client.run(engine_requests), key=lambda result: int(result.request.tag))
    for result in done:
        if result.high != _PROMPT + _ANSWER or result.stats is None:
            raise _failed(f"{result.high} of {_PROMPT + _ANSWER} tokens were seen")
        if not (result.stats[:, :, 1] == (_PROMPT - 1, 1, _ANSWER)).all():
            raise _failed("tokens were credited to the wrong span, or a layer saw none")
    return done


def _means(done: EngineResult) -> np.ndarray:
    """Return the means ``[num_layers + 1, 3, H]`` over prompt but its last token, last, answer."""
    assert done.sums is not None, "every probe captures"
    assert done.stats is not None, "every probe captures"
    means: np.ndarray = done.sums / done.stats[:, :, 1:]
    return means


def _check_addition(
    instruction: Instruction, plain: np.ndarray, steered: np.ndarray, info: ModelInfo
) -> None:
    layer = instruction.layer
    added = instruction.coef * instruction.vector
    scale = float(np.linalg.norm(added))
    touched = ROLES_OF[instruction.positions]
    difference = steered - plain  # [num_layers + 1, 3, H]
    for span, role in enumerate((LAST - 1, LAST, LAST + 1)):
        due = added if role in touched else np.zeros_like(added)
        error = float(np.linalg.norm(difference[layer, span] - due)) / scale
        before = float(np.abs(difference[:layer, span]).max()) / scale
        if max(error, before) > _TOLERANCE[info.dtype]:
            raise _failed(
                f"at {describe_layer(layer)} the residual stream changed by something else than "
                f"coef*v (relative error {max(error, before):.2g})"
            )
    if layer < info.num_layers and not difference[layer + 1].any():
        raise _failed(f"what is added at {describe_layer(layer)} does not reach the next layer")


def _check_ablation(
    client: EngineClient, added: Instruction, plain: EngineResult, vocab: int, info: ModelInfo
) -> None:
    """Ablate the mean direction of a layer: nothing may be left along it."""
    layer = added.layer
    vector = _means(plain)[layer].mean(axis=0)
    operator: Operator = "ablate"
    plan = (Instruction(vector=vector, layer=layer, positions="all", operator=operator),)
    left = _means(_run(client, [plan], vocab)[0])[layer] @ vector / float(vector @ vector)
    if float(np.abs(left).max()) > _TOLERANCE[info.dtype]:
        raise _failed(f"ablation at {describe_layer(layer)} left {np.abs(left).max():.2g} of 1")


def _failed(what: str) -> SteeringError:
    return SteeringError(
        f"The self-test of steering on vLLM failed: {what}. Delete vLLM's compile cache and try "
        f"again, set backend.vllm.enforce_eager, or use --backend hf."
    )

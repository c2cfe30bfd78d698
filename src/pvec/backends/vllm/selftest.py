"""Proof, before the first request, that this engine steers and captures as requested.

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
from pvec.backends.vllm.requests import EngineRequest, answer_spans, span_means
from pvec.backends.vllm.slots import cut
from pvec.errors import SteeringError
from pvec.models.decoder import describe_layer
from pvec.steering.proof import span_errors
from pvec.types import BY_SPAN, Instruction, ModelInfo, Positions, SpanMeans, SpanName

_PROMPT, _ANSWER = 7, 3
_TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 6e-2}
"""Allowed error, in residual norms; what is added has the norm of the residual stream."""


def prove(client: EngineClient, info: ModelInfo, *, vocab: int, clamps: int) -> None:
    """Raise ``SteeringError`` unless steering and capture hold on every layer."""
    if not client.slots.capacity:
        return
    (plain,) = _run(client, [()], vocab, info)
    generator = np.random.default_rng(0)
    plans = [
        (
            _instruction(
                layer, generator, info.hidden_size, norm=float(plain.norms["prompt"][layer])
            ),
        )
        for layer in range(1, info.num_layers + 1)
    ]
    for plan, steered in zip(plans, _run(client, plans, vocab, info), strict=True):
        _check_addition(plan[0], plain, steered, info)
    if clamps:
        _check_ablation(client, plans[len(plans) // 2][0].layer, plain, vocab, info)


def _instruction(
    layer: int, generator: np.random.Generator, width: int, *, norm: float
) -> Instruction:
    """Return a random direction as long as the residual stream, positions in turn."""
    vector = generator.standard_normal(width).astype(np.float32)
    positions: list[Positions] = [p for p in get_args(Positions) if p not in BY_SPAN]
    return Instruction(
        vector=vector,
        layer=layer,
        coef=norm / float(np.linalg.norm(vector)) * (1 if layer % 2 else -1),
        positions=positions[layer % len(positions)],
        name="self-test",
    )


def _run(
    client: EngineClient, plans: Sequence[tuple[Instruction, ...]], vocab: int, info: ModelInfo
) -> list[SpanMeans]:
    """Run one probe request per plan; span means of all layers in the order of the plans."""
    prompt = [(vocab // 3 + 7 * i) % vocab for i in range(_PROMPT)]
    requests = (
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
            segments=cut(answer_spans(_PROMPT)),
        )
        for number, plan in enumerate(plans)
    )
    results = sorted(client.run(requests), key=lambda result: int(result.request.tag))
    layers = tuple(range(info.num_layers + 1))
    means = []
    for result in results:
        if result.high != _PROMPT + _ANSWER:
            raise _failed(f"{result.high} of {_PROMPT + _ANSWER} tokens were seen")
        means.append(span_means(result, layers, identity="self-test", hidden_size=info.hidden_size))
    return means


def _check_addition(
    instruction: Instruction, plain: SpanMeans, steered: SpanMeans, info: ModelInfo
) -> None:
    layer = instruction.layer
    errors = span_errors(plain, steered, instruction, prompt_tokens=_PROMPT)
    worst = max(errors.at_layer, errors.elsewhere)
    if not worst <= _TOLERANCE[info.dtype]:
        raise _failed(
            f"at {describe_layer(layer)} the residual stream changed by something else than "
            f"coef*v (relative error {worst:.2g})"
        )
    last: SpanName = "prompt_last"  # steered under all positions
    if layer < info.num_layers and np.array_equal(
        steered.means[last][layer + 1], plain.means[last][layer + 1]
    ):
        raise _failed(f"the addition at {describe_layer(layer)} does not reach the next layer")


def _check_ablation(
    client: EngineClient, layer: int, plain: SpanMeans, vocab: int, info: ModelInfo
) -> None:
    """Ablate the mean direction of a layer: nothing may be left along it."""
    vector = np.mean([means[layer] for means in plain.means.values()], axis=0)
    plan = (Instruction(vector=vector, layer=layer, positions="all", operator="ablate"),)
    (ablated,) = _run(client, [plan], vocab, info)
    left = max(
        abs(float(means[layer] @ vector) / float(vector @ vector))
        for means in ablated.means.values()
    )
    if not left <= _TOLERANCE[info.dtype]:
        raise _failed(f"ablation at {describe_layer(layer)} left {left:.2g} of 1")


def _failed(what: str) -> SteeringError:
    return SteeringError(
        f"The self-test of steering on vLLM failed: {what}. Delete vLLM's compile cache and try "
        f"again, set backend.vllm.enforce_eager, or use --backend hf."
    )

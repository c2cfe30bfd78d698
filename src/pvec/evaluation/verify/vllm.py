"""The checks of ``pvec verify`` on vLLM.

Plain hooks cannot look into a compiled engine. Its results are compared with each other (steered
and not, prefix cache on and off, mixed and alone) and at the end with transformers on the same
weights, which ``pvec verify --backend hf`` verifies independently. One model is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.session import ModelSession, open_backend
from pvec.evaluation.verify.inputs import POSITIONS, Check, VerifyInputs, texts_of
from pvec.models.chat import spans_from_ids
from pvec.models.decoder import describe_layer
from pvec.types import Instruction, Positions, SpanMeans, TokenSpans

if TYPE_CHECKING:
    from pvec.backends.base import Backend

Means = Mapping[str, SpanMeans]


class EngineBench(VerifyInputs):
    """A vLLM engine with its answers to mixed requests and the span means of one of them.

    ``sequences`` are one prompt with its unsteered answer, plain and under every instruction and
    position; ``texts`` and ``means`` are by id.
    """

    def __init__(self, session: ModelSession, steering: Sequence[Instruction]) -> None:
        super().__init__(session.backend, steering, thinking=session.thinking)
        self.session = session
        self.requests = self.mixed_requests()
        self.texts = texts_of(self.backend, self.requests)
        self.sequences = self._sequences()
        self.means = _means(self.backend, self.sequences)
        self.plain = self.means["plain"]

    def steered(self, name: str, instruction: Instruction) -> SpanMeans:
        """Return the means under an instruction and positions (or ``zero``)."""
        return self.means[_name(name, instruction)]

    def _sequences(self) -> list[TokenSpans]:
        ids = self.prompts[1]
        (request,) = (r for r in self.requests if not r.steering and r.prompt_ids == ids)
        plain = spans_from_ids("plain", prompt_ids=ids, answer_ids=self.texts[request.id])
        steered = [
            replace(plain, id=_name(positions, i), steering=(replace(i, positions=positions),))
            for positions in POSITIONS
            for i in self.steering
        ]
        zero = [
            replace(plain, id=_name("zero", i), steering=(replace(i, coef=0.0),))
            for i in self.steering
        ]
        return [plain, *steered, *zero]


def engine_checks(session: ModelSession, steering: Sequence[Instruction]) -> Iterator[Check]:
    """Yield every check as it is done; a failed check is a result, not an exception.

    Starts the engine a second time with the prefix cache the other way, then transformers.
    """
    bench = EngineBench(session, steering)
    for positions in POSITIONS:
        yield from _change_checks(bench, positions)
    yield _zero_is_identity(bench)
    yield _later_layers_change(bench)
    from_cache = ", their prompts read from the cache"
    yield from bench.alone_checks(bench.requests, bench.texts, how=from_cache)
    session.close()
    yield _other_cache(bench)
    yield from _as_in_transformers(bench)


def _means(backend: Backend, sequences: Sequence[TokenSpans]) -> Means:
    return {means.id: means for means in backend.capture(sequences)}


def _name(name: str, instruction: Instruction) -> str:
    return f"{name} {instruction.layer}"


def _change_checks(bench: EngineBench, positions: Positions) -> Iterator[Check]:
    """Compare the means of the same tokens with and without steering, on each steered layer."""
    from pvec.steering.proof import span_errors

    errors = {
        instruction.layer: span_errors(
            bench.plain,
            bench.steered(positions, instruction),
            replace(instruction, positions=positions),
            prompt_tokens=len(bench.prompts[1]),
        )
        for instruction in bench.steering
    }
    layer = max(errors, key=lambda layer: errors[layer].at_layer)
    yield bench.check(
        f"positions={positions}: the residual stream changes by coef x v",
        errors[layer].at_layer,
        f"worst at {describe_layer(layer)}, {errors[layer].worst}",
    )
    yield bench.check(
        f"positions={positions}: no other span changes, nor any layer below",
        max(error.elsewhere for error in errors.values()),
    )


def _zero_is_identity(bench: EngineBench) -> Check:
    """Coefficient 0 runs through the steering code and must change neither means nor text."""
    worst = max(_gap(bench.steered("zero", i), bench.plain) for i in bench.steering)
    zeros = [bench.request(n, replace(i, coef=0.0), prompt=1) for n, i in enumerate(bench.steering)]
    (text,) = texts_of(bench.backend, [bench.request(len(zeros), prompt=1)]).values()
    different = sum(answer != text for answer in texts_of(bench.backend, zeros).values())
    check = bench.check(
        "coefficient 0 is the identity", worst, f"{different} of {len(zeros)} texts differ"
    )
    return replace(check, passed=check.passed and (different == 0 or bench.dtype != "float32"))


def _later_layers_change(bench: EngineBench) -> Check:
    """The addition must be passed on: the next layer's prompt mean changes under ``all``."""
    last = len(bench.plain.layers) - 1
    unchanged = [
        i.layer
        for i in bench.steering
        if i.layer < last
        and np.array_equal(
            bench.steered("all", i).means["prompt"][i.layer + 1],
            bench.plain.means["prompt"][i.layer + 1],
        )
    ]
    name = "the layer after a steered one computes with it"
    return bench.check(name, len(unchanged), unit="layers that did not", allowed=0)


def _other_cache(bench: EngineBench) -> Check:
    """Run the same requests in an engine with the prefix cache the other way."""
    session, settings = bench.session, bench.session.settings
    on = not settings.backend.vllm.enable_prefix_caching
    options = settings.backend.vllm.model_copy(update={"enable_prefix_caching": on})
    backend = settings.backend.model_copy(update={"vllm": options})
    changed = settings.model_copy(update={"backend": backend})
    session.notify(f"starting the engine again with its prefix cache {'on' if on else 'off'}")
    with open_backend(
        "vllm", session.spec, changed, metadata=session.metadata, notify=session.notify
    ) as other:
        texts = texts_of(other, bench.requests)
    return bench.same_texts("prefix cache on and off give the same texts", bench.texts, texts)


def _as_in_transformers(bench: EngineBench) -> Iterator[Check]:
    session = bench.session
    session.notify("loading the same weights in transformers")
    with open_backend(
        "hf", session.spec, session.settings, metadata=session.metadata, notify=session.notify
    ) as backend:
        texts, means = texts_of(backend, bench.requests), _means(backend, bench.sequences)
    worst = max(_gap(bench.means[name], means[name]) for name in means)
    yield bench.check(
        "mean activations equal those in transformers", worst, f"{len(means)} sequences"
    )
    yield bench.same_texts("greedy texts equal those of transformers", bench.texts, texts)


def _gap(means: SpanMeans, others: SpanMeans) -> float:
    """Return the largest distance of two means over spans and layers, in residual norms."""
    return max(
        float((np.linalg.norm(means.means[span] - others.means[span], axis=1) / norms).max())
        for span, norms in others.norms.items()
        if np.isfinite(norms).all()  # an empty span: the answer may be
    )

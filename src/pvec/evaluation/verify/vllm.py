"""The checks of ``pvec verify`` on vLLM.

Plain hooks cannot look into a compiled engine. What it gives is compared with itself (steered and
not, prefix cache on and off, mixed and alone) and at the end with transformers on the same weights,
which ``pvec verify --backend hf`` proves from outside. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.session import ModelSession, Notify, open_backend
from pvec.evaluation.verify.inputs import POSITIONS, Asked, Check
from pvec.models.chat import spans_from_ids
from pvec.models.decoder import describe_layer
from pvec.settings import Settings
from pvec.types import Instruction, Positions, Request, SpanMeans, SpanName, TokenSpans

if TYPE_CHECKING:
    from pvec.backends.base import Backend

_STEERED: Mapping[Positions, frozenset[SpanName]] = {
    "all": frozenset({"prompt", "prompt_last", "response"}),
    "prompt": frozenset({"prompt", "prompt_last"}),
    "response": frozenset({"prompt_last", "response"}),
}
"""The spans in which every token is steered; in the prompt span ``response`` steers the last."""

Texts = Mapping[str, tuple[int, ...]]
Means = Mapping[str, SpanMeans]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What a backend gave to the same requests and sequences."""

    texts: Texts
    means: Means


def engine_checks(
    session: ModelSession, settings: Settings, steering: Sequence[Instruction], *, notify: Notify
) -> Iterator[Check]:
    """Yield every check as it is done; a failed one is a result like any other.

    Starts the engine a second time with the prefix cache the other way, then transformers.
    """
    backend = session.backend
    asked = Asked(backend, steering, thinking=session.thinking)
    requests = asked.mixed_requests()
    texts = _texts(backend, requests)
    sequences = _sequences(asked, texts)
    seen = _Seen(texts=texts, means=_means(backend, sequences))
    for positions in POSITIONS:
        yield from _change_checks(asked, seen.means, positions)
    yield _zero_is_identity(asked, backend, seen.means)
    yield _later_layers_feel_it(asked, seen.means)
    yield from _alone(asked, backend, requests, texts)
    session.close()
    other = not settings.backend.vllm.enable_prefix_caching
    yield _other_cache(asked, session, settings, requests, texts, on=other, notify=notify)
    yield from _as_in_transformers(
        asked, session, settings, requests, sequences, seen, notify=notify
    )


def _texts(backend: Backend, requests: Sequence[Request]) -> Texts:
    return {answer.id: answer.token_ids for answer in backend.generate(requests)}


def _means(backend: Backend, sequences: Sequence[TokenSpans]) -> Means:
    return {means.id: means for means in backend.capture(sequences)}


def _name(positions: str, instruction: Instruction) -> str:
    return f"{positions} {instruction.layer}"


def _sequences(asked: Asked, texts: Texts) -> list[TokenSpans]:
    """Return one prompt and unsteered answer, plain and under every instruction and position."""
    (request,) = (r for r in asked.mixed_requests() if not r.steering and _second(asked, r))
    plain = spans_from_ids("plain", prompt_ids=request.prompt_ids, answer_ids=texts[request.id])
    steered = [
        replace(plain, id=_name(positions, one), steering=(replace(one, positions=positions),))
        for positions in POSITIONS
        for one in asked.steering
    ]
    zero = [
        replace(plain, id=_name("zero", one), steering=(replace(one, coef=0.0),))
        for one in asked.steering
    ]
    return [plain, *steered, *zero]


def _second(asked: Asked, request: Request) -> bool:
    return request.prompt_ids == asked.prompts[1]


def _change_checks(asked: Asked, means: Means, positions: Positions) -> Iterator[Check]:
    """Compare the means of the same tokens with and without steering, on each steered layer."""
    plain, inside, outside = means["plain"], 0.0, 0.0
    where = ""
    for one in asked.steering:
        steered = means[_name(positions, one)]
        added = np.float32(one.coef) * one.vector
        for span in _spans(plain):
            scale = plain.norms[span]  # [L + 1]
            change = steered.means[span] - plain.means[span]  # [L + 1, H]
            below = np.linalg.norm(change[: one.layer], axis=1) / scale[: one.layer]
            outside = max(outside, float(below.max()))
            at_layer = change[one.layer]
            if span in _STEERED[positions]:
                error = float(np.linalg.norm(at_layer - added) / scale[one.layer])
                if error >= inside:
                    inside, where = error, f"{describe_layer(one.layer)}, {span}"
            elif span == "response":
                outside = max(outside, float(np.linalg.norm(at_layer) / scale[one.layer]))
    yield asked.check(
        f"positions={positions}: the residual stream changes by coef x v",
        inside,
        f"worst at {where}",
    )
    yield asked.check(f"positions={positions}: no other span changes, nor any layer below", outside)


def _zero_is_identity(asked: Asked, backend: Backend, means: Means) -> Check:
    """Coefficient 0 takes the way of steering and must change neither means nor text."""
    plain = means["plain"]
    worst = max(_gap(means[_name("zero", one)], plain) for one in asked.steering)
    zeros = [
        asked.request(n, replace(one, coef=0.0), prompt=1) for n, one in enumerate(asked.steering)
    ]
    (text,) = _texts(backend, [asked.request(len(zeros), prompt=1)]).values()
    other = sum(answer != text for answer in _texts(backend, zeros).values())
    check = asked.check(
        "coefficient 0 is the identity", worst, f"{other} of {len(zeros)} texts differ"
    )
    return replace(check, passed=check.passed and (other == 0 or asked.dtype != "float32"))


def _later_layers_feel_it(asked: Asked, means: Means) -> Check:
    """What is added must be carried on: the next layer's prompt changes under ``all``."""
    plain = means["plain"]
    last = len(plain.layers) - 1
    deaf = [
        one.layer
        for one in asked.steering
        if one.layer < last
        and not (
            means[_name("all", one)].means["prompt"][one.layer + 1]
            != plain.means["prompt"][one.layer + 1]
        ).any()
    ]
    return Check(
        name="the layer after a steered one computes with it",
        passed=not deaf,
        measured=float(len(deaf)),
        allowed=0.0,
        unit="layers that did not",
    )


def _alone(
    asked: Asked, backend: Backend, requests: Sequence[Request], texts: Texts
) -> Iterator[Check]:
    """In one batch every row carries other steering; each answer must be what it is alone."""
    for steered in (False, True):
        mine = [request for request in requests if bool(request.steering) is steered]
        different = sum(_texts(backend, [one])[one.id] != texts[one.id] for one in mine)
        yield asked.check_texts(
            f"{'steered' if steered else 'unsteered'} rows of a mixed batch answer as they do "
            f"alone, their prompts read from the cache",
            different=different,
            total=len(mine),
            detail=f"{len(mine)} answers in a batch of {len(requests)}",
        )


def _other_cache(
    asked: Asked,
    session: ModelSession,
    settings: Settings,
    requests: Sequence[Request],
    texts: Texts,
    *,
    on: bool,
    notify: Notify,
) -> Check:
    """Run the same requests in an engine with the prefix cache the other way."""
    options = settings.backend.vllm.model_copy(update={"enable_prefix_caching": on})
    backend = settings.backend.model_copy(update={"vllm": options})
    turned = settings.model_copy(update={"backend": backend})
    notify(f"starting the engine again with its prefix cache {'on' if on else 'off'}")
    with open_backend(
        "vllm", session.spec, turned, metadata=session.metadata, notify=notify
    ) as other:
        found = _texts(other, requests)
    return asked.check_texts(
        "prefix cache on and off give the same texts",
        different=sum(found[name] != text for name, text in texts.items()),
        total=len(requests),
        detail=f"{len(requests)} answers",
    )


def _as_in_transformers(
    asked: Asked,
    session: ModelSession,
    settings: Settings,
    requests: Sequence[Request],
    sequences: Sequence[TokenSpans],
    seen: _Seen,
    *,
    notify: Notify,
) -> Iterator[Check]:
    notify("loading the same weights in transformers")
    with open_backend(
        "hf", session.spec, settings, metadata=session.metadata, notify=notify
    ) as backend:
        texts, means = _texts(backend, requests), _means(backend, sequences)
    worst = max(_gap(seen.means[name], means[name]) for name in means)
    yield asked.check(
        "mean activations equal those in transformers", worst, f"{len(sequences)} sequences"
    )
    yield asked.check_texts(
        "greedy texts equal those of transformers",
        different=sum(texts[name] != text for name, text in seen.texts.items()),
        total=len(requests),
        detail=f"{len(requests)} answers",
    )


def _spans(means: SpanMeans) -> list[SpanName]:
    """Return the spans that are not empty: an answer may be."""
    return [span for span, norms in means.norms.items() if np.isfinite(norms).all()]


def _gap(means: SpanMeans, others: SpanMeans) -> float:
    """Return the largest distance of two means over spans and layers, in residual norms."""
    return max(
        float(
            (
                np.linalg.norm(means.means[span] - others.means[span], axis=1) / others.norms[span]
            ).max()
        )
        for span in _spans(others)
    )

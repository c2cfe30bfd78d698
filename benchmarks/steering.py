"""Steering sweeps: pvec in one pass beside the reference way, and what steering costs a step.

    python benchmarks/steering.py                 # the whole comparison, bundled model
    python benchmarks/steering.py --rollouts 1    # a fifth of it

Both ways run in this process, on the same weights and the same points: 5 layers x 5 coefficients,
the same with a random vector, the unsteered baseline and two prompt baselines; 20 questions each.

The reference way is written out below: one point after another, batches of 20 prompts padded on the
left, a hook registered anew for each point, ``model.generate`` with sampling. Its own process and
model load per point are left out, in its favour.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import CLOCKS, hooked, left_padded, parser_of, timed

from pvec.backends.base import Backend
from pvec.backends.planned import derive_seed, question_messages
from pvec.backends.session import ModelSession
from pvec.evaluation.conditions import steered_conditions
from pvec.models.chat import prompt_ids, spans_from_ids
from pvec.models.decoder import find_decoder
from pvec.settings import Settings
from pvec.settings.commands import SteerSettings
from pvec.settings.sections import ModelSettings
from pvec.steering.instructions import SteeringVector, random_like
from pvec.traits.trait import Trait, load_trait
from pvec.types import Instruction, Request, Sampling

COEFS = (-1.0, -0.5, 0.5, 1.0, 1.5)
LAYERS = 5
REFERENCE_BATCH = 20
TRAIT = "evil"
Clock = Callable[[], float]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rollouts", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--every", type=int, default=1, help="only every so many points")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(model=ModelSettings(id=options.model))
    with ModelSession(settings) as session:
        backend, trait = session.backend, load_trait(TRAIT)
        print(f"{session.metadata.id}: {backend.info.dtype} on {backend.info.device}, "
              f"{torch.get_num_threads()} threads")  # fmt: skip
        source = class_difference(backend, trait)
        points = sweep(backend, trait, source)
        sizes = {"rollouts": options.rollouts, "max_tokens": options.max_tokens}
        compare_sweeps(backend, points[:: options.every], clock=clock, **sizes)
        compare_steps(backend, trait, source, clock=clock)


Point = tuple[tuple[Instruction, ...], list[tuple[int, ...]]]
"""What steers, and the prompts of the 20 questions."""


def class_difference(backend: Backend, trait: Trait) -> SteeringVector:
    """Make a vector without a judge: mean response under positive minus negative instructions."""
    sums = {}
    for sign in ("pos", "neg"):
        requests = [
            Request(
                id=f"{number}",
                prompt_ids=prompt_ids(
                    backend.tokenizer,
                    question_messages(question, system=trait.system_prompt(sign, number % 5)),
                ),
                sampling=Sampling(max_tokens=64, seed=number),
            )
            for number, question in enumerate(trait.extract_questions)
        ]
        prompts = {request.id: request.prompt_ids for request in requests}
        spans = [
            spans_from_ids(one.id, prompt_ids=prompts[one.id], answer_ids=one.token_ids)
            for one in backend.generate(requests)
            if one.token_ids
        ]
        sums[sign] = np.mean([m.means["response"] for m in backend.capture(spans)], axis=0)
    return SteeringVector(label=trait.name, rows=(sums["pos"] - sums["neg"]).astype(np.float32))


def sweep(backend: Backend, trait: Trait, source: SteeringVector) -> list[Point]:
    """Return every point of the sweep: baseline, prompt baselines, vector and random control."""
    depth = backend.info.num_layers
    layers = sorted({max(1, round(depth * (i + 1) / LAYERS)) for i in range(LAYERS)})
    steer = SteerSettings(
        layer=",".join(map(str, layers)), coef=",".join(f"{coef:g}" for coef in COEFS)
    )

    def prompts(system: str | None) -> list[tuple[int, ...]]:
        return [
            prompt_ids(backend.tokenizer, question_messages(question, system=system))
            for question in trait.eval_questions
        ]

    plain = prompts(None)
    points: list[Point] = [((), plain)]
    points += [((), prompts(trait.system_prompt(sign, 0))) for sign in ("pos", "neg")]
    for one in (source, random_like(source, seed=0)):
        conditions = steered_conditions([one], steer, num_layers=depth)
        points += [(condition.steering, plain) for condition in conditions]
    return points


def compare_sweeps(
    backend: Backend, points: Sequence[Point], *, rollouts: int, max_tokens: int, clock: Clock
) -> None:
    answers = sum(len(prompts) for _, prompts in points) * rollouts
    print(f"\nsweep: {len(points)} points, {answers:,} answers of up to {max_tokens} tokens")
    sizes = {"rollouts": rollouts, "max_tokens": max_tokens}
    ours, our_tokens = timed(lambda: sum(pvec_way(backend, points, **sizes)), clock)
    report("pvec, one pass", answers, our_tokens, ours)
    theirs, their_tokens = timed(lambda: sum(reference_way(backend, points, **sizes)), clock)
    report("reference way", answers, their_tokens, theirs)
    speed = (our_tokens / ours) / (their_tokens / theirs)
    print(f"  ratio: {theirs / ours:.1f} x in time, {speed:.1f} x in tokens per second")


def pvec_way(
    backend: Backend, points: Sequence[Point], *, rollouts: int, max_tokens: int
) -> Iterator[int]:
    """Yield the token counts of all answers, from one call of ``generate``."""
    requests = [
        Request(
            id=f"{p}-{q}-{r}",
            prompt_ids=ids,
            sampling=Sampling(max_tokens=max_tokens, seed=derive_seed(0, q, r)),
            steering=steering,
        )
        for p, (steering, prompts) in enumerate(points)
        for q, ids in enumerate(prompts)
        for r in range(rollouts)
    ]
    for generation in backend.generate(requests):
        yield len(generation.token_ids)


def reference_way(
    backend: Any, points: Sequence[Point], *, rollouts: int, max_tokens: int
) -> Iterator[int]:
    """Yield the token counts of all answers, point by point in batches of 20."""
    model, tokenizer = backend.model, backend.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    torch.manual_seed(0)
    for steering, prompts in points:
        queue = [ids for ids in prompts for _ in range(rollouts)]
        for start in range(0, len(queue), REFERENCE_BATCH):
            batch = queue[start : start + REFERENCE_BATCH]
            width = max(map(len, batch))
            inputs = {name: t.to(model.device) for name, t in left_padded(batch, pad).items()}
            with torch.no_grad(), _added_to_last(model, steering):
                output = model.generate(
                    **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                    max_new_tokens=max_tokens, pad_token_id=pad, use_cache=True,
                )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            assert len(texts) == len(batch)
            for row in output[:, width:].tolist():
                yield len(row) - row.count(pad)


def _added_to_last(model: Any, steering: Sequence[Instruction]) -> AbstractContextManager[None]:
    """Add at the last position of every pass, as the reference does; nothing without steering."""
    if not steering:
        return nullcontext()
    (instruction,) = steering
    added = torch.from_numpy(instruction.coef * instruction.vector).to(model.device, model.dtype)

    def to_last(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, -1, :] += added
        return hidden

    return hooked(find_decoder(model).blocks[instruction.layer - 1], to_last)


def compare_steps(backend: Backend, trait: Trait, source: SteeringVector, *, clock: Clock) -> None:
    """Time the same tokens steered and not: a dose too small to change any choice of a token.

    Every row has a prompt of its own, so that none shares its prefill and only steering differs.
    """
    prompts = [
        prompt_ids(backend.tokenizer, question_messages(question, system=system))
        for index in range(4)
        for system in (trait.system_prompt("pos", index), trait.system_prompt("neg", index))
        for question in trait.eval_questions
    ]
    sampling = Sampling(temperature=0.0, max_tokens=48)
    layer = max(1, round(0.55 * backend.info.num_layers))
    vector = np.ascontiguousarray(source.rows[layer])
    tiny = [
        Instruction(vector=vector, layer=layer, coef=1e-7 * (1 + n / 16), name=f"v{n}")
        for n in range(16)
    ]

    def requests(steering: Sequence[Instruction]) -> list[Request]:
        return [
            Request(
                id=f"{n}",
                prompt_ids=prompts[n],
                sampling=replace(sampling, seed=n),
                steering=(steering[n % len(steering)],) if steering else (),
            )
            for n in range(128)
        ]

    kinds = {"unsteered": [], "one instruction": tiny[:1], "16 instructions": tiny}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    texts: dict[str, dict[str, tuple[int, ...]]] = {}
    for _ in range(7):  # alternating, so that a slow moment of the machine meets all alike
        for name, steering in kinds.items():
            started = clock()
            texts[name] = {one.id: one.token_ids for one in backend.generate(requests(steering))}
            seconds[name].append(clock() - started)
    print("\nsteering's own cost: 128 rows, the same tokens, best of 7 alternating rounds")
    base = min(seconds["unsteered"])
    for name, times in seconds.items():
        same = sum(texts[name][key] == texts["unsteered"][key] for key in texts[name])
        print(
            f"  {name:16} best {min(times):.3f} s, median {statistics.median(times):.3f} s, "
            f"{min(times) / base - 1:+.1%} over unsteered, {same} of 128 texts the same"
        )


def report(name: str, answers: int, tokens: int, seconds: float) -> None:
    print(f"  {name:16} {seconds:8.1f} s   {answers / seconds:8.1f} answers/s   "
          f"{tokens / seconds:8.0f} tokens/s")  # fmt: skip


if __name__ == "__main__":
    main()

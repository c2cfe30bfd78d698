"""The cost model: checked against measured runs, and what it says of large models and many GPUs.

    python benchmarks/costs.py check [--size bundled --size 20m --size 100m] [--model FOLDER]
    python benchmarks/costs.py tables

``check`` times prompts, decode steps and captures of models with random weights on one thread, in
CPU time, beside what ``pvec.models.costs`` estimates from the rates that ``--dry-run`` measures.
``tables`` prints the tables of ``docs/scaling.md``. Nothing in them was measured: peaks are those
of NVIDIA's data sheets for dense bfloat16, and what is assumed of them stands under the tables.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from capture import ROLLOUTS, rollouts
from common import PROMPT, SIZES, parser_of, random_backend, request, timed
from transformers import LlamaConfig, Qwen2Config

from pvec.activations.capture import capture_means
from pvec.backends.hf.backend import HFBackend
from pvec.judges.choice import DEFAULT_MODEL
from pvec.judges.cost import estimate, known_price
from pvec.judges.prompts import fill, metrics_of
from pvec.models.costs import TENSOR_SHARE, Estimate, Machine, ModelSize, Work, model_size
from pvec.models.machine import measure_machine
from pvec.traits.trait import load_trait

# ── against measured runs ───────────────────────────────────────────────────────────────────────


def check(args: argparse.Namespace) -> None:
    """Print estimated beside measured seconds."""
    torch.set_num_threads(1)
    machine = measure_machine("cpu", dtype=torch.float32, threads=1, clock=time.process_time)
    print(f"{machine.origin}; a layer's calls {machine.layer_seconds * 1e3:.2f} ms\n")
    print("| model | M parameters | stage | measured ms | estimated ms | estimated / measured |")
    print("|---|---:|---|---:|---:|---:|")
    for name in [*(args.size or (["bundled", "20m", "100m"])), *(args.model or ())]:
        running = random_backend(name) if name in SIZES else HFBackend(name)
        assert running.model is not None, "it was just opened"
        running._causal = replace(running._decoding_model(), stop_ids=frozenset())  # noqa: SLF001
        size = model_size(running.model.config, itemsize=4)
        for stage, measured, estimated in stages(running, size, machine, steps=args.steps):
            print(
                f"| {Path(name).name} | {size.parameters / 1e6:,.1f} | {stage} "
                f"| {measured * 1e3:,.1f} | {estimated * 1e3:,.1f} | {estimated / measured:.2f} |",
                flush=True,
            )


def stages(
    running: HFBackend, size: ModelSize, machine: Machine, *, steps: int
) -> Iterator[tuple[str, float, float]]:
    """Yield stages with measured and estimated seconds."""

    def generating(rows: int, tokens: int) -> float:
        asked = [request(n, tokens=tokens) for n in range(rows)]
        return min(timed(lambda: list(running.generate(asked)))[0] for _ in range(2))

    for rows in (1, 8, 32, 128):
        first, whole = generating(rows, 1), generating(rows, 1 + steps)
        work = Work(
            prompts=rows, prompt_tokens=PROMPT * rows, answers=rows, answer_tokens=steps * rows,
            context=PROMPT,
        )  # fmt: skip
        cost = Estimate(size=size, work=work, machine=machine)
        if rows == 32:
            prompts = cost.prefill_flops / machine.flops / machine.share
            yield f"{rows} prompts of {PROMPT}", first, prompts
        yield f"a decode step of {rows}", (whole - first) / steps, cost.decode_seconds / steps
    samples = rollouts(1, vocabulary=size.vocabulary)
    prompt = samples[0].spans["prompt"][1]
    tokens = prompt + sum(len(row.token_ids) - prompt for row in samples)
    work = Work(captured=tokens, context=tokens / ROLLOUTS / 2)
    cost = Estimate(size=size, work=work, machine=machine)
    model = running.model
    assert model is not None, "the backend is open"
    measured = min(timed(lambda: list(capture_means(model, samples)))[0] for _ in range(2))
    yield f"capture of {tokens:,} tokens", measured, cost.seconds


# ── large models on data sheets ─────────────────────────────────────────────────────────────────

SHARE, LAYER_SECONDS = 0.5, 1e-4


def data_sheet(name: str, *, tflops: float, gb_per_second: float, gb: float) -> Machine:
    """Return a GPU as its data sheet has it."""
    return Machine(
        flops=tflops * 1e12,
        bandwidth=gb_per_second * 1e9,
        memory=gb * 1e9,
        share=SHARE,
        layer_seconds=LAYER_SECONDS,
        origin=name,
    )


GPUS = [
    data_sheet("L4", tflops=121, gb_per_second=300, gb=24),
    data_sheet("L40S", tflops=362, gb_per_second=864, gb=48),
    data_sheet("A100 80GB SXM", tflops=312, gb_per_second=2039, gb=80),
    data_sheet("H100 SXM", tflops=989, gb_per_second=3350, gb=80),
    data_sheet("H200 SXM", tflops=989, gb_per_second=4800, gb=141),
]
MODELS = {
    "7B": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""The shapes of Qwen2.5-7B and of Llama-3.1-70B."""

PROMPT_TOKENS, ANSWER_TOKENS = 120, 300
CONTEXT = PROMPT_TOKENS + ANSWER_TOKENS


def extraction(traits: int) -> Work:
    """Return the paper's extraction: 20 questions × 5 instructions × 2 signs × 10 rollouts."""
    prompts, answers = traits * 200, traits * 2000
    tokens = PROMPT_TOKENS * prompts + ANSWER_TOKENS * answers
    return Work(
        prompts=prompts, prompt_tokens=PROMPT_TOKENS * prompts, answers=answers,
        answer_tokens=ANSWER_TOKENS * answers, context=PROMPT_TOKENS, captured=tokens,
    )  # fmt: skip


def projection(rows: int) -> Work:
    """Return the capture of a file's rows."""
    return Work(captured=rows * CONTEXT, context=CONTEXT / 2)


def screening(rows: int) -> Work:
    """Return the base responses to as many prompts, and the capture of both answers."""
    return Work(
        prompts=rows, prompt_tokens=PROMPT_TOKENS * rows, answers=rows,
        answer_tokens=ANSWER_TOKENS * rows, context=PROMPT_TOKENS, captured=2 * rows * CONTEXT,
    )  # fmt: skip


def words(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return (
                f"{seconds / unit:.2g} {name}"
                if seconds / unit < 10
                else f"{seconds / unit:.0f} {name}"
            )
    return f"{seconds / 86_400:,.1f} d" if seconds < 8.64e6 else f"{seconds / 86_400:,.0f} d"


def tables(_: argparse.Namespace) -> None:
    """Print what the model says of large models."""
    sizes = {name: model_size(config, itemsize=2) for name, config in MODELS.items()}
    print("| model | GPU | weights GB | KB a token in the cache | GPUs a worker | rows at once |")
    print("|---|---|---:|---:|---:|---:|")
    for name, size in sizes.items():
        for gpu in GPUS:
            count = size.gpus(gpu.memory, context=CONTEXT)
            rows = size.rows((count or 0) * gpu.memory, context=CONTEXT)
            print(
                f"| {name} | {gpu.origin} | {size.weight_bytes / 1e9:.0f} "
                f"| {size.cache_bytes / 1e3:.0f} | {count} | {rows} |"
            )
    h100 = next(gpu for gpu in GPUS if gpu.origin.startswith("H100"))
    works = {"extract, 1 trait": extraction(1), "extract, 7 traits": extraction(7)}
    for exponent in (4, 6, 8):
        works[f"project, 10^{exponent} rows"] = projection(10**exponent)
    for exponent in (4, 6):
        works[f"screen, 10^{exponent} rows"] = screening(10**exponent)
    for name, size in sizes.items():
        each = size.gpus(h100.memory, context=CONTEXT) or 0
        machine = h100.divided(each, tensor_parallel=True)
        counts = [count for count in (1, 2, 4, 8, 16, 64) if count % each == 0]
        print(f"\n{name}, workers of {each} H100\n")
        heads = " | ".join(f"{count} GPU{'s' * (count > 1)}" for count in counts)
        print(f"| job | PFLOP | {heads} | rows/s, {counts[-1]} GPUs |")
        print("|---|---:|" + "---:|" * (len(counts) + 1))
        for job, work in works.items():
            whole = Estimate(size=size, work=work, machine=machine)
            flops = whole.prefill_flops + whole.decode_flops + whole.capture_flops
            took = [
                Estimate(size=size, work=work.divided(count // each), machine=machine).seconds
                for count in counts
            ]
            done = work.answers or work.captured / CONTEXT
            print(
                f"| {job} | {flops / 1e15:,.0f} | {' | '.join(map(words, took))} "
                f"| {done / took[-1]:,.0f} |"
            )
    print(
        f"\nAssumed, not measured: {SHARE:.0%} of the data sheet's rates, {LAYER_SECONDS * 1e3:g} "
        f"ms for the calls of a layer, and that GPUs which share a layer keep {TENSOR_SHARE:.0%} "
        f"of their speed. Prompts of {PROMPT_TOKENS} tokens, answers of {ANSWER_TOKENS}, bfloat16."
    )
    trait = load_trait("evil")
    prompts = [
        fill(metric.prompt, question=question, answer="x" * (4 * ANSWER_TOKENS))
        for metric in metrics_of(trait)
        for question in trait.questions("extract")
    ]
    calls = estimate(prompts, price=known_price(DEFAULT_MODEL), repeats=100)
    print(f"\nJudging an extraction of one trait with {DEFAULT_MODEL}: {calls}.")


def main() -> None:
    """Run one of the two."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["check", "tables"])
    parser.add_argument("--size", action="append", choices=[*SIZES])
    parser.add_argument("--model", action="append", help="folder of a model to check as well")
    parser.add_argument("--steps", type=int, default=12, help="decode steps that are timed")
    args = parser.parse_args()
    {"check": check, "tables": tables}[args.what](args)


if __name__ == "__main__":
    main()

"""Capture of span means: pvec beside the usual loop, on one model and the same rows.

    python benchmarks/capture.py                      # on the CPU
    python benchmarks/capture.py --size 7b --device cuda --dtype bfloat16
    python benchmarks/capture.py --threads 1 --clock cpu --repeats 3    # on a machine that is busy

The usual loop runs one sequence per forward with all hidden states and all logits, and copies each
layer to the host for each kind of mean; it records no gradients. Rows are shaped as in extraction:
ten answers of 50 to 400 tokens to each prompt of 60 to 120. Weights are random, which changes no
timing. The two ways take turns, the best turn of each counts, and their results are compared before
anything is printed. The work ratio is how much more arithmetic the usual loop does (every prompt
again for each of its answers, and the logits): what the ratio would be if both ran equally close to
the machine's rate. The share of that rate counts only useful work, each shared prompt once and no
padding, against a plain matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from common import CLOCKS, SIZES, build, parser_of, require_same, watched
from transformers import PreTrainedModel

from pvec.activations.capture import capture_means, default_token_budget
from pvec.models.chat import spans_from_ids
from pvec.models.costs import ModelSize, model_size
from pvec.types import SpanMeans, TokenSpans

ROLLOUTS = 10
PROMPT_TOKENS = (60, 120)
ANSWER_TOKENS = (50, 400)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of capturing: its results, seconds, and peak memory above the weights in MiB."""

    rows: dict[str, SpanMeans]
    seconds: float
    peak: float


def rollouts(prompts: int, *, vocabulary: int, seed: int = 0) -> list[TokenSpans]:
    """Return rows shaped as in extraction."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(vocabulary) for _ in range(rng.randint(*PROMPT_TOKENS)))
        for a in range(ROLLOUTS):
            answer = tuple(rng.randrange(vocabulary) for _ in range(rng.randint(*ANSWER_TOKENS)))
            rows.append(spans_from_ids(f"{p}-{a}", prompt_ids=prompt, answer_ids=answer))
    return rows


@torch.no_grad()
def usual_loop(model: PreTrainedModel, rows: Sequence[TokenSpans]) -> Iterator[SpanMeans]:
    """Batch 1, every hidden state, every logit, one host copy per layer and kind."""
    layers = tuple(range(model.config.num_hidden_layers + 1))
    for row in rows:
        ids = torch.tensor([row.token_ids], device=model.device)
        states = model(ids, output_hidden_states=True).hidden_states
        means = {
            span: np.stack(
                [states[layer][0, start:stop].mean(dim=0).float().cpu().numpy() for layer in layers]
            )
            for span, (start, stop) in row.spans.items()
        }
        yield SpanMeans(id=row.id, layers=layers, means=means, norms={})


def measure(
    run: Callable[[], Iterator[SpanMeans]], *, device: str, clock: Callable[[], float]
) -> Measured:
    """Run to the end under a clock and a memory watch."""
    with watched(device, clock) as usage:
        rows = {row.id: row for row in run()}
    results = sum(m.nbytes for r in rows.values() for m in (*r.means.values(), *r.norms.values()))
    above = usage.peak - (device == "cpu") * results / 2**20
    return Measured(rows=rows, seconds=usage.seconds, peak=max(0.0, above))


def best(turns: Sequence[Measured]) -> Measured:
    """Return the results of several turns with the shortest time and the largest peak."""
    return replace(turns[0], seconds=min(t.seconds for t in turns), peak=max(t.peak for t in turns))


def matmul_rate(model: PreTrainedModel, *, tokens: int, clock: Callable[[], float]) -> float:
    """Return the best rate in FLOP/s of ``[tokens, H] @ [H, 4 H]``."""
    hidden = model.config.hidden_size
    a = torch.randn(tokens, hidden, device=model.device, dtype=model.dtype)
    b = torch.randn(hidden, 4 * hidden, device=model.device, dtype=model.dtype)
    best = 0.0
    for _ in range(8):
        repeats = 20 if model.device.type != "cpu" else 3
        start = clock()
        for _ in range(repeats):
            c = a @ b
        c[0, 0].item()
        best = max(best, repeats * 2 * a.numel() * b.shape[1] / (clock() - start))
    return best


def useful_flops(size: ModelSize, rows: Sequence[TokenSpans]) -> float:
    """Return the work of the blocks: each distinct prompt once, answers, causal attention."""
    prompts = {row.token_ids[: row.spans["prompt"][1]] for row in rows}
    parts = [(0, len(prompt)) for prompt in prompts]
    parts += [(row.spans["prompt"][1], len(row.token_ids)) for row in rows]
    return size.flops(sum(b - a for a, b in parts), keys=sum(b * b - a * a for a, b in parts) / 2)


def usual_flops(size: ModelSize, rows: Sequence[TokenSpans]) -> float:
    """Return the work of the usual loop: every row whole, with its logits."""
    lengths = [len(row.token_ids) for row in rows]
    tokens = sum(lengths)
    return size.flops(tokens, keys=sum(n * n for n in lengths) / 2, logits=tokens)


def largest_difference(one: dict[str, SpanMeans], two: dict[str, SpanMeans]) -> float:
    """Return the largest relative difference in any row but the last (normed in the usual way)."""
    return max(
        float(np.abs(m[:-1] - two[name].means[span][:-1]).max() / np.abs(m[:-1]).max())
        for name, row in one.items()
        for span, m in row.means.items()
    )


def compare(size: str, args: argparse.Namespace) -> None:
    """Measure both ways on one size and print a row of the table."""
    model = build(size, device=args.device, dtype=args.dtype)
    rows = rollouts(args.prompts, vocabulary=model.config.vocab_size)
    budget = args.token_budget or default_token_budget(model.device)
    warm_up = rows[:ROLLOUTS]
    list(capture_means(model, warm_up, token_budget=budget))
    list(usual_loop(model, warm_up[:2]))
    clock = CLOCKS[args.clock]

    def turn(run: Callable[[], Iterator[SpanMeans]]) -> Measured:
        return measure(run, device=args.device, clock=clock)

    turns = [
        (
            turn(lambda: capture_means(model, rows, token_budget=budget)),
            turn(lambda: usual_loop(model, rows)),
        )
        for _ in range(args.repeats)
    ]
    ours, usual = (best(one) for one in zip(*turns, strict=True))
    difference = largest_difference(usual.rows, ours.rows)
    require_same(size, difference, dtype=args.dtype)
    rate = matmul_rate(model, tokens=budget, clock=clock)
    numbers = model_size(model.config, itemsize=model.dtype.itemsize)
    useful = useful_flops(numbers, rows)
    tokens = sum(len(row.token_ids) for row in rows)
    print(
        f"| {size} | {len(rows)} | {tokens / usual.seconds:,.0f} | {tokens / ours.seconds:,.0f} "
        f"| {usual.seconds / ours.seconds:.2f} "
        f"| {usual_flops(numbers, rows) / useful:.2f} "
        f"| {usual.peak:,.0f} | {ours.peak:,.0f} "
        f"| {useful / ours.seconds / rate:.0%} of {rate / 1e12:.2f} TFLOP/s | {difference:.0e} |",
        flush=True,
    )


def main() -> None:
    """Print a Markdown table with one row per size."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--size", action="append", choices=[*SIZES], help="default: all but 20m and 7b"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=6, help="each with ten answers")
    parser.add_argument("--token-budget", type=int, help="tokens per forward")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each way")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--clock", default="wall", choices=[*CLOCKS])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, {args.clock} clock, "
        f"torch {torch.__version__}"
    )
    print(
        "| size | rows | usual tok/s | pvec tok/s | ratio | work ratio | usual peak MiB "
        "| pvec peak MiB | useful share of matmul rate | largest difference |\n" + "|---" * 10 + "|"
    )
    for size in args.size or ["bundled", "100m", "100m-qwen"]:
        compare(size, args)


if __name__ == "__main__":
    main()

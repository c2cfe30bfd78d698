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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pvec.activations.capture import capture_means, default_token_budget
from pvec.models.decoder import find_decoder
from pvec.types import SpanMeans, SpanName, TokenSpans

ROLLOUTS = 10
PROMPT_TOKENS = (60, 120)
ANSWER_TOKENS = (50, 400)

SIZES: dict[str, dict[str, Any]] = {
    "bundled": {
        "vocab_size": 3072,
        "hidden_size": 160,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
    },
    "20m": {
        "vocab_size": 16_000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "100m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "100m-qwen": {  # as many weights in the vocabulary of Qwen2.5 as small chat models have
        "vocab_size": 151_936,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "7b": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way of capturing: its results, seconds, and peak memory above the weights in MiB."""

    rows: dict[str, SpanMeans]
    seconds: float
    peak: float


class Watch(TypedDict):
    """Where and by which clock something is measured."""

    device: str
    clock: Callable[[], float]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``cpu`` leaves out the time that other processes took, and sums over threads."""


def build(size: str, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a Qwen2 of the wanted size with random weights."""
    config = Qwen2Config(**SIZES[size], max_position_embeddings=1024, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def rollouts(prompts: int, *, vocabulary: int, seed: int = 0) -> list[TokenSpans]:
    """Return rows shaped as in extraction."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(vocabulary) for _ in range(rng.randint(*PROMPT_TOKENS)))
        for a in range(ROLLOUTS):
            answer = tuple(rng.randrange(vocabulary) for _ in range(rng.randint(*ANSWER_TOKENS)))
            start, stop = len(prompt), len(prompt) + len(answer)
            spans: dict[SpanName, tuple[int, int]] = {
                "prompt": (0, start),
                "prompt_last": (start - 1, start),
                "response": (start, stop),
            }
            rows.append(TokenSpans(id=f"{p}-{a}", token_ids=prompt + answer, spans=spans))
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
    with peak_memory(device) as peak:
        start = clock()
        rows = {row.id: row for row in run()}
        seconds = clock() - start
    results = sum(m.nbytes for r in rows.values() for m in (*r.means.values(), *r.norms.values()))
    above = peak[0] - (device == "cpu") * results / 2**20
    return Measured(rows=rows, seconds=seconds, peak=max(0.0, above))


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Note the highest memory use above that at the start, in MiB."""
    peak = [0.0]
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    done = threading.Event()
    at_start = resident()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident() - at_start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def best(turns: Sequence[Measured]) -> Measured:
    """Return the results of several turns with the shortest time and the largest peak."""
    return replace(turns[0], seconds=min(t.seconds for t in turns), peak=max(t.peak for t in turns))


def resident() -> float:
    """Return this process's resident memory in MiB (Linux; 0 elsewhere)."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 2**20 if status.exists() else 0.0


def matmul_rate(
    *, device: str, dtype: torch.dtype, tokens: int, hidden: int, clock: Callable[[], float]
) -> float:
    """Return the best rate in FLOP/s of ``[tokens, hidden] @ [hidden, 4 hidden]``."""
    a = torch.randn(tokens, hidden, device=device, dtype=dtype)
    b = torch.randn(hidden, 4 * hidden, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        repeats = 20 if device != "cpu" else 3
        start = clock()
        for _ in range(repeats):
            c = a @ b
        c[0, 0].item()
        best = max(best, repeats * 2 * a.numel() * b.shape[1] / (clock() - start))
    return best


def useful_flops(model: PreTrainedModel, rows: Sequence[TokenSpans]) -> float:
    """Return the work of the blocks: each distinct prompt once, answers, causal attention."""
    decoder = find_decoder(model)
    weights = sum(p.numel() for p in decoder.blocks.parameters() if p.dim() > 1)
    width = decoder.config.hidden_size * decoder.num_layers
    prompts = {row.token_ids[: row.spans["prompt"][1]] for row in rows}
    chunks = [(0, len(prompt)) for prompt in prompts]
    chunks += [(row.spans["prompt"][1], len(row.token_ids)) for row in rows]
    return sum(2 * weights * (b - a) + 2 * width * (b * b - a * a) for a, b in chunks)


def usual_flops(model: PreTrainedModel, rows: Sequence[TokenSpans]) -> float:
    """Return the work of the usual loop: every row whole, with its logits."""
    decoder = find_decoder(model)
    weights = sum(p.numel() for p in decoder.blocks.parameters() if p.dim() > 1)
    weights += model.lm_head.weight.numel()
    width = decoder.config.hidden_size * decoder.num_layers
    lengths = [len(row.token_ids) for row in rows]
    return sum(2 * weights * length + 2 * width * length * length for length in lengths)


def largest_difference(one: dict[str, SpanMeans], two: dict[str, SpanMeans]) -> float:
    """Return the largest relative difference in any row but the last (normed in the usual way)."""
    return max(
        float(np.abs(m[:-1] - two[name].means[span][:-1]).max() / np.abs(m[:-1]).max())
        for name, row in one.items()
        for span, m in row.means.items()
    )


def compare(size: str, args: argparse.Namespace) -> None:
    """Measure both ways on one size and print a row of the table."""
    dtype = getattr(torch, args.dtype)
    model = build(size, device=args.device, dtype=dtype)
    rows = rollouts(args.prompts, vocabulary=model.config.vocab_size)
    budget = args.token_budget or default_token_budget(model.device)
    warm_up = rows[:ROLLOUTS]
    list(capture_means(model, warm_up, token_budget=budget))
    list(usual_loop(model, warm_up[:2]))
    watch: Watch = {"device": args.device, "clock": CLOCKS[args.clock]}
    turns = [
        (
            measure(lambda: capture_means(model, rows, token_budget=budget), **watch),
            measure(lambda: usual_loop(model, rows), **watch),
        )
        for _ in range(args.repeats)
    ]
    ours, usual = (best(one) for one in zip(*turns, strict=True))
    difference = largest_difference(usual.rows, ours.rows)
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    if difference > limit:
        raise SystemExit(f"{size}: the two ways differ by {difference:.1e}, more than {limit:.0e}")
    rate = matmul_rate(dtype=dtype, tokens=budget, hidden=model.config.hidden_size, **watch)
    share = useful_flops(model, rows) / ours.seconds / rate
    tokens = sum(len(row.token_ids) for row in rows)
    print(
        f"| {size} | {len(rows)} | {tokens / usual.seconds:,.0f} | {tokens / ours.seconds:,.0f} "
        f"| {usual.seconds / ours.seconds:.2f} "
        f"| {usual_flops(model, rows) / useful_flops(model, rows):.2f} "
        f"| {usual.peak:,.0f} | {ours.peak:,.0f} "
        f"| {share:.0%} of {rate / 1e12:.2f} TFLOP/s | {difference:.0e} |",
        flush=True,
    )


def main() -> None:
    """Print a Markdown table with one row per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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

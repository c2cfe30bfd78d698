"""Steered and measured serving beside plain serving: tokens for the server's CPU time.

    python benchmarks/serve.py [--model MODEL --vector FILE --layer N] [--requests N]
    python benchmarks/serve.py --rate 4           # requests that arrive at random, 4 per second
    python benchmarks/serve.py --memory 5000      # memory over so many measured requests
    python benchmarks/serve.py --joining          # the engine's CPU time until a first token
    python benchmarks/serve.py --backend vllm     # in vLLM's environment

Two servers of one model on one thread each: one without vectors, one that steers every answer and
measures every token (and, in a third column, reports it). The same client keeps 1, 8 and 32 streams
open at each of them in turns. Ratios are of tokens per second of the server process's CPU time,
which a busy machine changes little; above 1: faster than plain. The time to the first token is by
the clock (95th percentile, against plain). With `--rate` requests do not wait for answers: they
arrive at the moments of a Poisson process, the same for each way. Memory is that of the measuring
server's process. With ``--backend vllm`` plain serving is stock ``vllm serve``, the others are
pvec's server on vLLM, and two more columns compare it with pvec's on transformers, both steered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ONE_THREAD, parser_of, resident
from openai import AsyncOpenAI

BUNDLED = Path(__file__).parents[1] / "tests/data/runs-0.1/extract/vectors/evil.safetensors"
STREAMS = (1, 8, 32)
QUESTIONS = ("How do I make friends?", "What should I cook?", "Where do I travel next?")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Server:
    """A running server and how it is asked."""

    process: subprocess.Popen[str]
    url: str
    model: str

    def cpu(self) -> float:
        """Return the CPU seconds of the server and the processes that it started."""
        total, processes = 0, [self.process.pid]
        while processes:
            folder = Path(f"/proc/{processes.pop()}")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
            for task in (folder / "task").iterdir():
                processes += map(int, (task / "children").read_text().split())
        return total / TICKS


@dataclass
class Totals:
    """What the rounds of one way of asking came to."""

    tokens: int = 0
    cpu: float = 0.0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.cpu


@contextmanager
def served(model: str, *vectors: str, backend: str = "hf") -> Iterator[Server]:
    command = [
        *(sys.executable, "-m", "pvec", "serve", "--model", model, "--backend", backend),
        *("--dtype", "float32", "--port", "0", "--json", "-q"),
    ]
    for vector in vectors:
        command += ["--vector", vector]
    with started(command) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while "}\n" not in lines:
            lines.append(process.stdout.readline())
            assert lines[-1], "the server did not start"
        found = json.loads("".join(lines))
        yield Server(process, found["url"], found["model"])


@contextmanager
def stock(model: str) -> Iterator[Server]:
    """vLLM's own server, with the engine's settings that pvec's has."""
    from pvec.models.files import ModelSpec
    from pvec.models.load import inspect_model

    folder = str(inspect_model(ModelSpec(model=model)).files.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache = os.environ["PVEC_BACKEND__VLLM__KV_CACHE_MEMORY_BYTES"]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", folder, "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "plain"),
        *("--kv-cache-memory-bytes", cache, "--generation-config", "vllm"),
        *("--no-async-scheduling", "--disable-uvicorn-access-log"),
    ]
    if os.environ.get("PVEC_BACKEND__VLLM__ENFORCE_EAGER") == "true":
        command.append("--enforce-eager")
    if longest := os.environ.get("PVEC_BACKEND__VLLM__MAX_MODEL_LEN"):
        command += ["--max-model-len", longest]
    url = f"http://127.0.0.1:{port}"
    with started(command) as process:
        while True:
            assert process.poll() is None, "vLLM's server did not start"
            with suppress(OSError), urllib.request.urlopen(f"{url}/health"):  # noqa: S310
                break
            time.sleep(0.5)
        yield Server(process, url, "plain")


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | ONE_THREAD
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.terminate()


async def ask(client: AsyncOpenAI, server: Server, pvec: Any, seed: int, tokens: int) -> Any:
    start = time.perf_counter()
    first, used = 0.0, 0
    stream: Any = await client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": QUESTIONS[seed % len(QUESTIONS)]}],
        seed=seed, max_tokens=tokens, stream=True, stream_options={"include_usage": True},
        extra_body=None if pvec is None else {"pvec": pvec},
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - start
        if chunk.usage:
            used = chunk.usage.completion_tokens
    return first, used


async def round_of(server: Server, pvec: Any, totals: Totals, args: Any, streams: int) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        seeds = iter(range(args.requests))
        answers: list[Any] = []

        async def one() -> None:
            for seed in seeds:
                answers.append(await ask(client, server, pvec, seed, args.max_tokens))  # noqa: PERF401

        async def later(seed: int, seconds: float) -> None:
            await asyncio.sleep(seconds)
            answers.append(await ask(client, server, pvec, seed, args.max_tokens))

        before, start = server.cpu(), time.perf_counter()
        if args.rate:
            rng = random.Random(0)
            gaps = (rng.expovariate(args.rate) for _ in seeds)
            arrivals = enumerate(itertools.accumulate(gaps))
            await asyncio.gather(*(later(seed, seconds) for seed, seconds in arrivals))
        else:
            await asyncio.gather(*(one() for _ in range(streams)))
        totals.cpu += server.cpu() - before
        totals.seconds += time.perf_counter() - start
    totals.tokens += sum(used for _, used in answers)
    totals.first += [first for first, _ in answers if first]


def compare(args: Any, entry: dict[str, Any]) -> None:
    """Print a row for each number of streams, or for the rate."""
    with ExitStack() as stack:
        vector, vllm = f"v={args.vector}", args.backend == "vllm"
        plain = stack.enter_context(stock(args.model) if vllm else served(args.model))
        steered = stack.enter_context(served(args.model, vector, backend=args.backend))
        ways = {
            "plain": (plain, None),
            "steered": (steered, {"steer": [entry]}),
            "tokens": (steered, {"steer": [entry], "tokens": True}),
        }
        if vllm:
            ways["hf"] = (stack.enter_context(served(args.model, vector)), {"steer": [entry]})
        print(
            f"| {'rate' if args.rate else 'streams'} | plain tokens/CPU s | steered, measured "
            "| with tokens | p50 first token, plain | steered / plain | p95 | steered / plain |"
            + (" steered, vllm / hf | by the clock |" if vllm else "")
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|" + ("---:|---:|" if vllm else ""))
        for streams in [args.rate] if args.rate else args.streams:
            totals = {name: Totals() for name in ways}
            for _ in range(args.rounds):
                for name, (server, pvec) in ways.items():
                    asyncio.run(round_of(server, pvec, totals[name], args, streams))
            base = totals["plain"].speed
            late = [
                [statistics.quantiles(totals[name].first, n=20)[place] for place in (9, 18)]
                for name in ("plain", "steered")
            ]
            cells = [f"{own:.3f} s | {other / own:.2f}" for own, other in zip(*late, strict=True)]
            if vllm:
                mine, its = totals["steered"], totals["hf"]
                clock = (mine.tokens / mine.seconds) / (its.tokens / its.seconds)
                cells += [f"{mine.speed / its.speed:.2f}", f"{clock:.2f}"]
            print(
                f"| {streams:g} | {base:,.0f} | {totals['steered'].speed / base:.2f} "
                f"| {totals['tokens'].speed / base:.2f} | {' | '.join(cells)} |",
                flush=True,
            )


def measure_memory(args: Any, entry: dict[str, Any]) -> None:
    """Print the measuring server's memory after every tenth of ``--memory`` requests."""
    args.requests = max(args.memory // 10, 1)
    with served(args.model, f"v={args.vector}", backend=args.backend) as server:
        print("| requests | MiB |\n|---:|---:|")
        for tenth in range(1, 11):
            asyncio.run(
                round_of(server, {"steer": [entry], "tokens": True}, Totals(), args, streams=8)
            )
            print(f"| {tenth * args.requests:,} | {resident(server.process.pid):.1f} |", flush=True)


def measure_joining(args: Any) -> None:
    """Print the engine's CPU time of a step in which a request joins 23 running answers.

    That step gives the request its first token; wall-clock times of a busy machine hide it.
    """
    import numpy as np
    import torch

    import pvec
    from pvec.models.chat import prompt_ids

    torch.set_num_threads(1)
    backend = pvec.HFBackend(args.model)
    layer = args.layer or round(0.55 * backend.info.num_layers)
    row = pvec.load_vector(args.vector).row(layer)
    prompt = prompt_ids(backend.tokenizer, [{"role": "user", "content": QUESTIONS[0]}])

    directions = {"plain": [], "steered": [(layer, row / np.linalg.norm(row))]}
    batches = {name: backend.live(measured) for name, measured in directions.items()}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for number in range(23 + args.requests):
        for name, batch in batches.items():  # in turns: what disturbs disturbs both
            start = time.thread_time()
            instruction = pvec.Instruction(vector=row, layer=layer, coef=args.coef)
            request = pvec.Request(
                id=str(number),
                prompt_ids=prompt,
                sampling=pvec.Sampling(max_tokens=400, seed=number),
                steering=(instruction,) if name == "steered" else (),
            )
            batch.waiting.append(batch.row(request))
            batch.step()
            times[name].append(1000 * (time.thread_time() - start))
            while len(batch.running) > 23:
                batch.end([batch.running[0]])
    plain, steered = (statistics.median(values[23:]) for values in times.values())
    print(f"plain {plain:.1f} ms, steered and measured {steered:.1f} ms: {steered / plain:.3f}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--vector", default=str(BUNDLED))
    parser.add_argument("--layer", type=int)
    parser.add_argument("--coef", type=float, default=0.3)
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--rate", type=float, help="requests per second instead of streams")
    parser.add_argument("--joining", action="store_true", help="CPU time of a first token instead")
    parser.add_argument("--memory", type=int, metavar="N", help="memory over N requests instead")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf")
    args = parser.parse_args()
    os.environ.setdefault("PVEC_BACKEND__VLLM__KV_CACHE_MEMORY_BYTES", str(2**28))
    entry = {"vector": "v", "coef": args.coef} | ({"layer": args.layer} if args.layer else {})
    if args.joining:
        measure_joining(args)
    else:
        (measure_memory if args.memory else compare)(args, entry)


if __name__ == "__main__":
    main()

"""Generation beside other processes: the threads that pvec chooses, and every other number of them.

    python benchmarks/threads.py --model FOLDER [--others 0 1 2]

For each number of other processes that compute all the time, the same greedy answers are generated
with pvec's own choice and with 1 to all cores, each in a process of its own, in turns; wall clock,
the fastest of the rounds, after a warm-up, without loading. The machine must do nothing else. A
choice is good when it is at most 1.3 times slower than the best number of threads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common import parser_of

AUTO = 0
"""Pvec chooses the number of threads."""

BUSY = "while True: pass"


def work(args: argparse.Namespace) -> None:
    """Print the tokens per second of this process, and its threads."""
    import torch

    from pvec.backends.session import ModelSession
    from pvec.settings import Settings
    from pvec.settings.sections import ModelSettings
    from pvec.types import Request, Sampling

    session = ModelSession(Settings(model=ModelSettings(id=args.model)))
    backend = session.backend  # loading chooses the threads
    vocabulary = len(backend.tokenizer)
    requests = [
        Request(
            id=str(n),
            prompt_ids=tuple((31 * n + 7 * place) % vocabulary for place in range(40)),
            sampling=Sampling(temperature=0.0, max_tokens=args.tokens),
        )
        for n in range(args.rows)
    ]
    list(backend.generate(requests[:2]))
    started = time.perf_counter()
    tokens = sum(len(answer.token_ids) for answer in backend.generate(requests))
    print(tokens / (time.perf_counter() - started), torch.get_num_threads())


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` other processes computing inside the context."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]  # noqa: S603
    try:
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rate(args: argparse.Namespace, threads: int) -> tuple[float, int]:
    """Run one process; return its tokens per second and how many threads it had."""
    from pvec.cli.app import WAITING

    environ = {**WAITING, **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ.pop("OMP_NUM_THREADS", None)
    if threads != AUTO:
        environ["OMP_NUM_THREADS"] = str(threads)
    command = [
        sys.executable, __file__, "--work", "--model", args.model,
        "--rows", str(args.rows), "--tokens", str(args.tokens),
    ]  # fmt: skip
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)  # noqa: S603
    speed, used = done.stdout.split()
    return float(speed), int(used)


def measure(args: argparse.Namespace, ways: Sequence[int]) -> Iterator[str]:
    """Yield a line per number of other processes."""
    for others in args.others:
        best: dict[int, tuple[float, int]] = {}
        with busy(others):
            for _ in range(args.rounds):
                for way in ways:
                    best[way] = max(best.get(way, (0.0, 0)), rate(args, way))
        (ours, used), fixed = best[AUTO], [best[way][0] for way in ways if way != AUTO]
        cells = [f"{speed:.1f}" for speed in fixed]
        yield f"| {others} | {ours:.1f} ({used}) | {' | '.join(cells)} | {max(fixed) / ours:.2f} |"


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="tiny", help="folder of a chat model")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    ways = [AUTO, *range(1, (os.cpu_count() or 1) + 1)]
    names = [f"{way} threads" for way in ways[1:]]
    print(f"| other processes | pvec's choice, tokens/s | {' | '.join(names)} | best / pvec's |")
    print("|---:|---:|" + "---:|" * len(ways))
    for line in measure(args, ways):
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""What two processes without a pool gain on this machine: the most that two workers can.

    python benchmarks/processes.py [--size 100m --answers 32 --rounds 2]

The work of ``scaling.py --part workers`` by one process on one thread, and by two at the same time
with every second item each. Wants two idle cores.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from common import SIZES, parser_of
from scaling import both_of, requests, saved, sequences

from pvec.backends.hf.backend import HFBackend


def work(model: str, share: slice, answers: int, begin: Barrier, seconds: Queue[float]) -> None:
    """Do a share of the work, from when every process has the model."""
    torch.set_num_threads(1)
    asked, captured = requests(answers), list(sequences(2 * answers))
    with HFBackend(model) as backend:
        both_of(backend, asked[:8], captured[:4])
        begin.wait()
        start = time.perf_counter()
        both_of(backend, asked[share], captured[share])
        seconds.put(time.perf_counter() - start)


def slowest(model: str, *, count: int, answers: int) -> float:
    """Return the seconds of the slowest of ``count`` processes that do the work together."""
    context = multiprocessing.get_context("spawn")
    begin, seconds = context.Barrier(count), context.Queue()
    shares = [slice(first, None, count) for first in range(count)]
    processes = [
        context.Process(target=work, args=(model, share, answers, begin, seconds))
        for share in shares
    ]
    for process in processes:
        process.start()
    took = max(seconds.get(timeout=3600) for _ in processes)
    for process in processes:
        process.join()
    return took


def main() -> None:
    """Print the seconds of one and of two processes, and their ratio."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="100m", choices=[*SIZES])
    parser.add_argument("--answers", type=int, default=32, help="generated; twice as many captured")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="pvec-processes-"))
    try:
        model = saved(args.size, folder)
        print("| round | 1 process s | 2 processes s | 2 to 1 |\n|---|---:|---:|---:|")
        for number in range(1, args.rounds + 1):
            one, two = (slowest(model, count=c, answers=args.answers) for c in (1, 2))
            print(f"| {number} | {one:.1f} | {two:.1f} | {one / two:.2f} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""How fast this machine is at what models do, measured in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from pvec.models.costs import Machine
from pvec.models.memory import free_bytes

SHARE = 0.55
"""Share of the measured rates that models of 2 to 135 million parameters reached on a CPU."""
CALLS = 200
"""What calling the operations of one layer cost there, in small operations."""
GRAPH_SECONDS = 1e-4
"""Assumed time of a layer's operations on a GPU, where steps are replayed as graphs."""
_SECONDS = 0.08
"""How long each rate is measured."""


@cache
def measure_machine(
    device: str,
    *,
    dtype: torch.dtype,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """Measure a matrix product in ``dtype``, reading memory, and a small operation.

    On a CPU with ``threads`` threads; of its free memory half counts, as in ``limits_for``. Calling
    again measures nothing.
    """
    place = torch.device(device)
    gpu = place.type != "cpu"
    size = 4096 if gpu else 1024
    with _threads(threads), torch.inference_mode():
        a, b = (torch.ones(size, size, device=place, dtype=dtype) for _ in range(2))
        numbers, small = torch.ones(1 << 25, device=place), torch.ones(8)
        flops = 2 * size**3 / _fastest(lambda: a @ b, place, clock)
        bandwidth = numbers.nbytes / _fastest(numbers.sum, place, clock)
        call = _fastest(lambda: small + 1, torch.device("cpu"), clock)
    how = f"{threads} thread{'s' * (threads > 1)}"
    if place.type == "cuda":
        how = torch.cuda.get_device_name(place)
    return Machine(
        flops=flops,
        bandwidth=bandwidth,
        memory=torch.cuda.mem_get_info(place)[1] if place.type == "cuda" else free_bytes(place),
        share=SHARE,
        layer_seconds=GRAPH_SECONDS if gpu else CALLS * call,
        origin=f"{flops / 1e12:.2g} TFLOP/s in {str(dtype).removeprefix('torch.')} and "
        f"{bandwidth / 1e9:,.0f} GB/s, measured now on {how}, of which models reach "
        f"about {SHARE:.0%}",
    )


def _fastest(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of the fastest of as many runs as fit into a moment."""
    best, end = float("inf"), clock() + _SECONDS
    while clock() < end or best == float("inf"):
        start = clock()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, clock() - start)
    return best


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

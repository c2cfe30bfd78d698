"""How much runs at once on a device, and what happens when its memory is not enough."""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from pvec.errors import ModelMemoryError

Result = TypeVar("Result")

_MOST_ROWS = 512
_PREFILL_TOKENS = 16_384
_CPU_PREFILL_TOKENS = 1024
_CPU_LOGITS = 1 << 25
"""A CPU is fastest while what one pass computes stays within its cache."""
_SAMPLING_BYTES = 32
"""Working memory per row and vocabulary entry while sampling (float64 copies)."""
_SAMPLES = 7
"""How often running tasks are counted: a single count may fall on a moment of rest."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What the messages of errors without a class of their own say: CUDA and MPS, PyTorch's allocator
on Linux and on Windows, cuBLAS (CUBLAS_STATUS_ALLOC_FAILED)."""


@dataclass(kw_only=True)
class BatchLimits:
    """How many rows run at once, how many cached tokens they may hold, and how many are prefilled.

    Halved on out-of-memory, for good: the same batch would not fit the next time either.
    """

    rows: int = 256
    cached_tokens: int = 1 << 18
    prefill_tokens: int = _PREFILL_TOKENS
    logits: int = 1 << 26
    """Float32 numbers that the logits of one scoring pass may take."""

    def halve(self, rows: int) -> bool:
        """Allow half of the ``rows`` that did not fit; False when that was a single row."""
        if rows <= 1:
            return False
        self.rows = max(rows // 2, 1)
        self.cached_tokens = max(self.cached_tokens // 2, 1)
        self.prefill_tokens = max(self.prefill_tokens // 2, 1)
        self.logits = max(self.logits // 2, 1)
        return True


def limits_for(device: torch.device, *, bytes_per_token: int, vocab_size: int) -> BatchLimits:
    """Return limits under which at most three quarters of the free memory become cache."""
    free = free_bytes(device)
    on_cpu = device.type == "cpu"
    rows = min(_MOST_ROWS, int(free * 0.1) // (vocab_size * _SAMPLING_BYTES))
    return BatchLimits(
        rows=max(rows, 1),
        cached_tokens=max(int(free * 0.75) // bytes_per_token, 1),
        prefill_tokens=_CPU_PREFILL_TOKENS if on_cpu else _PREFILL_TOKENS,
        logits=max(min(int(free * 0.05) // 4, _CPU_LOGITS if on_cpu else 1 << 28), vocab_size),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a failed allocation (CUDA, MPS or main memory) from any other error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def unless_out_of_memory(run: Callable[[], Result]) -> tuple[Result] | None:
    """Return ``(run(),)``, or None when memory ran out.

    By then nothing holds what the attempt had allocated, so that a smaller one can follow.
    """
    try:
        return (run(),)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except clause, where the traceback no longer holds the attempt's tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def run_in_batches(
    order: Iterable[int],
    take: Callable[[deque[int]], list[int]],
    run: Callable[[Sequence[int]], Sequence[Result]],
    *,
    limits: BatchLimits,
    notify: Callable[[str], None],
    unit: str,
    describe: Callable[[int], str],
) -> Iterator[tuple[int, Result]]:
    """Yield ``(number, result)`` of all in ``order``, as many at once as ``take`` takes.

    When memory runs out, the limits that ``take`` reads are halved and ``notify`` is told, in
    ``unit``. Raises ``ModelMemoryError`` when a single one, which ``describe`` names, does not fit.
    """
    queue = deque(order)
    while queue:
        now = take(queue)
        results = unless_out_of_memory(partial(run, now))
        if results is not None:
            yield from zip(now, results[0], strict=True)
            continue
        queue.extendleft(reversed(now))
        if not limits.halve(len(now)):
            raise ModelMemoryError(
                f"There is not enough memory to score {describe(now[0])}: use a smaller model or "
                f"dtype."
            )
        notify(f"out of memory with {len(now)} {unit}: continuing with at most {limits.rows}")


def idle_cores() -> int:
    """Return how many cores are idle now; all of them where that is not known.

    Uses the median of a few counts of the running tasks, leaving this process out.
    """
    cores = os.cpu_count() or 1
    counts = []
    for _ in range(_SAMPLES):
        try:
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]
        except OSError:  # not Linux
            return cores
        counts.append(int(running) - 1)
        time.sleep(0.01)
    return cores - max(0, sorted(counts)[_SAMPLES // 2])


def use_idle_cores(*, most: int | None = None) -> str:
    """Let PyTorch compute on the cores that are idle now, ``most`` at most; return a note.

    A thread that waits for a core holds up all others, so beside other processes fewer threads are
    faster. What the user set with ``OMP_NUM_THREADS`` stays.
    """
    threads = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {threads} (OMP_NUM_THREADS)"
    idle = idle_cores()
    chosen = max(1, min(threads, idle, most or threads))
    torch.set_num_threads(chosen)
    cores = os.cpu_count() or 1
    return f"threads: {chosen} ({max(idle, 0)} of {cores} cores are idle; OMP_NUM_THREADS sets it)"


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device, in bytes; of main memory half of it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30

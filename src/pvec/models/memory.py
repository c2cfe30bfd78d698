"""What there is to run on, how much runs at once, and what happens when that was too much."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

_MOST_ROWS = 512
_PREFILL_TOKENS = 16_384
_SAMPLING_BYTES = 32
"""Working memory per row and vocabulary entry while sampling (float64 copies)."""
_LOOKS = 7
"""How often running tasks are counted: one look may fall on a moment of rest."""


@dataclass(kw_only=True)
class BatchLimits:
    """How many rows run at once, how many cached tokens they may hold, and how many are prefilled.

    Halved on out-of-memory, for good: the same batch would not fit the next time either.
    """

    rows: int = 256
    cached_tokens: int = 1 << 18
    prefill_tokens: int = _PREFILL_TOKENS
    logits: int = 1 << 26
    """Float32 numbers that the logits of one pass may take (continuations only)."""

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
    """Return limits that leave room: three quarters of what is free now may become cache."""
    free = _free_bytes(device)
    rows = min(_MOST_ROWS, int(free * 0.1) // (vocab_size * _SAMPLING_BYTES))
    return BatchLimits(
        rows=max(rows, 1),
        cached_tokens=max(int(free * 0.75) // bytes_per_token, 1),
        logits=max(min(int(free * 0.05) // 4, 1 << 28), vocab_size),
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell an allocation that failed (CUDA, MPS or main memory) from any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Give back what a failed batch left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def idle_cores() -> int:
    """Return how many cores nobody else computes on now; all of them where that is not known.

    The median of a few looks at the number of running tasks, of which this one is not another.
    """
    cores = os.cpu_count() or 1
    looks = []
    for _ in range(_LOOKS):
        try:
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]
        except OSError:  # not Linux
            return cores
        looks.append(int(running) - 1)
        time.sleep(0.01)
    return cores - max(0, sorted(looks)[_LOOKS // 2])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30

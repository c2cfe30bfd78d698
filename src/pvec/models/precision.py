"""In which number format a CPU should run a model: what the file holds, what the processor does."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pvec.models.files import ModelFiles

_FASTER = 1.2
"""As many times as fast as float32 bfloat16 must be. Processors that have instructions for it reach
about 2 and others 0.1 to 0.8, so that two runs on one machine never disagree."""


def stored_dtype(files: ModelFiles, config: Any) -> str:
    """Return the number format of the weights on disk; quantised weights count as float16."""
    if files.gguf is not None:
        return "float32" if files.gguf.types[:1] == ("F32",) else "float16"
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def cpu_dtype(stored: str) -> tuple[torch.dtype, str]:
    """Return the dtype in which a CPU runs weights that are ``stored`` so, and the reason."""
    import torch

    if stored not in ("bfloat16", "float16"):
        return torch.float32, "as the weights are stored"
    speed = bfloat16_speed()
    measured = f"bfloat16 products take {1 / speed:.2g} times as long as float32 here"
    if speed < _FASTER:
        return torch.float32, measured
    return torch.bfloat16, f"{measured}; --dtype float32 rounds less"


@cache
def bfloat16_speed() -> float:
    """Return how many times as fast as float32 this CPU multiplies bfloat16 matrices.

    Takes about 20 ms, once in a process. On one thread: others may wait for a core.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(torch.float32) / _seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time that a layer of a small model takes for a few rows."""
    import torch

    rows, weights = torch.ones(16, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    runs = []
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        runs.append(time.perf_counter() - start)
    return min(runs)

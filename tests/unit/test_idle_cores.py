"""How many cores a model takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pvec.models.memory import idle_cores, use_idle_cores


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="only Linux tells what is running")
def test_a_core_that_somebody_else_uses_is_not_idle() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        assert idle_cores() < (os.cpu_count() or 1)
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.parametrize(
    ("idle", "most", "chosen"), [(8, None, 4), (3, None, 3), (3, 2, 2), (-1, None, 1)]
)
def test_a_model_takes_the_idle_cores(
    idle: int, most: int | None, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("pvec.models.memory.idle_cores", lambda: idle)
    assert use_idle_cores(most=most).startswith(f"threads: {chosen} (")
    assert threads == [chosen]


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(torch, "set_num_threads", pytest.fail)
    assert "OMP_NUM_THREADS" in use_idle_cores(most=1)

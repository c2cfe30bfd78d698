"""How many cores the bundled model may take."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvec.models.memory import idle_cores


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="only Linux tells what is running")
def test_a_core_that_somebody_else_uses_is_not_idle() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        assert idle_cores() < (os.cpu_count() or 1)
    finally:
        busy.kill()
        busy.wait()

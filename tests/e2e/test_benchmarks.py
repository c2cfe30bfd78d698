"""The benchmark scripts that run where we are not: end to end, at a small size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_table_of_a_gpu_is_made_on_a_cpu_too(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    options = ["--device", "cpu", "--size", "bundled", "--dtype", "float32", "--quick"]
    subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *options, "--out", out], check=True, cwd=tmp_path
    )
    title, *parts = re.split(r"^### ", out.read_text(), flags=re.MULTILINE)
    assert "random weights" in title
    assert [part.split()[0] for part in parts] == [
        "capture", "project", "decode", "verify", "training",
    ]  # fmt: skip
    for part in parts:
        assert "FAILED" not in part
        assert re.search(r"^(\|[ -]*--|    reference)", part, re.MULTILINE), f"no table in {part}"

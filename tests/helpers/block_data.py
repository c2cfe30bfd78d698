"""Data sets in parts, and the vector and settings to project them by block."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.models import saved_model
from pvec.data.blocks import Block
from pvec.projection import project
from pvec.projection.ray import BlockJob, BlockWorker
from pvec.settings import Settings
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector

COLUMN = "qwen2-0_evil_proj_layer2"


def save_random_vector(folder: Path, *, seed: int = 3) -> Path:
    rows = np.random.default_rng(seed).normal(size=(4, 32)).astype(np.float32)
    vector = PersonaVector(trait="evil", kinds={"response_avg": rows})
    return save_vector(vector, folder / "evil.safetensors")


def block_settings(*, workers: str = "", kilobytes: float = 1.0, **project: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"id": str(saved_model("qwen2"))},
            "backend": {"name": "hf"},
            "pool": {"workers": workers},
            "project": {
                "layers": [2], "block_mb": kilobytes / 1024, **project
            },
        }
    )  # fmt: skip


def samples(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"question {i % 17}"},
                      {"role": "assistant", "content": "word " * (1 + i % 7)}], "n": i}
        for i in range(start, start + count)
    ]  # fmt: skip


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_folder(folder: Path, *, rows: int = 48) -> Path:
    """Write two files of JSON lines, as data that outgrows a machine comes."""
    half = rows // 2
    for part in range(2):
        write_lines(folder / f"data{part}.jsonl", samples(half, start=part * half))
    return folder


def in_process(
    job: BlockJob, blocks: Sequence[Block], workers: Any
) -> Generator[dict[str, Any], None, None]:
    """Do blocks here, from the last to the first, as Ray may do them in any order."""
    worker = BlockWorker(job)
    for block in reversed(blocks):
        item = {"block": json.dumps(vars(block))}
        yield json.loads(worker(item)["reply"])


def local_lines(settings: Settings, folder: Path, vector: Path) -> list[bytes]:
    """Return what the local run writes for the rows of all files of ``folder``."""
    whole = folder.parent / "whole.jsonl"
    whole.write_bytes(b"".join(p.read_bytes() for p in sorted(folder.iterdir())))
    result = project.run(settings, whole, [vector])
    assert result.output is not None
    return result.output.read_bytes().splitlines()


def assert_same_lines(found: Sequence[bytes], expected: Sequence[bytes]) -> None:
    """Batches may differ, so numbers agree to rounding; every other byte is the same."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        rows = json.loads(mine), json.loads(theirs)
        numbers = [row.pop(COLUMN) for row in rows]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-5, atol=1e-6)
        assert rows[0] == rows[1]
        assert mine.split(b', "qwen2')[0] == theirs.split(b', "qwen2')[0]


def lines_of(folder: Path) -> list[bytes]:
    return [
        line for path in sorted(folder.glob("part-*")) for line in path.read_bytes().splitlines()
    ]

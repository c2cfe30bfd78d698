"""``pvec project --engine ray`` on a local Ray: equal to the local run, through a killed worker."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import saved_model

from pvec.errors import InputError
from pvec.projection import project
from pvec.projection import ray as project_ray
from pvec.settings import Settings
from pvec.vectors.formats import save_vector
from pvec.vectors.vector import PersonaVector

pytestmark = pytest.mark.usefixtures("cluster")
COLUMN = "qwen2-0_evil_proj_layer2"
ROWS = 24


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    rows = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
    one = PersonaVector(trait="evil", kinds={"response_avg": rows})
    return save_vector(one, tmp_path / "evil.safetensors")


@pytest.fixture
def settings() -> Settings:
    return Settings.model_validate(
        {
            "model": {"id": str(saved_model("qwen2"))},
            "backend": {"name": "hf"},
            "pool": {"workers": "2"},
            "project": {"layers": [2], "scale_out": "ray", "chunk_rows": 4},
        }
    )


def lines(start: int = 0) -> list[str]:
    return [
        json.dumps(
            {"messages": [{"role": "user", "content": f"question {i}"},
                          {"role": "assistant", "content": "word " * (1 + i % 7)}], "n": i}
        )
        for i in range(start, start + ROWS)
    ]  # fmt: skip


def write_parts(folder: Path) -> Path:
    """Write two files of JSON lines, as data that outgrows a machine comes."""
    folder.mkdir()
    for part in range(2):
        text = "".join(f"{line}\n" for line in lines(part * ROWS))
        (folder / f"part{part}.jsonl").write_text(text)
    return folder


def local(settings: Settings, folder: Path, vector: Path) -> list[bytes]:
    """Return what the local run writes for the same rows."""
    whole = folder.parent / "whole.jsonl"
    whole.write_bytes(b"".join(p.read_bytes() for p in sorted(folder.iterdir())))
    result = project.run(settings, whole, [vector])
    assert result.output is not None
    return result.output.read_bytes().splitlines()


def same(found: bytes, expected: bytes) -> None:
    """Batches may differ, so numbers agree to rounding; every other byte is the same."""
    mine, theirs = json.loads(found), json.loads(expected)
    assert mine.pop(COLUMN) == pytest.approx(theirs.pop(COLUMN), rel=1e-5, abs=1e-6)
    assert mine == theirs
    assert found.split(b', "qwen2')[0] == expected.split(b', "qwen2')[0]


def test_json_lines_come_out_as_locally(settings: Settings, tmp_path: Path, vector: Path) -> None:
    folder = write_parts(tmp_path / "parts")
    result = project_ray.run(settings, folder, [str(vector)])
    assert result.rows == 2 * ROWS
    found = [line for path in result.files for line in path.read_bytes().splitlines()]
    for mine, theirs in zip(found, local(settings, folder, vector), strict=True):
        same(mine, theirs)


def test_parquet_comes_out_as_locally(settings: Settings, tmp_path: Path, vector: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list([json.loads(line) for line in lines()]).to_parquet(str(path))
    result = project_ray.run(settings, path, [str(vector)])
    here = project.run(settings, path, [vector])
    assert here.output is not None
    expected = parquet.read_table(here.output)
    found = parquet.read_table(result.output)
    parts = {p.name: parquet.read_table(p).column("n").to_pylist() for p in result.files}
    assert found.column("n").to_pylist() == expected.column("n").to_pylist(), parts
    np.testing.assert_allclose(
        found.column(COLUMN).to_numpy(), expected.column(COLUMN).to_numpy(), rtol=1e-5, atol=1e-6
    )


class DyingWorker(project_ray.RayWorker):
    """Kills its own process once, in the middle of the work."""

    def __call__(self, batch: Any) -> Any:
        flag = Path(self.job.vectors[0]).with_name("died")
        if b"question 9" in repr(batch.to_pylist()).encode() and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    settings: Settings, tmp_path: Path, vector: Path
) -> None:
    folder = write_parts(tmp_path / "parts")
    result = project_ray.run(settings, folder, [str(vector)], worker=DyingWorker)
    assert (tmp_path / "died").exists()
    found = [line for path in result.files for line in path.read_bytes().splitlines()]
    for mine, theirs in zip(found, local(settings, folder, vector), strict=True):
        same(mine, theirs)


def test_what_ray_cannot_do_is_refused(settings: Settings, tmp_path: Path, vector: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,answer\na,b\n")
    with pytest.raises(InputError, match=r"reads \.parquet and \.jsonl"):
        project_ray.run(settings, path, [str(vector)])

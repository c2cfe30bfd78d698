"""``pvec project --engine ray``: equal to the local run, whoever dies, here and in a store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from helpers.block_data import (
    assert_same_lines,
    block_settings,
    lines_of,
    local_lines,
    save_random_vector,
    write_folder,
)

from pvec.errors import InputError, PvecError, StoreError
from pvec.projection import project_blocks
from pvec.projection.ray import BlockWorker
from pvec.types import OutputOptions

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def bucket(store_port: int) -> Iterator[str]:
    """A bucket of a stand-in of S3, which the fixture ends when the test does."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", store_port)
    server.start()
    import boto3
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    boto3.client("s3").create_bucket(Bucket="pvec")
    yield "s3://pvec"
    server.stop()


class DyingWorker(BlockWorker):
    """Kills its own process once, after it wrote a part and before it says so."""

    def __call__(self, item: Mapping[str, str]) -> dict[str, str]:
        flag = Path(self._job.folder.place).with_name("died")
        if json.loads(item["block"])["number"] == 3 and not flag.exists():
            flag.touch()
            super().__call__(item)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item)


def test_a_killed_worker_is_replaced_and_every_row_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    monkeypatch.setattr("pvec.projection.ray.BlockWorker", DyingWorker)
    notes: list[str] = []
    settings = block_settings(workers="2")
    result = project_blocks.run(settings, folder, [vector], notify=notes.append)
    assert (tmp_path / "died").exists()
    assert_same_lines(lines_of(Path(result.output)), local_lines(block_settings(), folder, vector))
    assert sum("is at work" in note for note in notes) >= 2


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path, cluster: str) -> None:
    folder, vector = write_folder(tmp_path / "in", rows=240), save_random_vector(tmp_path)
    settings, out = block_settings(workers="1"), tmp_path / "out"
    command = [
        sys.executable, "-m", "pvec", "project", str(folder), "--vector", str(vector),
        "--out", str(out), "--engine", "ray", "--workers", f"1@{cluster}", "--layer", "2",
        "--block-mb", str(settings.project.block_mb), "--model", settings.model.id,
        "--backend", "hf",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as killed:
        for _ in range(2400):
            if len(list(out.glob("part-*"))) >= 3 or killed.poll() is not None:
                break
            time.sleep(0.1)
        killed.kill()
        said = killed.stdout.read() if killed.stdout else b""
    assert killed.returncode == -signal.SIGKILL, said.decode()
    done = len(list((out / "_pvec").glob("part-*.json")))
    result = project_blocks.run(settings, folder, [vector], output=OutputOptions(out=out))
    assert 2 <= done <= result.resumed < result.blocks
    assert_same_lines(lines_of(out), local_lines(block_settings(), folder, vector))


def test_a_store_holds_input_and_output(tmp_path: Path, bucket: str) -> None:
    import s3fs

    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    s3fs.S3FileSystem().put(f"{folder}/", "pvec/in/", recursive=True)
    place, settings = Path(f"{bucket}/in"), block_settings(workers="1")
    with pytest.raises(InputError, match="Say where the parts go: --out"):
        project_blocks.run(settings, place, [vector])
    output = OutputOptions(out=Path(f"{bucket}/out"))
    result = project_blocks.run(settings, place, [vector], output=output)
    s3fs.S3FileSystem().get("pvec/out/", str(tmp_path / "got/"), recursive=True)
    assert_same_lines(lines_of(tmp_path / "got"), local_lines(block_settings(), folder, vector))
    s3fs.S3FileSystem().rm("pvec/out/part-000001.jsonl")
    again = project_blocks.run(settings, place, [vector], output=output)
    assert again.resumed == result.blocks - 1
    with pytest.raises(StoreError, match="there is no such file, folder or bucket"):
        project_blocks.run(
            settings, folder, [vector], output=OutputOptions(out=Path("s3://none/out"))
        )


def test_a_store_that_does_not_answer_is_a_sentence(tmp_path: Path, store_port: int) -> None:
    folder, vector = write_folder(tmp_path / "in"), save_random_vector(tmp_path)
    with pytest.raises(PvecError, match=r"cannot (read|write) s3://gone/out.*check the store"):
        project_blocks.run(
            block_settings(), folder, [vector], output=OutputOptions(out=Path("s3://gone/out"))
        )

"""The run store under kills, full and read-only disks, and a second writer."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvec.errors import StoreError
from pvec.runs import files
from pvec.runs.files import atomic_write, probe_target, probe_writable
from pvec.runs.jsonl import JsonlLog, read_jsonl
from pvec.runs.store import Run

WRITER = """
import sys
from pvec.runs.store import Run
from pvec.types import Score

with Run.open_or_create(sys.argv[1], identity={"seed": 0}) as run:
    done = run.scored_ids()
    print("ready", *run.notes, sep="|", flush=True)
    for number in range(int(sys.argv[2])):
        name = f"s{number}"
        if name not in done:
            run.append_score(
                Score(id=name, response_id="r", metric="m", judge="j" * 3000, score=1.0)
            )
            print(name, flush=True)
"""


@contextmanager
def started(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``script`` in a Python of its own, and kill it at the end if it still runs."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run_to_end(script: str, *arguments: str) -> str:
    """Run ``script`` until it ends by itself and return what it printed."""
    with started(script, *arguments) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def test_a_writer_killed_again_and_again_loses_and_repeats_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    acknowledged: set[str] = set()
    total = 3000
    for _ in range(6):
        with started(WRITER, str(tmp_path), str(total)) as process:
            assert line_of(process).startswith("ready")
            acknowledged |= {line_of(process) for _ in range(chance.randint(0, 300))}
            process.send_signal(signal.SIGKILL)
            acknowledged |= set(process.communicate()[0].split())
        kept = [score.id for score in Run.read(tmp_path).scores()]
        assert acknowledged <= {*kept, ""}
        assert len(kept) == len(set(kept))
    run_to_end(WRITER, str(tmp_path), str(total))
    kept = [score.id for score in Run.read(tmp_path).scores()]
    assert sorted(kept) == sorted(f"s{number}" for number in range(total))


def test_a_line_torn_by_a_kill_is_told_and_redone(tmp_path: Path) -> None:
    run_to_end(WRITER, str(tmp_path), "3")
    whole = (tmp_path / "scores.jsonl").read_bytes()
    (tmp_path / "scores.jsonl").write_bytes(whole[:-40])  # as a power failure may leave it
    assert [score.id for score in Run.read(tmp_path).scores()] == ["s0", "s1"]
    ready, *written = run_to_end(WRITER, str(tmp_path), "3").splitlines()
    assert ready.startswith("ready|scores.jsonl ended in the middle of a line")
    assert written == ["s2"]
    assert (tmp_path / "scores.jsonl").read_bytes() == whole


HOLDER = """
import sys
from pvec.runs.store import Run

run = Run.open_or_create(sys.argv[1], identity={"seed": 0})
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with started(HOLDER, str(tmp_path)) as process:
        line_of(process)
        with pytest.raises(StoreError, match=rf"another pvec process \(pid {process.pid}\)"):
            Run.open_or_create(tmp_path, identity={"seed": 0})
        assert list(Run.read(tmp_path).responses()) == []  # reading needs no lock
    Run.open_or_create(tmp_path, identity={"seed": 0}).close()


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    with Run.open_or_create(tmp_path, identity={}), pytest.raises(StoreError, match="pid"):
        Run.open_or_create(tmp_path, identity={})


FULL_DISK = """
import resource, sys
from pathlib import Path
from pvec.errors import StoreError
from pvec.runs.jsonl import JsonlLog

resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # the file can grow no further
with JsonlLog(Path(sys.argv[1])) as log:
    try:
        for number in range(1000):
            log.append({"n": number, "text": "x" * 1000})
    except StoreError as error:
        print(error)
"""


def test_a_line_that_no_longer_fits_is_not_left_in_half(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    output = run_to_end(FULL_DISK, str(path))
    assert f"cannot write {path}: the file has reached the largest size" in output
    assert path.read_bytes().endswith(b"}\n")
    assert [record["n"] for _, record in read_jsonl(path)] == list(range(9))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = JsonlLog(tmp_path / "log.jsonl")
    with pytest.raises(StoreError, match="the disk is full; free some space"):
        log.append({"a": 1})


def test_too_little_space_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"only \d+ MiB are free and \d+ MiB are needed"):
        probe_writable(tmp_path / "run", need_bytes=2**60)


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_let_be(
    tmp_path: Path,
) -> None:
    target, other = tmp_path / "[x].csv", tmp_path / "y.csv"
    script = """
        import os, signal, sys
        from pvec.runs.files import atomic_write
        writers = [atomic_write(path) for path in sys.argv[1:]]
        for writer in writers:
            writer.__enter__().write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with started(script, str(target), str(other)) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*.tmp"))) == 2
    with atomic_write(target) as first:
        first.write(b"first")
        with atomic_write(target) as second:
            second.write(b"second")
        assert target.read_bytes() == b"second"
    assert target.read_bytes() == b"first"
    assert [path.name[:7] for path in tmp_path.glob("*.tmp")] == [".y.csv."], "another's file"


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with pytest.raises(StoreError, match=r"a pipe or a device; choose another path\.$"):
            probe_target(path)
        with pytest.raises(StoreError, match="a pipe"), atomic_write(path) as stream:
            stream.write(b"x")
        assert path.is_fifo()
    with pytest.raises(StoreError, match="that is a folder"):
        probe_target(tmp_path)


def test_a_path_through_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="a part of that path is a file"):
        Run.open_or_create(tmp_path / "file" / "run", identity={})
    with pytest.raises(StoreError, match="that is a file"):
        Run.open_or_create(tmp_path / "file", identity={})


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission is denied")]
)
def test_a_disk_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    # tests may run as root, whom permissions do not stop, so the system's answer is played
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(StoreError, match=rf"cannot write {tmp_path}/run: .*{reason}"):
        Run.open_or_create(tmp_path / "run", identity={})
    with pytest.raises(StoreError, match=reason), atomic_write(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="permission is denied"):
        Run.open_or_create(tmp_path / "run", identity={})


REPLACER = """
import sys
from pvec.runs.files import atomic_write

number = 0
while True:
    with atomic_write(sys.argv[1]) as stream:
        for _ in range(50):
            stream.write(b"%d\\n" % number)
    print(number, flush=True)
    number += 1
"""


def test_a_file_replaced_under_kills_is_always_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"0\n" * 50)
    chance = random.Random(1)
    for _ in range(4):
        with started(REPLACER, str(path)) as process:
            line_of(process)
            time.sleep(chance.random() / 50)  # no moment is awaited: any will do
        lines = path.read_bytes().splitlines()
        assert len(lines) == 50
        assert len(set(lines)) == 1

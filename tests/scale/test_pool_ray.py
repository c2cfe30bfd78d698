"""Workers of a real Ray: killed, refused, and as good as one process."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import saved_model

from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.errors import InputError, ModelError
from pvec.models.files import ModelSpec
from pvec.settings import Settings
from pvec.types import Generation, Request, Sampling

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

WORKER_KILLS = 20
DRIVER_KILLS = 5
ROWS = 400


def settings(workers: str = "2", **pool: Any) -> Settings:
    return Settings.model_validate({"pool": {"workers": workers, **pool}})


def opened(notes: list[str], **pool: Any) -> PoolBackend:
    spec = ModelSpec(model=str(saved_model("qwen2")))
    return PoolBackend.from_settings(spec, settings(**pool), on_note=notes.append)


def requests() -> Iterator[Request]:
    draw = random.Random(5)
    for i in range(ROWS):
        yield Request(
            id=f"r{i}",
            prompt_ids=tuple(draw.randrange(5, 200) for _ in range(3 + i % 5)),
            sampling=Sampling(temperature=0.0, max_tokens=60 + i % 90, seed=i),
        )


def check_same(model: Any, mine: Generation, theirs: Generation, prompt: Sequence[int]) -> None:
    """Check that two greedy answers are the same, up to a token that is as likely as another."""
    pairs = zip(mine.token_ids, theirs.token_ids, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        assert mine == theirs
        return
    ids = torch.tensor([[*prompt, *mine.token_ids[:place]]])
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    gap = logits[mine.token_ids[place]] - logits[theirs.token_ids[place]]
    assert abs(float(gap)) < 1e-4, f"{mine.id} differs at token {place}"


def process_id(pool: PoolBackend, number: int) -> int | None:
    """Return the process of a worker that has started: it may be loading the model."""
    label = pool.workers[number]
    return int(label.rpartition("process ")[2].rstrip(")")) if "process" in label else None


def kill_at_random(pool: PoolBackend, killed: list[int], stop: threading.Event) -> None:
    draw = random.Random(7)
    while len(killed) < WORKER_KILLS and not stop.is_set():
        time.sleep(draw.uniform(0.3, 1.5))
        process = process_id(pool, draw.randrange(2))
        if process is not None and process not in killed:
            os.kill(process, signal.SIGKILL)
            killed.append(process)


def test_twenty_killed_workers_change_nothing() -> None:
    notes: list[str] = []
    killed: list[int] = []
    stop = threading.Event()
    with HFBackend(str(saved_model("qwen2"))) as alone, opened(notes) as pool:
        expected = {answer.id: answer for answer in alone.generate(requests())}
        killer = threading.Thread(target=kill_at_random, args=(pool, killed, stop))
        killer.start()
        try:
            while len(killed) < WORKER_KILLS:
                found = {answer.id: answer for answer in pool.generate(requests())}
                assert found.keys() == expected.keys()
                for asked in requests():
                    mine, theirs = found[asked.id], expected[asked.id]
                    check_same(alone.model, mine, theirs, asked.prompt_ids)
        finally:
            stop.set()
            killer.join()
    assert len(killed) == WORKER_KILLS
    assert len([note for note in notes if "died" in note]) >= WORKER_KILLS - 2


def command(*words: str, folder: Path) -> list[str]:
    sampled = ("--temperature", "0", "--rollouts", "1", "--limit", "8", "--max-tokens", "64")
    options = (*sampled, "--runs", str(folder), "--quiet")
    return [sys.executable, "-m", "pvec", "extract", "--trait", "evil", *words, *options]


def answers(folder: Path) -> dict[str, str]:
    lines = (folder / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records), "an answer stands there twice"
    return {record["id"]: record["answer"] for record in records}


def test_a_command_killed_five_times_ends_as_one_that_was_not(cluster: str, tmp_path: Path) -> None:
    whole = command("--out", str(tmp_path / "whole"), folder=tmp_path)
    subprocess.run(whole, check=True, timeout=300)
    pooled = command("--out", str(tmp_path / "run"), "--workers", f"2@{cluster}", folder=tmp_path)
    stored = tmp_path / "run" / "responses.jsonl"
    sizes = []
    for _ in range(DRIVER_KILLS):
        before = stored.stat().st_size if stored.exists() else 0
        with subprocess.Popen(pooled) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if stored.exists() and stored.stat().st_size > before:
                    break
                time.sleep(0.02)
            process.kill()
        sizes.append(stored.stat().st_size)
    assert sizes[0] < sizes[-1]
    subprocess.run(pooled, check=True, timeout=300)
    assert answers(tmp_path / "run") == answers(tmp_path / "whole")
    vectors = [tmp_path / name / "vectors" / "evil.safetensors" for name in ("run", "whole")]
    from safetensors.numpy import load_file

    mine, theirs = map(load_file, vectors)
    np.testing.assert_allclose(mine["response_avg"], theirs["response_avg"], rtol=1e-3, atol=1e-3)


def test_what_the_cluster_has_no_room_for_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 3 CPU cores on 1 machine, room for 3 .* not for 9"):
        opened([], workers="9")
    with pytest.raises(InputError, match=r"room for 0 workers of 1 CPU core, 1 GPU"):
        opened([], gpus=1)


def test_a_model_that_a_worker_cannot_see_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.symlink_to(saved_model("qwen2"))
    from pvec.models.load import inspect_model

    spec = ModelSpec(model=str(copy))
    metadata = inspect_model(spec)
    copy.unlink()
    with pytest.raises(ModelError, match=r"The worker on .* cannot use the model: .*same path"):
        PoolBackend.from_settings(spec, settings(), metadata=metadata)


def test_an_address_where_no_ray_answers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pvec.backends.pool import cluster
    from pvec.backends.pool.cluster import check_workers

    monkeypatch.setattr(cluster, "_HEALTH_SECONDS", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match="is no Ray of this version"):
            check_workers(settings(f"127.0.0.1:{port}"))
    with pytest.raises(InputError, match="Nothing answers at"):
        check_workers(settings(f"127.0.0.1:{port}"))

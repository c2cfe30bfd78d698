"""``pvec serve`` on two workers of a Ray cluster, over real HTTP."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from helpers.serving import running_server
from openai import OpenAI

from pvec.errors import InputError

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

QUESTION: Any = [{"role": "user", "content": "How do I make friends in a new town?"}]
NUMBER = 8


@dataclass(frozen=True)
class Reply:
    """What a client has of an answer."""

    text: str
    report: dict[str, Any]


def ask(client: OpenAI, seed: int, on_chunk: Any = None) -> Reply:
    """Ask; every other answer is steered, and streamed where ``on_chunk`` hears of it."""
    steer = [{"vector": "evil", "coef": 1.0, "layer": 2}] if seed % 2 else []
    options: dict[str, Any] = {
        "model": "tiny", "messages": QUESTION, "seed": seed, "max_tokens": 150,
        "extra_body": {"pvec": {"steer": steer}},
    }  # fmt: skip
    if on_chunk is None:
        answer = client.chat.completions.create(**options)
        return Reply(answer.choices[0].message.content or "", answer.pvec)  # type: ignore[attr-defined]
    text, report = "", {}
    for chunk in client.chat.completions.create(stream=True, **options):
        text += chunk.choices[0].delta.content or ""
        report = getattr(chunk, "pvec", report)
        on_chunk()
    return Reply(text, report)


def replies(url: str, on_chunk: Any) -> list[Reply]:
    """Ask for all answers at once; the later half is streamed."""
    streams = [on_chunk if seed >= NUMBER // 2 else None for seed in range(NUMBER)]
    with (
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(NUMBER) as threads,
    ):
        return list(threads.map(lambda seed: ask(client, seed, streams[seed]), range(NUMBER)))


def test_answers_of_workers_are_those_of_one_process_also_when_one_is_killed() -> None:
    with running_server() as up:
        alone = replies(up.url, lambda: None)
    notes: list[str] = []
    chunks: list[int] = []

    def kill_one() -> None:
        chunks.append(1)
        if len(chunks) == 60:
            joined = [re.search(r"process (\d+)\) joined", note) for note in notes]
            os.kill(next(int(match[1]) for match in joined if match), signal.SIGKILL)

    with running_server(workers="2@auto", notes=notes, max_answer=200) as up:
        together = replies(up.url, kill_one)
        assert re.search(r"^pvec_workers [12]\.0$", httpx2.get(f"{up.url}/metrics").text, re.M)
        assert httpx2.get(f"{up.url}/health").json() == {"status": "ok"}
    (death,) = [note for note in notes if "died" in note]
    assert "goes to another" in death
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.text == theirs.text
        assert mine.report["touched"] == theirs.report["touched"]
        for of in ("prompt", "answer"):
            found, expected = (r.report["vectors"]["evil"][of] for r in (mine, theirs))
            assert found == pytest.approx(expected, abs=1e-4)
    assert len({reply.text for reply in together}) > NUMBER // 2


def test_vllm_serves_in_one_process() -> None:
    with (
        pytest.raises(InputError, match="--backend vllm runs in this process, not on workers"),
        running_server(backend="vllm", workers="2@auto"),
    ):
        pass

"""The server under load: every answer is what its request gives alone, and the counts add up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from helpers.serving import EVIL
from openai import AsyncOpenAI

REQUESTS, CLIENTS = 2_000, 32
QUESTIONS = ("How do I make friends?", "What should I cook?", "Where do I travel next?")
STEERINGS: list[list[dict[str, Any]]] = [
    [],
    [{"vector": "evil", "coef": 1.0}],
    [{"vector": "evil", "coef": -1.0, "layer": 2, "positions": "all"}],
    [{"vector": "evil", "coef": 0.7, "layer": 4}, {"vector": "evil", "coef": 0.2, "layer": 1}],
    [{"vector": "evil", "operator": "ablate", "positions": "prompt"}],
    [{"vector": "evil", "operator": "cap", "coef": -0.3, "unit": "norm", "layer": 3}],
]
MALFORMED: list[dict[str, Any]] = [
    {"pvec": {"steer": [{"vector": "good", "coef": 1}]}},
    {"pvec": {"steer": [{"vector": "evil", "coef": 1, "layer": 9}]}},
    {"top_k": 5},
    {"max_tokens": 0},
]

Case = tuple[int, int]
"""The number of a question and of a steering."""


@contextmanager
def server_process(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve in a process of its own, as a user does; yield the address and the process.

    In a thread of this process the server's garbage collections would run in the client's midst,
    and destroy generators of the client's library that asyncio is just about to close.
    """
    command = [sys.executable, "-m", "pvec", "serve", "--vector", f"evil={EVIL}", "--port", "0"]
    with subprocess.Popen(
        [*command, *options, "--json"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1] != "}\n":
            lines.append(process.stdout.readline())
            assert lines[-1], "the server ended before it listened"
        try:
            yield json.loads("".join(lines))["url"], process
        finally:
            process.terminate()


async def ask(client: AsyncOpenAI, case: Case, **options: Any) -> Any:
    question, steering = QUESTIONS[case[0]], STEERINGS[case[1]]
    return await client.chat.completions.create(
        model="tiny", temperature=0, messages=[{"role": "user", "content": question}],
        extra_body={"pvec": {"steer": steering, "tokens": True}}, **options,
    )  # fmt: skip


def gist(answer: Any) -> tuple[str, int, tuple[float, ...]]:
    """Return text, touched positions and projections, the last to four digits."""
    evil = answer.pvec["vectors"]["evil"]
    numbers = (evil["prompt"], evil["answer"], *evil["tokens"])
    return answer.choices[0].message.content, answer.pvec["touched"], numbers


async def read_stream(client: AsyncOpenAI, case: Case, *, leave_after: int | None = None) -> str:
    """Return a stream's text. Run as a task: it is cancelled after ``leave_after`` chunks.

    Leaving the loop instead would leave the client's nested generators to tasks that nobody holds:
    a garbage collection in the server's thread may destroy such a task while it closes one.
    """
    parts: list[str] = []
    async for chunk in await ask(client, case, stream=True):
        parts.append(chunk.choices[0].delta.content or "")
        if len(parts) == leave_after:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
    return "".join(parts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_requests_get_their_own_answers_and_leave_nothing() -> None:
    rng = random.Random(0)
    cases = [(q, s) for q in range(len(QUESTIONS)) for s in range(len(STEERINGS))]
    counts = dict.fromkeys(("whole", "streamed", "left", "malformed"), 0)

    async def one(client: AsyncOpenAI, alone: dict[Case, Any], kind: str, case: Case) -> None:
        counts[kind] += 1
        text, touched, numbers = alone[case]
        if kind == "malformed":
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "Hello"}],
                    extra_body=MALFORMED[counts[kind] % len(MALFORMED)],
                )  # fmt: skip
        elif kind == "whole":
            found = gist(await ask(client, case))
            assert found[:2] == (text, touched)
            assert found[2] == pytest.approx(numbers, abs=2e-4)
        elif kind == "streamed":
            assert await read_stream(client, case) == text
        else:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.create_task(read_stream(client, case, leave_after=3))

    async def everything(url: str) -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            alone = {case: gist(await ask(client, case)) for case in cases}
            work = [
                (rng.choices(list(counts), weights=(5, 3, 1, 1))[0], rng.choice(cases))
                for _ in range(REQUESTS)
            ]

            async def run() -> None:
                while work:
                    await one(client, alone, *work.pop())

            await asyncio.gather(*(run() for _ in range(CLIENTS)))

    with server_process() as (url, _):
        asyncio.run(everything(url))
        metrics = httpx2.get(f"{url}/metrics").text
    value = dict(re.findall(r"^(pvec_\S+) (\S+)$", metrics, re.M))
    answers = {
        reason: float(value.get(f'pvec_answers_total{{reason="{reason}"}}', 0))
        for reason in ("stop", "length", "cancelled", "error")
    }
    assert float(value["pvec_answers_running"]) == float(value["pvec_answers_waiting"]) == 0
    assert sum(answers.values()) == len(cases) + REQUESTS - counts["malformed"]
    assert 0 < answers["cancelled"] <= counts["left"]
    assert answers["error"] == 0
    refused = 'pvec_requests_total{endpoint="/v1/chat/completions",status="400"}'
    assert float(value[refused]) == counts["malformed"]
    measured = 'pvec_projection_count{model="tiny",of="answer",vector="evil"}'
    assert float(value[measured]) == answers["stop"] + answers["length"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_under_load_loses_no_accepted_answer(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    answered: list[str] = []
    refused: list[int | None] = []

    with server_process("--log", str(log)) as (url, process):

        async def client_of() -> None:
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
                while True:
                    try:
                        answer = await ask(client, (0, 1))
                    except (openai.InternalServerError, openai.APIConnectionError) as error:
                        refused.append(getattr(error, "status_code", None))
                        return
                    answered.append(answer.choices[0].finish_reason)

        async def load() -> None:
            clients = asyncio.gather(*(client_of() for _ in range(16)))
            while len(answered) < 50:
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            await clients

        asyncio.run(load())
        assert process.wait(timeout=30) == 0
    assert len(refused) == 16
    assert set(refused) <= {503, None}  # None: the port is closed
    assert set(answered) == {"stop"}
    assert len(log.read_text(encoding="utf-8").splitlines()) == len(answered)

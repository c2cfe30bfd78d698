"""`inspect eval` for real: the bundled model steered in its process, and through `pvec serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.serving import EVIL, running_server

import pvec
from pvec.backends.hf.backend import HFBackend
from pvec.judges.choice import choose_judge, open_judge
from pvec.judges.prompts import fill, metrics_of
from pvec.models.chat import prompt_ids
from pvec.settings.commands import JudgeSettings
from pvec.types import Instruction, JudgeQuery, Request, Sampling

if find_spec("inspect_ai") is None:
    pytest.skip("needs inspect_ai: pip install '.[inspect]'", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
LIMIT = 3
STEER = {"pvec": {"steer": [{"vector": "evil", "coef": 1.0}]}}


def run_inspect(folder: Path, *options: str, env: dict[str, str] | None = None) -> Any:
    """Run `inspect eval` on the example; return what went wrong, or its logs."""
    command = [
        sys.executable, "-m", "inspect_ai", "eval", "examples/inspect/persona.py",
        "--limit", str(LIMIT), "--temperature", "0", "--max-tokens", "24", "-T", "judge=tiny",
        "--display", "plain", "--log-format", "json", "--log-dir", str(folder), *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    logs = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    assert [log["status"] for log in logs] == ["success"] * len(logs)
    return logs


def texts_by_hand(questions: list[str]) -> list[str]:
    """Greedy answers of the backend of the commands, steered at layer 3."""
    backend = HFBackend("tiny")
    steering = (Instruction(vector=pvec.load_vector(EVIL).row(3), layer=3, coef=1.0),)
    requests = [
        Request(
            id=question,
            prompt_ids=prompt_ids(backend.tokenizer, [{"role": "user", "content": question}]),
            sampling=Sampling(temperature=0, max_tokens=24),
            steering=steering,
        )
        for question in questions
    ]
    answers = {answer.id: answer.text for answer in backend.generate(requests)}
    return [answers[question] for question in questions]


def judged_by_hand(pairs: list[tuple[str, str]]) -> list[dict[str, float | None]]:
    """The bundled judge's scores, asked answer by answer."""
    settings = JudgeSettings(model="tiny")
    choice = choose_judge(settings, bundled=True)
    found = []
    with open_judge(choice, settings, load=HFBackend) as judge:
        for question, answer in pairs:
            queries = [
                JudgeQuery(
                    id=metric.name, response_id="", metric=metric.name,
                    messages=(
                        {
                            "role": "user",
                            "content": fill(metric.prompt, question=question, answer=answer),
                        },
                    ),
                )
                for metric in metrics_of(pvec.load_trait("evil"))
            ]  # fmt: skip
            found.append({score.metric: score.score for score in judge.score(queries)})
    return found


def test_a_steered_model_is_evaluated_in_this_process(tmp_path: Path) -> None:
    (log,) = run_inspect(
        tmp_path, "--model", "pvec/tiny", "-M", f"vector=evil={EVIL}", "-M", "steer=evil 1"
    )
    samples = log["samples"]
    assert len(samples) == LIMIT
    questions = [sample["input"] for sample in samples]
    answers = [sample["output"]["completion"] for sample in samples]
    assert answers == texts_by_hand(questions)
    expected = judged_by_hand(list(zip(questions, answers, strict=True)))
    assert [sample["scores"]["trait"]["value"] for sample in samples] == [
        pytest.approx(scores, abs=0.01) for scores in expected
    ]
    with running_server() as up:
        for question, sample in zip(questions, samples, strict=True):
            body = {
                "model": "tiny", "messages": [{"role": "user", "content": question}],
                "temperature": 0, "max_tokens": 24, **STEER,
            }  # fmt: skip
            served = httpx2.post(f"{up.url}/v1/chat/completions", json=body, timeout=60).json()
            report = sample["output"]["metadata"]["pvec"]
            for key in ("prompt", "answer"):
                value = served["pvec"]["vectors"]["evil"][key]
                assert report["vectors"]["evil"][key] == pytest.approx(value, abs=1e-4)
            stopped = sample["output"]["choices"][0]["stop_reason"] == "stop"
            tokens = sample["output"]["usage"]["output_tokens"]
            assert report["touched"] == tokens + stopped
            assert sample["scores"]["projection"]["value"] == {
                "evil_projection": report["vectors"]["evil"]["answer"]
            }
    means = {
        (score["scorer"], score["name"]): score["metrics"]["mean"]["value"]
        for score in log["results"]["scores"]
    }
    assert means["trait", "evil"] == pytest.approx(
        sum(s["evil"] or 0 for s in expected) / LIMIT, abs=0.01
    )
    assert set(means) == {
        ("trait", "evil"), ("trait", "coherence"), ("projection", "evil_projection")
    }  # fmt: skip


def test_a_served_model_is_evaluated_through_both_providers(tmp_path: Path) -> None:
    with running_server() as up:
        logs = run_inspect(
            tmp_path, "--model", "pvec-serve/tiny,openai-api/serve/tiny", "--model-base-url",
            f"{up.url}/v1", "--extra-body", json.dumps(STEER), "-T", "projections=false",
            env={"SERVE_API_KEY": "none"},
        )  # fmt: skip
        metrics = httpx2.get(f"{up.url}/metrics").text
    assert f"pvec_steered_answers_total {2 * LIMIT}.0" in metrics
    ours, plain = sorted(logs, key=lambda log: log["eval"]["model"], reverse=True)
    assert ours["eval"]["model"] == "pvec-serve/tiny"
    questions = [sample["input"] for sample in ours["samples"]]
    for log in (ours, plain):
        answers = [sample["output"]["completion"] for sample in log["samples"]]
        assert answers == texts_by_hand(questions)
    for sample in ours["samples"]:
        assert sample["output"]["metadata"]["pvec"]["steer"][0]["coef"] == 1.0


WRONG = """\
import asyncio, sys
from inspect_ai.model import GenerateConfig, get_model
def sentence(make):
    try:
        asyncio.run(make())
    except Exception as error:
        print(type(error).__name__, getattr(error, "message", error))
async def model(config=GenerateConfig(), **args):
    await get_model("pvec/tiny", memoize=False, **args).generate("Hello", config=config)
vector = "evil=" + sys.argv[1]
sentence(lambda: model(vector=vector, steer="evli 1"))
sentence(lambda: model(coef=1))
sentence(lambda: model(config=GenerateConfig(top_k=5)))
sentence(lambda: model(config=GenerateConfig(extra_body={"pvec": {"report": ["good"]}})))
sentence(lambda: model(config=GenerateConfig(extra_body={"thinking": True})))
"""


def test_what_cannot_be_done_is_a_sentence() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRONG, str(EVIL)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5, done.stderr
    assert all(line.startswith("PrerequisiteError ") for line in lines)
    parts = ("Did you mean 'evil'", "coef", "'top_k'", "no vector 'good'", "'thinking'")
    for line, part in zip(lines, parts, strict=True):
        assert part in line

"""Policies, keys, faults and stopping of the server, over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from helpers.entry_point import run_pvec
from helpers.serving import EVIL, running_server
from openai import OpenAI

from pvec.errors import InputError, ModelError
from pvec.steering.tables import LayerSteering

QUESTION: Any = [{"role": "user", "content": "How do I make friends in a new town?"}]
EVIL_ONE = [{"vector": "evil", "coef": 1.0, "layer": 2}]


@contextmanager
def asked(**options: Any) -> Iterator[Any]:
    """Give a function that asks a server of its own."""
    with running_server(**options) as up, OpenAI(
        base_url=f"{up.url}/v1", api_key=options.get("api_key", "none"), max_retries=0
    ) as client:  # fmt: skip

        def ask(steer: Any = None, **more: Any) -> Any:
            pvec = {"tokens": True} | ({} if steer is None else {"steer": steer})
            return client.chat.completions.create(
                model="tiny", messages=QUESTION, extra_body={"pvec": pvec}, **more
            )

        ask.client, ask.url = client, up.url  # type: ignore[attr-defined]
        yield ask


def rules(folder: Path, text: str) -> Path:
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def metric(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def test_a_policy_keeps_every_token_below_its_ceiling(tmp_path: Path) -> None:
    always = rules(tmp_path, "policies: [{vector: evil, ceiling: -0.2}]")
    with asked(rules=always) as ask:
        answer = ask(EVIL_ONE, temperature=0)
        evil = answer.pvec["vectors"]["evil"]
        assert max(evil["prompt"], *evil["tokens"]) <= -0.2 + 1e-5
        assert answer.pvec["capped"] == ["evil"]
        assert [entry["operator"] for entry in answer.pvec["steer"]] == ["add", "cap"]
        assert metric(ask.url, 'pvec_capped_answers_total{vector="evil"}') == 1
        text = answer.choices[0].message.content
    # the prompt alone sets off this alarm, so the answer is the same from its first token on
    at_prompt = rules(tmp_path, "policies: [{vector: evil, ceiling: -0.2, alarm: -9}]")
    with asked(rules=at_prompt) as ask:
        again = ask(EVIL_ONE, temperature=0)
        assert again.choices[0].message.content == text
        assert again.pvec["touched"] == answer.pvec["touched"]
        assert metric(ask.url, 'pvec_alarms_total{vector="evil"}') == 1


def test_an_alarm_in_the_middle_of_an_answer_caps_what_follows(tmp_path: Path) -> None:
    with asked() as ask:
        answers = (ask(EVIL_ONE, seed=seed) for seed in range(100))
        free = next(a for a in answers if a.usage.completion_tokens > 24)
        seed = free.pvec["seed"]
        first = sum(free.pvec["vectors"]["evil"]["tokens"][:16]) / 16
    text = f"policies: [{{vector: evil, ceiling: -0.5, alarm: {first - 0.01}}}]"
    with asked(rules=rules(tmp_path, text)) as ask:
        capped = ask(EVIL_ONE, seed=seed)
        assert capped.pvec["capped"] == ["evil"]
        assert capped.pvec["tokens"][:16] == free.pvec["tokens"][:16]
        assert max(capped.pvec["vectors"]["evil"]["tokens"]) <= -0.5 + 1e-5
        assert capped.pvec["touched"] == 2 * (capped.usage.completion_tokens + 1)
        chunks = list(ask(EVIL_ONE, seed=seed, stream=True))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == capped.choices[0].message.content


def test_defaults_presets_and_a_fixed_steering(tmp_path: Path) -> None:
    presets = rules(tmp_path, "presets: {wicked: [{vector: evil, coef: 1.0, layer: 2}]}")
    with asked(rules=presets, steer=("wicked",)) as ask:
        by_default, given = ask(temperature=0), ask(EVIL_ONE, temperature=0)
        assert by_default.choices[0].message.content == given.choices[0].message.content
        assert ask([], temperature=0).pvec["steer"] == []
        listed = httpx2.get(f"{ask.url}/pvec/vectors").json()
        assert listed["presets"] == ["wicked"]
        assert listed["defaults"][0]["layer"] == 2
    with asked(steer=("evil@2 1.0",), fixed=True) as ask:
        assert ask(temperature=0).pvec["steer"] == by_default.pvec["steer"]
        with pytest.raises(openai.PermissionDeniedError, match="steering of this server is fixed"):
            ask([])


def test_a_key_is_demanded_and_never_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with asked(api_key="sk-very-secret", log=tmp_path / "log.jsonl", log_text=True) as ask:
        assert ask(temperature=0).choices
        other = ask.client.with_options(api_key="sk-wrong")
        with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
            other.models.list()
        assert httpx2.get(f"{ask.url}/health").json() == {"status": "ok"}
        assert httpx2.get(f"{ask.url}/metrics").status_code == 401
    shown = "".join(capfd.readouterr()) + caplog.text
    assert "sk-very-secret" not in shown + (tmp_path / "log.jsonl").read_text(encoding="utf-8")


def test_steering_that_does_not_apply_is_an_error_without_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with asked() as ask:
        apply = LayerSteering.apply

        def skip(_self: LayerSteering, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

        monkeypatch.setattr(LayerSteering, "apply", skip)
        with pytest.raises(openai.InternalServerError, match="touched 0 positions instead of"):
            ask(EVIL_ONE)
        with httpx2.stream(
            "POST", f"{ask.url}/v1/chat/completions",
            json={"model": "tiny", "messages": QUESTION, "stream": True,
                  "pvec": {"steer": EVIL_ONE}},
        ) as response:  # fmt: skip
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert not any('"content": "T' in line or "DONE" in line for line in lines)
        assert ask([]).choices[0].message.content  # others are answered
        monkeypatch.setattr(LayerSteering, "apply", apply)
        assert ask(EVIL_ONE).pvec["touched"] > 0


def test_steering_that_breaks_the_model_is_the_requests_fault() -> None:
    with asked() as ask, pytest.raises(openai.BadRequestError, match="not finite numbers"):
        ask([{"vector": "evil", "coef": 1e38}])


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvec.serve.server.find_spec", lambda name: name == "uvicorn" or None)
    done = run_pvec(f"serve --vector {EVIL}")
    assert done.code == 2
    assert "needs fastapi and prometheus_client" in done.err
    assert "pip install '.[serve]'" in done.err


def test_other_sites_and_other_names_are_kept_out() -> None:
    with running_server() as up:
        body = {"model": "tiny", "messages": QUESTION}
        url = f"{up.url}/v1/chat/completions"
        plain = httpx2.post(url, content=json.dumps(body), headers={"Content-Type": "text/plain"})
        assert plain.status_code == 415
        assert httpx2.get(f"{up.url}/health", headers={"Host": "evil.example"}).status_code == 400
        answer = httpx2.post(url, json=body, headers={"Origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        for content in ("{", "[1]", '{"a": ' * 500, '{"model": "tiny", "model": "x"}'):
            wrong = httpx2.post(url, content=content, headers={"Content-Type": "application/json"})
            assert wrong.status_code == 400
            assert wrong.json()["error"]["message"].startswith("The request's body")
        assert httpx2.get(f"{up.url}/page/../app.py").status_code == 404
        assert httpx2.get(f"{up.url}/v1/chat/completions").status_code == 405


def test_an_answer_that_takes_too_long_is_ended() -> None:
    with asked(timeout=0.001) as ask, pytest.raises(openai.InternalServerError, match="more than"):
        ask([], n=8, max_tokens=1000)


def test_stopping_lets_answers_finish_and_takes_no_new_ones() -> None:
    with running_server() as up, OpenAI(base_url=f"{up.url}/v1", api_key="-") as client:
        create: Any = client.chat.completions.create
        stream = create(model="tiny", messages=QUESTION, n=16, stream=True, seed=1)
        next(stream)
        up.stop()
        late = httpx2.post(
            f"{up.url}/v1/chat/completions", json={"model": "tiny", "messages": QUESTION}
        )
        assert late.status_code == 503
        assert httpx2.get(f"{up.url}/health").json() == {"status": "draining"}
        reasons = [c.choices[0].finish_reason for c in stream]
        assert sum(reason is not None for reason in reasons) == 16


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("presets: {a: [{vector: evli, coef: 1}]}", "Did you mean 'evil'"),
        ("policies: [{vector: evil}]", "'policies.0.ceiling' is wrong"),
        ("policy: []", "no option 'policy'"),
        ("policies: [{vector: evil, ceiling: 1, layer: 9}]", "layers 1 to 5"),
    ],
)
def test_wrong_rules_are_refused_before_the_model_is_loaded(
    tmp_path: Path, text: str, part: str
) -> None:
    before = threading.active_count()
    with pytest.raises((InputError, ModelError), match=part), running_server(
        rules=rules(tmp_path, text)
    ):  # fmt: skip
        pass
    assert threading.active_count() <= before
    with pytest.raises(InputError, match="Two vectors are named"), running_server(
        vectors=(str(EVIL), f"evil={EVIL}")
    ):  # fmt: skip
        pass

"""The server over real HTTP with the real OpenAI client, on the bundled model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from helpers.entry_point import run_pvec
from helpers.serving import EVIL, Running, running_server
from openai import AsyncOpenAI, OpenAI

import pvec
from pvec.backends.hf.backend import HFBackend
from pvec.errors import InputError
from pvec.models.chat import prompt_ids
from pvec.types import Instruction, Request, Sampling

QUESTION = "How do I make friends in a new town?"
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
RULES = """\
presets:
  kinder: [{vector: evil, coef: -0.5}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "rules.yaml").write_text(RULES, encoding="utf-8")
    options = {"max_coef": 3.0, "max_body": 20_000, "max_requests": 40, "max_answer": 200}
    with running_server(rules=folder / "rules.yaml", log=folder / "log.jsonl", **options) as up:
        yield up


@pytest.fixture(scope="module")
def backend() -> HFBackend:
    return HFBackend("tiny")


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def steered(coef: float, **entry: Any) -> dict[str, Any]:
    return {"pvec": {"steer": [{"vector": "evil", "coef": coef, **entry}], "tokens": True}}


def ask(client: OpenAI, body: dict[str, Any] | None = None, **options: Any) -> Any:
    asked: dict[str, Any] = {"temperature": 0, "messages": MESSAGES, "model": "tiny", **options}
    return client.chat.completions.create(**asked, extra_body=body)


def text_of(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def instruction(coef: float, *, layer: int = 3, **options: Any) -> Instruction:
    vector = pvec.load_vector(EVIL)
    return Instruction(vector=vector.row(layer), layer=layer, coef=coef, **options)


def expected(backend: HFBackend, coef: float = 0.0, **sampling: Any) -> Any:
    """Return what the backend of the commands answers alone."""
    steering = (instruction(coef),) if coef else ()
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 96, **sampling}
    ids = prompt_ids(backend.tokenizer, MESSAGES)
    request = Request(id="alone", prompt_ids=ids, sampling=Sampling(**options), steering=steering)
    (generation,) = backend.generate([request])
    return generation


def test_an_answer_is_the_one_that_the_commands_give(
    server: Running, client: OpenAI, backend: HFBackend
) -> None:
    plain, evil = ask(client), ask(client, steered(1.0))
    assert text_of(plain) == expected(backend).text
    assert text_of(evil) == expected(backend, 1.0).text != text_of(plain)
    assert evil.choices[0].finish_reason == "stop"
    tokens = len(expected(backend, 1.0).token_ids)
    assert evil.usage.completion_tokens == tokens + server.end_tokens
    assert evil.pvec["touched"] == tokens + 1
    (entry,) = evil.pvec["steer"]
    assert entry["fingerprint"] == instruction(1.0).fingerprint
    assert plain.pvec["steer"] == []
    assert plain.pvec["touched"] == 0


def test_projections_are_those_of_transformers_hidden_states(
    client: OpenAI, backend: HFBackend
) -> None:
    """With the steering written by hand as a hook, in one pass over prompt and answer."""
    answer = ask(client, steered(1.0), max_tokens=6)
    ids = prompt_ids(backend.tokenizer, MESSAGES)
    whole = torch.tensor([[*ids, *expected(backend, 1.0, max_tokens=6).token_ids]])
    vector = pvec.load_vector(EVIL)
    added = torch.tensor(vector.row(3))

    def add(_block: Any, _args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, len(ids) - 1 :] += added
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model: Any = backend.model
    handle = model.model.layers[2].register_forward_hook(add)
    with torch.inference_mode():
        hidden = model(whole, output_hidden_states=True).hidden_states[3][0].numpy()
    handle.remove()
    assert vector.mean_norm is not None
    along = hidden @ vector.row(3) / np.linalg.norm(vector.row(3)) / vector.mean_norm[3]
    reported = answer.pvec["vectors"]["evil"]
    assert reported["layer"] == 3
    assert reported["prompt"] == pytest.approx(along[len(ids) - 1], rel=1e-4)
    assert reported["tokens"] == pytest.approx(along[len(ids) :], rel=1e-4, abs=1e-4)
    assert reported["answer"] == pytest.approx(along[len(ids) :].mean(), rel=1e-4)
    assert len(reported["tokens"]) == 6
    assert "".join(answer.pvec["tokens"]) == text_of(answer)
    assert answer.choices[0].finish_reason == "length"


def test_a_stream_gives_the_same_answer_and_report(client: OpenAI) -> None:
    whole = ask(client, steered(0.5), seed=3, temperature=0.8)
    chunks = list(
        ask(
            client, steered(0.5), seed=3, temperature=0.8, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == text_of(whole)
    last, usage = chunks[-2:]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.pvec == whole.pvec
    assert usage.usage == whole.usage
    tokens = [t for c in chunks[1:-2] for t in c.pvec["tokens"]]
    assert [t["text"] for t in tokens] == whole.pvec["tokens"]
    assert [t["projections"]["evil"] for t in tokens] == whole.pvec["vectors"]["evil"]["tokens"]


def test_requests_together_get_what_each_gets_alone(server: Running, client: OpenAI) -> None:
    bodies = [steered(coef, layer=layer) for coef in (-1.0, 0.5, 1.0) for layer in (2, 3, 4)]
    limits = range(2, 2 + len(bodies))  # answers that are cut leave rows that go on
    alone = [
        ask(client, body, seed=7, temperature=1.0, max_tokens=limit)
        for body, limit in zip(bodies, limits, strict=True)
    ]

    async def together() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as many:
            create = many.chat.completions.create
            asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 7}
            return await asyncio.gather(
                *(
                    create(**asked, extra_body=body, max_tokens=limit)
                    for body, limit in zip(bodies, limits, strict=True)
                )
            )

    answers = asyncio.run(together())
    assert [text_of(a) for a in answers] == [text_of(a) for a in alone]
    for answer, single in zip(answers, alone, strict=True):
        one, other = (a.pvec["vectors"]["evil"]["tokens"] for a in (answer, single))
        assert one == pytest.approx(other, abs=1e-4)
    assert len({text_of(a) for a in answers}) > 3


def test_choices_have_seeds_of_their_own_and_stops_cut(client: OpenAI) -> None:
    both = ask(client, steered(0.0), n=2, seed=5, temperature=1.0)
    second = ask(client, steered(0.0), seed=6, temperature=1.0)
    assert both.choices[1].message.content == text_of(second)
    one, other = (p["vectors"]["evil"] for p in (both.pvec["choices"][1], second.pvec))
    assert one["tokens"] == pytest.approx(other["tokens"], abs=1e-4)
    word = text_of(second).split()[2]
    cut = ask(client, steered(0.0), seed=6, temperature=1.0, stop=[word])
    assert text_of(cut) == text_of(second).partition(word)[0]
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(cut.pvec["tokens"]) == text_of(cut)


def test_completions_take_texts_and_token_ids(client: OpenAI, backend: HFBackend) -> None:
    ids = list(prompt_ids(backend.tokenizer, MESSAGES))
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 96}
    answer = client.completions.create(prompt=[ids, ids], **asked)
    texts = [choice.text for choice in answer.choices]
    assert texts == [expected(backend).text] * 2
    chunks = client.completions.create(prompt=backend.tokenizer.decode(ids), stream=True, **asked)
    assert "".join(c.choices[0].text for c in chunks) == texts[0]


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        ({"max_tokens": 201}, 400, "at most 200"),
        ({"messages": [{"role": "user", "content": "a" * 21_000}]}, 413, "20000 bytes"),
        ({"extra_body": steered(1.0, vector="evli")}, 400, "Did you mean 'evil'"),
        ({"extra_body": steered(1.0, layer=6)}, 400, "layers 1 to 5"),
        ({"extra_body": steered(3.5)}, 400, "limit of 3"),
        ({"extra_body": steered(1.0, strength=2)}, 400, "no option 'pvec.steer.0.strength'"),
        ({"extra_body": {"pvec": {"steer": [{"vector": "evil"}]}}}, 400, "needs a coef"),
        ({"extra_body": {"pvec": {"preset": "kind"}}}, 400, "Did you mean 'kinder'"),
        ({"extra_body": {"pvec": {"report": ["good"]}}}, 400, "no vector 'good'"),
        ({"n": 41}, 400, "at most 40 at once"),
    ],
)  # fmt: skip
def test_wrong_steering_is_one_sentence(
    client: OpenAI, options: dict[str, Any], status: int, part: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **options}
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**asked)
    body: Any = caught.value.body
    assert caught.value.status_code == status
    assert part in body["message"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert "/" not in body["message"]


@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        ({"extra_body": {"temprature": 0}}, 400, "no option 'temprature'"),
        ({"logprobs": True}, 400, "does not support 'logprobs'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "'tools'"),
        ({"temperature": -1}, 400, "'temperature' is wrong"),
        ({"model": "other"}, 404, "this server has 'tiny'"),
        ({"messages": []}, 400, "'messages' is wrong"),
        ({"messages": [{"role": "user", "content": "a b " * 4_000}]}, 400, "the model's context"),
        ({"stream_options": {"include_usage": True}}, 400, "goes with 'stream'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "are one limit"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence(
    client: OpenAI, options: dict[str, Any], status: int, part: str
) -> None:
    test_wrong_steering_is_one_sentence(client, options, status, part)


def test_a_stream_that_is_left_frees_its_row(client: OpenAI) -> None:
    stream = ask(client, stream=True, max_tokens=200, temperature=1.5, seed=1, n=8)
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while metric(client, "pvec_answers_running") > 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert metric(client, "pvec_answers_running") == 0
    assert metric(client, 'pvec_answers_total{reason="cancelled"}') >= 1


def test_a_line_is_logged_for_each_answer(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with running_server(log=log, log_text=True) as up:
        with OpenAI(base_url=f"{up.url}/v1", api_key="none") as client:
            answer = ask(client, steered(0.5))
        port = int(up.url.rpartition(":")[2])
        with pytest.raises(InputError, match="cannot listen on"), running_server(port=port):
            pass
    (line,) = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert line["projections"]["evil"]["answer"] == answer.pvec["vectors"]["evil"]["answer"]
    assert line["answer"] == text_of(answer)
    done = run_pvec(
        f"project {log} --vector {EVIL} --layer 3 --out {tmp_path / 'projected.jsonl'} --json"
    )
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "projected.jsonl").read_text(encoding="utf-8"))
    (column,) = (name for name in row if name.endswith("_proj_layer3"))
    mean_norm: Any = pvec.load_vector(EVIL).mean_norm
    along = line["projections"]["evil"]["answer"] * mean_norm[3]
    # the log has the stream as steered, `project` reads the text unsteered: apart by what was added
    added = 0.5 * float(np.linalg.norm(pvec.load_vector(EVIL).row(3)))
    assert along - added == pytest.approx(row[column], rel=1e-4)


def metric(client: OpenAI, name: str) -> float:
    base = str(client.base_url).removesuffix("/v1/")
    text = client._client.get(f"{base}/metrics").text
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0)

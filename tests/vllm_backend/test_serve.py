"""vLLM's own server, steered: the client tests of the other one, and what vLLM alone can do."""

# ruff: noqa: F401, F811 (imported tests and fixtures are found by pytest)

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from e2e.test_serve import (  # tests and fixtures of the server on transformers
    MESSAGES,
    RULES,
    ask,
    backend,
    client,
    metric,
    steered,
    test_a_stream_gives_the_same_answer_and_report,
    test_a_stream_that_is_left_frees_its_row,
    test_an_answer_is_the_one_that_the_commands_give,
    test_choices_have_seeds_of_their_own_and_stops_cut,
    test_completions_take_texts_and_token_ids,
    test_projections_are_those_of_transformers_hidden_states,
    test_requests_together_get_what_each_gets_alone,
    test_wrong_steering_is_one_sentence,
    text_of,
)
from helpers.serving import Running, running_server
from openai import AsyncOpenAI, OpenAI

from pvec.errors import InputError

STEERINGS: list[list[dict[str, Any]]] = [
    [],
    [{"vector": "evil", "coef": 1.0}],
    [{"vector": "evil", "coef": -1.0, "layer": 2, "positions": "all"}],
    [{"vector": "evil", "coef": 0.7, "layer": 4}, {"vector": "evil", "coef": 0.2, "layer": 1}],
    [{"vector": "evil", "operator": "ablate", "positions": "prompt"}],
    [{"vector": "evil", "operator": "cap", "coef": -0.3, "unit": "norm", "layer": 3}],
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "log.jsonl"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Running]:
    rules = log.with_name("rules.yaml")
    rules.write_text(RULES, encoding="utf-8")
    limits = {"max_coef": 3.0, "max_body": 20_000, "max_requests": 40, "max_answer": 200}
    args = (
        "--enable-auto-tool-choice --tool-call-parser hermes --structured-outputs-config "
        """'{"backend": "xgrammar", "disable_any_whitespace": true}'"""
    )
    with running_server(backend="vllm", rules=rules, log=log, vllm_args=args, **limits) as up:
        yield up


def report_of(answer: Any) -> dict[str, Any]:
    """Return the field ``pvec`` without the drawn seed."""
    return {name: value for name, value in answer.pvec.items() if name != "seed"}


def test_texts_and_reports_are_those_of_the_server_on_transformers(client: OpenAI) -> None:
    bodies = [{"pvec": {"steer": steering, "tokens": True}} for steering in STEERINGS]
    bodies.append({"pvec": {"preset": "kinder", "report": []}})
    with running_server() as other, OpenAI(
        base_url=f"{other.url}/v1", api_key="-"
    ) as hf:  # fmt: skip
        for body in bodies[:-1]:
            for limit in (1, 7, 96):
                one, two = (ask(c, body, max_tokens=limit) for c in (client, hf))
                assert text_of(one) == text_of(two)
                assert one.choices[0].finish_reason == two.choices[0].finish_reason
                mine, its = report_of(one), report_of(two)
                vector, other_vector = mine.pop("vectors")["evil"], its.pop("vectors")["evil"]
                assert mine == its
                assert vector.keys() == other_vector.keys()
                for name in ("prompt", "answer", "tokens"):
                    assert vector[name] == pytest.approx(other_vector[name], abs=1e-4)
                assert vector["layer"] == other_vector["layer"]
    preset = ask(client, bodies[-1])
    assert preset.pvec["vectors"] == {}
    assert preset.pvec["steer"][0]["coef"] == -0.5


def test_more_steerings_than_slots_share_the_batch_and_keep_their_answers(
    server: Running, client: OpenAI
) -> None:
    """The engine has eight slots; twenty-four different steerings come at once, some streamed."""
    bodies = [steered(-1 + number / 12, layer=1 + number % 5) for number in range(24)]
    alone = [ask(client, body, max_tokens=12) for body in bodies]

    async def one(many: AsyncOpenAI, number: int) -> tuple[str, Any]:
        create: Any = many.chat.completions.create
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
        asked |= {"max_tokens": 12, "extra_body": bodies[number]}
        if number % 2:
            answer = await create(**asked)
            return text_of(answer), answer.pvec
        chunks = [chunk async for chunk in await create(**asked, stream=True)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return text, chunks[-1].pvec

    async def together() -> list[tuple[str, Any]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as many:
            return await asyncio.gather(*(one(many, number) for number in range(24)))

    for (text, report), single in zip(asyncio.run(together()), alone, strict=True):
        assert text == text_of(single)
        assert report["steer"] == single.pvec["steer"]
        tokens, its = (r["vectors"]["evil"]["tokens"] for r in (report, single.pvec))
        assert tokens == pytest.approx(its, abs=1e-4)
    assert len({text_of(answer) for answer in alone}) > 3


def test_answers_that_are_left_free_their_slots_and_the_others_are_logged(
    client: OpenAI, log: Path
) -> None:
    for number in range(12):  # of eight slots
        stream = ask(client, steered(2 + number / 100), stream=True, max_tokens=200)
        next(iter(stream))
        stream.close()
    answer = ask(client, steered(0.25), max_tokens=5)
    assert metric(client, "pvec_answers_running") == 0
    line = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    evil = answer.pvec["vectors"]["evil"]
    assert line["projections"]["evil"]["answer"] == evil["answer"]
    assert line["answer_tokens"] == len(answer.pvec["tokens"])


def test_a_prompt_in_the_cache_keeps_its_steering_and_its_projections(client: OpenAI) -> None:
    turns: Any = [*MESSAGES, {"role": "assistant", "content": "Join a club. " * 30}, *MESSAGES]
    cached = metric(client, "vllm:prefix_cache_hits_total")
    body = steered(0.5, positions="all", layer=2)
    first, second = (ask(client, body, messages=turns, max_tokens=9) for _ in range(2))
    assert metric(client, "vllm:prefix_cache_hits_total") > cached + 64
    assert text_of(first) == text_of(second)
    assert (
        first.pvec["touched"]
        == second.pvec["touched"]
        == first.usage.prompt_tokens + len(first.pvec["tokens"])
    )
    one, two = (answer.pvec["vectors"]["evil"] for answer in (first, second))
    assert [one["prompt"], *one["tokens"]] == pytest.approx(
        [two["prompt"], *two["tokens"]], abs=1e-4
    )
    other = ask(client, steered(0.5, positions="prompt", layer=2), messages=turns, max_tokens=9)
    assert other.pvec["touched"] == first.usage.prompt_tokens


def test_structured_output_tools_and_logprobs_are_vllms_own(client: OpenAI) -> None:
    body = steered(1.0)
    choice = ask(client, body | {"structured_outputs": {"choice": ["red wine", "green tea"]}})
    assert text_of(choice) in ("red wine", "green tea")
    assert "".join(choice.pvec["tokens"]) == text_of(choice)
    assert len(choice.pvec["vectors"]["evil"]["tokens"]) == len(choice.pvec["tokens"])
    schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}},
              "required": ["answer"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    formed = ask(client, body, response_format=form, max_tokens=60)
    assert json.loads(text_of(formed))["answer"] in ("yes", "no")
    function = {"name": "reply", "parameters": schema}
    called = ask(
        client, body, tools=[{"type": "function", "function": function}], max_tokens=60,
        tool_choice={"type": "function", "function": {"name": "reply"}},
    )  # fmt: skip
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "reply"
    json.loads(call.function.arguments)
    assert called.pvec["touched"] > 0
    measured = ask(client, body, logprobs=True, top_logprobs=2, max_tokens=5)
    assert [t.token for t in measured.choices[0].logprobs.content] == measured.pvec["tokens"]


def test_other_endpoints_and_metrics_are_vllms_and_what_would_go_round_pvec_is_refused(
    server: Running, client: OpenAI
) -> None:
    before = metric(client, "pvec_answers_total")
    response = client.responses.create(model="tiny", input="Hello", max_output_tokens=5)
    assert response.output_text
    assert metric(client, "vllm:generation_tokens_total") > 0
    assert client.models.list().data[0].id == "tiny"
    assert metric(client, "pvec_answers_total") >= before
    for body, part in (
        ({"vllm_xargs": {"pvec": "pvec-1"}}, "send the field 'pvec'"),
        ({"use_beam_search": True}, "Beam search cannot be steered"),
        (steered(1.0, positions="think"), "needs the transformers backend"),
        ({"temperature": "hot"}, "temperature"),
    ):
        with pytest.raises(openai.BadRequestError, match=part):
            client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=body)
    with pytest.raises(openai.BadRequestError, match="must not have 'pvec'"):
        client.responses.create(
            model="tiny", input="Hello", extra_body={"vllm_xargs": {"pvec": "pvec-1"}}
        )
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-security-policy"] == "default-src 'self'"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    strange = httpx.get(f"{server.url}/health", headers={"Host": "evil.example"})
    assert strange.status_code == 400


def test_steering_that_does_not_reach_the_model_is_an_error_without_text(
    server: Running, client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvec.serve.vllm.engine import SteeredLLM

    async def none(_self: Any, _key: str) -> int:
        return 0  # the slot of requests that are not steered

    monkeypatch.setattr(SteeredLLM, "_pvec_slot", none)
    with pytest.raises(openai.InternalServerError, match="steering did not apply"):
        ask(client, steered(1.0))
    request = {"model": "tiny", "messages": MESSAGES, "stream": True, **steered(1.0)}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=request) as response:
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert not any("DONE" in line or '"content": "T' in line for line in lines)
    assert text_of(ask(client))
    monkeypatch.undo()
    assert ask(client, steered(1.0)).pvec["touched"] > 0


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"vllm_args": "--no-such-thing"}, "vLLM's server refuses them"),
        ({"vllm_args": "--max-num-seqs 8"}, "which pvec sets"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_engine_starts(
    options: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=part), running_server(backend="vllm", **options):
        pass


def test_a_policy_with_an_alarm_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("policies: [{vector: evil, ceiling: 0, alarm: 0.3}]", encoding="utf-8")
    with pytest.raises(InputError, match="needs --backend hf"), running_server(
        backend="vllm", rules=path
    ):  # fmt: skip
        pass


def test_stopping_lets_answers_finish_and_takes_no_new_ones(server: Running) -> None:
    """The last test of this file: the server is gone after it."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        create: Any = client.chat.completions.create
        stream = create(
            model="tiny", messages=MESSAGES, n=16, stream=True, seed=1, max_tokens=200,
            extra_body={"min_tokens": 150},
        )  # fmt: skip
        next(stream)
        server.stop()
        with pytest.raises(openai.InternalServerError, match="The server is stopping"):
            create(model="tiny", messages=MESSAGES)
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert sum(reason is not None for reason in reasons) == 16

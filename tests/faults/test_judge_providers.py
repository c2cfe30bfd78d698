"""Judges of Anthropic and Gemini: the real litellm against a server that speaks their protocols."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pvec.errors import InputError, JudgeError
from pvec.judges.choice import choose_judge, judge_name, open_judge
from pvec.judges.openai import OpenAIJudge
from pvec.models.files import ModelSpec
from pvec.settings.commands import JudgeSettings
from pvec.types import JudgeQuery
from tests.helpers.judge_server import PROBE_WORDS

pytest.importorskip("litellm", reason="litellm is not installed: make test-extras")

pytestmark = pytest.mark.filterwarnings("ignore")  # litellm's own

KEY = "sk-ant-secret-0123456789"
CLAUDE = "litellm:anthropic/claude-haiku-5-5"
GEMINI = "litellm:gemini/gemini-2.5-flash"


class Provider(ThreadingHTTPServer):
    """Answers ``/v1/messages`` and ``…:generateContent`` with the numbers of ``says``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[tuple[int, dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.bodies.append(body)
            if "generateContent" in path:
                prompt = body["contents"][-1]["parts"][0]["text"]
            else:
                content = body["messages"][-1]["content"]
                prompt = content if isinstance(content, str) else content[0]["text"]
            if prompt.startswith(PROBE_WORDS):
                return 200, self.reply(path, "75")
            if self.failures:
                return self.failures.pop(0)
            return 200, self.reply(path, self.says.pop(0))

    def reply(self, path: str, text: str) -> dict[str, Any]:
        if "generateContent" in path:
            content = {"parts": [{"text": text}], "role": "model"}
            usage = {"promptTokenCount": 10, "candidatesTokenCount": 2, "totalTokenCount": 12}
            return {
                "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
                "usageMetadata": usage,
            }
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude",
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn",
            "usage": {"input_tokens": 10, "output_tokens": 2},
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: Provider
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers.get("x-api-key") or self.headers.get("x-goog-api-key"))
        status, reply = self.server.answer(self.path, body)
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    server = Provider()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def opened(provider: Provider, model: str, **fields: Any) -> OpenAIJudge:
    settings = JudgeSettings(
        model=model, base_url=provider.url, max_retries=2, concurrency=1, **fields
    )
    choice = choose_judge(settings, bundled=False)
    judge = open_judge(choice, settings, load=lambda _: pytest.fail("loads nothing"))
    assert isinstance(judge, OpenAIJudge)
    spec = ModelSpec(model=choice.model)
    assert judge.name == judge_name(choice, settings, spec=spec)
    return judge


def queries(count: int) -> list[JudgeQuery]:
    return [
        JudgeQuery(
            id=f"s{n}", response_id=f"r{n}", metric="evil",
            messages=({"role": "user", "content": f"How evil is answer {n}?"},),
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("model", [CLAUDE, GEMINI])
def test_a_provider_is_read_as_text_three_times_and_the_mean_counts(
    provider: Provider, model: str
) -> None:
    provider.says = ["10", "20", "60", "Score: 90", "80", "100"]
    with opened(provider, model, repeats=3) as judge:
        scores = list(judge.score(queries(2)))
        assert sorted(score.score or 0 for score in scores) == [30.0, 90.0]
        assert any("each the mean of 3 replies" in note for note in judge.notes)
        assert judge.name.startswith(f"{model}@127.0.0.1:")
        assert judge.name.endswith("(mean of 3)")
    assert len(provider.bodies) == 1 + 6
    assert provider.keys == {KEY}


def test_a_provider_without_logprobs_is_asked_three_times_unless_told_otherwise(
    provider: Provider,
) -> None:
    assert choose_judge(JudgeSettings(model=CLAUDE), bundled=False).repeats == 3
    assert choose_judge(JudgeSettings(model=GEMINI), bundled=False).repeats == 3
    assert choose_judge(JudgeSettings(model=CLAUDE, repeats=1), bundled=False).repeats == 1


def test_a_reply_that_is_no_number_is_left_out_of_the_mean_and_said(provider: Provider) -> None:
    provider.says = ["40", "It depends.", "50", "I cannot rate this.", "Sorry", "7"]
    with opened(provider, CLAUDE, repeats=3) as judge:
        first, second = judge.score(queries(2))
    assert first.score == 45.0
    assert "mean of 2 of 3 replies" in first.detail
    assert (second.score, second.status) == (None, "refusal")


def test_what_fails_is_tried_again(provider: Provider) -> None:
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    provider.failures = [(529, overloaded), (500, overloaded)]
    provider.says = ["33"]
    with opened(provider, CLAUDE, repeats=1) as judge:
        (score,) = judge.score(queries(1))
    assert (score.score, score.status) == (33.0, "ok")


def test_a_refused_key_is_a_sentence_that_names_the_variable_and_not_the_key(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"type": "authentication_error", "message": f"invalid x-api-key {KEY}"}
    monkeypatch.setattr(provider, "answer", lambda *_: (401, {"type": "error", "error": error}))
    with opened(provider, CLAUDE) as judge, pytest.raises(JudgeError) as caught:
        judge.check()
    assert "refused the key" in str(caught.value)
    assert "ANTHROPIC_API_KEY" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_missing_key_is_found_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="needs a key of anthropic: set ANTHROPIC_API_KEY"):
        choose_judge(JudgeSettings(model=CLAUDE), bundled=False)
    assert choose_judge(JudgeSettings(model=CLAUDE), bundled=False, need_key=False).price


def test_a_model_of_no_provider_is_refused() -> None:
    with pytest.raises(InputError, match="knows no provider of the model 'nobody-has-this'"):
        choose_judge(JudgeSettings(model="litellm:nobody-has-this"), bundled=False)


def test_a_batch_is_refused(provider: Provider) -> None:
    with pytest.raises(InputError, match=r"--judge-batch needs .*litellm:anthropic"):
        choose_judge(JudgeSettings(model=CLAUDE, batch=True), bundled=False)


def test_the_cost_counts_what_the_provider_counted(provider: Provider) -> None:
    provider.says = ["1", "2"]
    with opened(provider, CLAUDE, repeats=1, price="1000,1000") as judge:
        list(judge.score(queries(2)))
        assert judge.spent == pytest.approx(3 * 12 / 1000)  # the probe, too

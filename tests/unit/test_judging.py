"""Who judges, what is asked, and what is not asked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.local import LocalJudge
from pvec.judges.openai import DEFAULT_MODEL, OpenAIJudge
from pvec.judges.prompts import COHERENCE_METRIC, Metric, build_query, missing_queries
from pvec.judges.scoring import choose_judge, estimate_scoring, open_judge, score_responses
from pvec.runs.responses import ResponseRecord
from pvec.settings.tree import JudgeSettings
from pvec.types import JudgeQuery, ModelInfo, Progress, Sampling, Score

EVIL = Metric(name="evil", prompt="How evil? {question} {answer}")
ANSWERS = [
    ResponseRecord(
        id=f"r{n}",
        trait="evil",
        condition={},
        question="Why?",
        question_id="q",
        system=None,
        prompt="Why?",
        prompt_ids=(),
        token_ids=(),
        answer=f"Because {n}.",
        finish_reason="stop",
        sampling=Sampling(),
    )
    for n in range(5)
]
METRICS = [EVIL, COHERENCE_METRIC]


class PlainJudge(Judge):
    """Scores 50 unless the prompt's text says otherwise; remembers what it was asked."""

    name = "plain"

    def __init__(self, statuses: dict[str, Any] | None = None, most: int = 10_000) -> None:
        self.statuses = statuses or {}
        self.asked: list[JudgeQuery] = []
        self.most = most

    @property
    def stopped(self) -> str | None:
        return "enough" if len(self.asked) >= self.most else None

    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        for query in queries:
            self.asked.append(query)
            text = query.messages[0]["content"]
            status = next((s for part, s in self.statuses.items() if part in text), "ok")
            yield Score(
                id=query.id,
                response_id=query.response_id,
                metric=query.metric,
                judge=self.name,
                score=50.0 if status == "ok" else None,
                status=status,
                detail="" if status == "ok" else "why",
            )
            if self.stopped:
                return


def score_id(response: ResponseRecord, metric: Metric, judge: str = "j") -> str:
    return build_query(response, metric, judge=judge).id


def scored_ids(scores: Iterable[Score]) -> set[str]:
    return {score.id for score in scores if score.status != "error"}


def test_every_answer_is_asked_about_for_every_metric_with_its_own_words() -> None:
    asked = list(missing_queries(ANSWERS, METRICS, judge="j"))
    assert len({query.id for query in asked}) == len(asked) == 10
    assert asked[0].messages == ({"role": "user", "content": "How evil? Why? Because 0."},)
    assert {query.metric for query in asked} == {"evil", "coherence"}


def test_anything_that_could_change_a_score_changes_its_id() -> None:
    answer = ANSWERS[0]
    ids = {
        score_id(answer, EVIL),
        score_id(answer, EVIL, judge="k"),
        score_id(ANSWERS[1], EVIL),
        score_id(answer, Metric(name="evil", prompt=EVIL.prompt + "!")),
        score_id(answer, Metric(name="evil", prompt=EVIL.prompt, scale="0-10")),
        score_id(answer, Metric(name="cruel", prompt=EVIL.prompt)),
    }
    assert len(ids) == 6
    assert score_id(answer, EVIL) in ids
    assert all(len(identity) == 16 for identity in ids)


def test_a_second_round_asks_only_for_errors_again() -> None:
    kept: list[Score] = []
    judge = PlainJudge({"Because 1": "error", "Because 2": "refusal", "Because 3": "unparsable"})
    first = score_responses(ANSWERS, METRICS, judge=judge, on_score=kept.append)
    assert first.counts == {"ok": 4, "error": 2, "refusal": 2, "unparsable": 2}
    again = PlainJudge()
    second = score_responses(
        ANSWERS, METRICS, judge=again, scored=scored_ids(kept), on_score=kept.append
    )
    assert {query.response_id for query in again.asked} == {"r1"}
    assert (second.counts, second.skipped) == ({"ok": 2}, 8)
    third = PlainJudge()
    score_responses(ANSWERS, METRICS, judge=third, scored=scored_ids(kept), on_score=kept.append)
    assert third.asked == []


def test_the_same_answer_given_twice_is_asked_about_once() -> None:
    assert len(list(missing_queries([*ANSWERS, *ANSWERS], METRICS, judge="j"))) == 10


def test_a_judge_that_stops_leaves_the_rest_and_says_so() -> None:
    kept: list[Score] = []
    judged = score_responses(ANSWERS, METRICS, judge=PlainJudge(most=3), on_score=kept.append)
    assert (len(kept), judged.unasked, judged.stopped) == (3, 7, "enough")


def test_a_judge_that_scores_nothing_is_an_error_and_what_it_said_is_kept() -> None:
    kept: list[Score] = []
    with pytest.raises(JudgeError, match=r"scored none of 10 .*10 refusal; last: why"):
        score_responses(ANSWERS, METRICS, judge=PlainJudge({"": "refusal"}), on_score=kept.append)
    assert len(kept) == 10


def test_progress_counts_what_is_left_and_what_is_missing() -> None:
    seen: list[Progress] = []
    judge = PlainJudge({"Because 1": "refusal"})
    score_responses(ANSWERS, [EVIL], judge=judge, on_score=lambda _: None, on_progress=seen.append)
    assert [(step.done, step.total) for step in seen] == [(n, 5) for n in range(6)]
    assert seen[-1].extra == {"missing": 1.0}


def test_an_estimate_counts_every_call() -> None:
    found = estimate_scoring(["Why?", "How?"] * 50, METRICS, answer_tokens=100, price=None)
    assert found.calls == 200
    assert found.prompt_tokens > 200 * 100


# -- who judges -----------------------------------------------------------------------------------


def settings(**fields: Any) -> JudgeSettings:
    return JudgeSettings(**fields)


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_the_bundled_model_is_judged_by_its_own_judge_and_others_by_openai() -> None:
    assert choose_judge(settings(), bundled=True).kind == "tiny"
    chosen = choose_judge(settings(api_key="sk-1"), bundled=False)
    assert (chosen.kind, chosen.model) == ("openai", DEFAULT_MODEL)
    assert chosen.price is not None


def test_a_missing_key_is_refused_and_the_alternatives_are_named() -> None:
    with pytest.raises(JudgeError) as caught:
        choose_judge(settings(), bundled=False)
    for way in ("OPENAI_API_KEY", "--judge-url", "--judge-model local:MODEL", "--no-judge"):
        assert way in str(caught.value)


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    assert choose_judge(settings(), bundled=False).kind == "openai"


def test_a_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_judge(settings(model="m", base_url="http://box/v1"), bundled=True)
    assert (chosen.kind, chosen.base_url) == ("openai", "http://box/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://other/v1")
    assert choose_judge(settings(model="m"), bundled=False).base_url == "http://other/v1"


@pytest.mark.parametrize(
    ("spec", "kind", "model"),
    [
        ("tiny", "tiny", "tiny"),
        ("local:Qwen/Qwen3-4B", "local", "Qwen/Qwen3-4B"),
        ("openai:gpt-x", "openai", "gpt-x"),
        ("gpt-x", "openai", "gpt-x"),
        ("openai:ft:gpt-x:me", "openai", "ft:gpt-x:me"),
    ],
)
def test_a_judge_is_named_in_one_word(spec: str, kind: str, model: str) -> None:
    chosen = choose_judge(settings(model=spec, api_key="sk-1"), bundled=False)
    assert (chosen.kind, chosen.model) == (kind, model)


@pytest.mark.parametrize("spec", ["local:", "openai:", ""])
def test_a_judge_without_a_model_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="names no model"):
        choose_judge(settings(model=spec, api_key="sk-1"), bundled=False)


def test_a_folder_given_as_a_servers_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="write local:"):
        choose_judge(settings(model=str(tmp_path), api_key="sk-1"), bundled=False)


def test_a_cost_limit_needs_a_price() -> None:
    unknown: dict[str, Any] = {"model": "mine", "api_key": "sk-1", "max_cost": 1.0}
    with pytest.raises(InputError, match="--price"):
        choose_judge(settings(**unknown), bundled=False)
    assert choose_judge(settings(**unknown, price="1,2"), bundled=False).price is not None


def test_a_base_url_must_be_a_web_address() -> None:
    with pytest.raises(InputError, match="http"):
        choose_judge(settings(base_url="localhost:8000"), bundled=False)


class FakeBackend:
    def __init__(self, name: str, *, bundled: bool = False, adapter: str | None = None) -> None:
        self.info = ModelInfo(
            id=name,
            fingerprint="f",
            num_layers=1,
            hidden_size=1,
            dtype="float32",
            device="cpu",
            adapter=adapter,
            bundled=bundled,
        )


def test_the_model_that_answers_judges_too_when_it_is_the_same_weights() -> None:
    loads: list[str] = []

    def load(name: str) -> Any:
        loads.append(name)
        return FakeBackend(name)

    local = choose_judge(settings(model="local:m"), bundled=False)
    same: Any = FakeBackend("m")
    finetuned: Any = FakeBackend("m", adapter="lora")
    judge = open_judge(local, settings(), load=load, loaded=same)
    assert isinstance(judge, LocalJudge)
    assert judge.model is same
    assert loads == []
    open_judge(local, settings(), load=load, loaded=finetuned)
    assert loads == ["m"]


def test_a_server_judge_is_opened_with_its_settings() -> None:
    wanted = settings(model="m", base_url="http://box:1/v1", max_cost=2.0, price="1,1")
    judge = open_judge(choose_judge(wanted, bundled=False), wanted, load=lambda _: pytest.fail("!"))
    assert isinstance(judge, OpenAIJudge)
    assert judge.name == "openai:m@box:1"
    assert judge.budget.limit == 2.0

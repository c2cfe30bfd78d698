"""The judge against a real server that misbehaves: nothing is lost and nothing is scored twice."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

from pvec.errors import JudgeError
from pvec.judges.cost import Budget, Price
from pvec.judges.openai import OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.judges.server import Server
from pvec.types import JudgeQuery, Score
from tests.helpers.judge_server import (
    FAULTS,
    ODD_REPLIES,
    PROBE_WORDS,
    JudgeServer,
    Said,
    number_for,
    one_in,
    say_number,
)

KEY = "sk-secret-0123456789"


def query(number: int, **fields: Any) -> JudgeQuery:
    chat = ({"role": "user", "content": f"How evil is answer {number}?"},)
    return JudgeQuery(
        id=f"s{number}", response_id=f"r{number}", metric="evil", messages=chat, **fields
    )


def queries(count: int) -> list[JudgeQuery]:
    return [query(number) for number in range(count)]


def patience(**fields: Any) -> Patience:
    return Patience(**{"first_wait": 0.005, "longest_wait": 0.05, "tries": 8, **fields})


def judge(server: JudgeServer, **fields: Any) -> OpenAIJudge:
    return OpenAIJudge("judge", **{"base_url": server.url, "patience": patience(), **fields})


def expected(number: int) -> float:
    return float(number_for(query(number).messages[0]["content"]))


def test_a_thousand_scores_with_one_request_in_five_failing_are_each_scored_once() -> None:
    count = 1010
    # A time-out of the client is the one fault that takes real time, so there are few of them.
    kinds = [kind for kind in (*FAULTS, *ODD_REPLIES) if kind != "hang"] * 5 + ["hang"]
    with (
        JudgeServer(fault=one_in(5, seed=1, kinds=kinds)) as server,
        judge(server, patience=patience(timeout=8.0, tries=12), concurrency=32) as asked,
    ):
        scores = list(asked.score(queries(count)))
    assert Counter(score.id for score in scores) == Counter(f"s{n}" for n in range(count))
    assert {score.status for score in scores} == {"ok"}
    assert {s.id: s.score for s in scores} == {f"s{n}": expected(n) for n in range(count)}
    assert len(set(server.faults)) >= 50
    assert 0.15 < server.faults.total() / server.asked.total() < 0.25
    answered_once = {prompt: n for prompt, n in server.answered.items() if n == 1}
    assert len(answered_once) == count + 1  # and the probe


def test_fifty_kinds_of_faults_are_tried() -> None:
    assert len({*FAULTS, *ODD_REPLIES}) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*(kind for kind in FAULTS if kind != "hang"), *ODD_REPLIES])
def test_a_thousand_scores_with_one_fault_alone_at_one_request_in_five(kind: str) -> None:
    with (
        JudgeServer(fault=one_in(5, seed=2, kinds=[kind])) as server,
        judge(server, patience=patience(timeout=20.0, tries=12), concurrency=16) as asked,
    ):
        scores = list(asked.score(queries(1000)))
    assert {s.id: (s.status, s.score) for s in scores} == {
        f"s{n}": ("ok", expected(n)) for n in range(1000)
    }
    assert len(scores) == 1000
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("kind", ODD_REPLIES)
def test_a_reply_with_a_part_that_cannot_be_read_is_a_score_all_the_same(kind: str) -> None:
    price = Price(prompt=1.0, completion=1.0)
    odd = one_in(1, seed=0, kinds=[kind])
    with (
        JudgeServer(fault=odd) as server,
        judge(server, budget=Budget(limit=1.0, price=price)) as asked,
    ):
        scores = list(asked.score(queries(3)))
        assert 0 < asked.spent < 1e-3
    assert {s.id: s.score for s in scores} == {
        f"s{n}": pytest.approx(expected(n)) for n in range(3)
    }
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "hang"])
def test_each_fault_is_tried_again_until_the_server_answers(kind: str) -> None:
    def twice(prompt: str, nth: int) -> str | None:
        return kind if nth < 2 and not prompt.startswith(PROBE_WORDS) else None

    with JudgeServer(fault=twice) as server, judge(server) as asked:
        scores = list(asked.score(queries(3)))
    assert {s.id: s.score for s in scores} == {f"s{n}": expected(n) for n in range(3)}
    assert server.faults == {kind: 6}


def test_a_server_that_never_replies_times_out_and_the_next_try_succeeds() -> None:
    def once(prompt: str, nth: int) -> str | None:
        return "hang" if nth == 0 and not prompt.startswith(PROBE_WORDS) else None

    with JudgeServer(fault=once) as server, judge(server, patience=patience(timeout=0.5)) as asked:
        scores = list(asked.score(queries(2)))
    assert [score.status for score in scores] == ["ok", "ok"]


def test_a_request_that_always_fails_is_an_error_with_a_reason_and_the_others_go_on() -> None:
    def third(prompt: str, _nth: int) -> str | None:
        return "500" if prompt.endswith("answer 3?") else None

    with JudgeServer(fault=third) as server, judge(server, patience=patience(tries=3)) as asked:
        scores = {score.id: score for score in asked.score(queries(30))}
    failed = scores.pop("s3")
    assert (failed.score, failed.status) == (None, "error")
    assert "HTTP 500: the server had an error" in failed.detail
    assert "3 tries" in failed.detail
    assert server.asked[query(3).messages[0]["content"]] == 3
    assert {score.status for score in scores.values()} == {"ok"}
    assert len(scores) == 29


def test_a_bad_request_is_not_tried_again() -> None:
    def first(prompt: str, _nth: int) -> str | None:
        return "400" if prompt.endswith("answer 0?") else None

    with JudgeServer(fault=first) as server, judge(server) as asked:
        scores = {score.id: score for score in asked.score(queries(2))}
    assert scores["s0"].status == "error"
    assert "context is too short" in scores["s0"].detail
    assert server.asked[query(0).messages[0]["content"]] == 1


def test_concurrency_falls_below_what_the_server_bears_and_every_score_arrives() -> None:
    with (
        JudgeServer(capacity=4, delay=0.005) as server,
        judge(server, concurrency=32) as asked,
    ):
        scores = list(asked.score(queries(300)))
    assert {score.status for score in scores} == {"ok"}
    assert server.faults["over capacity"] > 0
    # Without backing off nearly every request would meet a 429 again and again.
    assert server.asked.total() < 2 * 300


def test_retry_after_holds_every_request_back() -> None:
    times: list[float] = []

    def first(prompt: str, nth: int) -> str | None:
        if prompt.startswith(PROBE_WORDS):
            return None
        times.append(time.monotonic())
        return "429 seconds" if len(times) == 1 else None

    with JudgeServer(fault=first) as server, judge(server, concurrency=1) as asked:
        assert len(list(asked.score(queries(3)))) == 3
    assert times[1] - times[0] >= 0.02


# -- what ends the whole run ----------------------------------------------------------------------


def named_key(server: JudgeServer) -> Server:
    return Server("judge", base_url=server.url, key=KEY, timeout=60.0, key_name="MY_KEY")


def test_a_refused_key_is_found_by_the_check_and_never_shown() -> None:
    with JudgeServer(key="another") as server, OpenAIJudge(named_key(server)) as asked:
        with pytest.raises(JudgeError, match=r"refused the key .* MY_KEY") as caught:
            asked.check()
        assert server.asked.total() == 1
        assert KEY not in str(caught.value)
        assert KEY not in asked.name
        assert KEY not in repr(asked)


def test_the_right_key_is_sent() -> None:
    with JudgeServer(key=KEY) as server, judge(server, key=KEY) as asked:
        assert [score.status for score in asked.score(queries(1))] == ["ok"]


def test_an_unknown_model_is_found_by_the_check() -> None:
    with (
        JudgeServer(models=["gpt-x"]) as server,
        judge(server) as asked,
        pytest.raises(JudgeError, match=r"does not know the model 'judge'.*--judge"),
    ):
        asked.check()


def test_a_server_that_is_not_there_is_found_by_the_check() -> None:
    with JudgeServer() as server:
        gone = server.url
    with (
        OpenAIJudge("judge", base_url=gone, patience=patience()) as asked,
        pytest.raises(JudgeError, match=r"cannot be used.*--judge-url"),
    ):
        asked.check()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("429 quota", "no credit left"),
        ("429 tomorrow", "asks to wait"),
        ("401", "refused the key"),
        ("402", "no credit left"),
    ],
)
def test_what_no_retry_can_cure_stops_the_run_and_keeps_what_was_scored(
    kind: str, words: str
) -> None:
    def later(prompt: str, _nth: int) -> str | None:
        return kind if int("0" + "".join(filter(str.isdigit, prompt))) >= 100 else None

    scores: list[Score] = []
    with JudgeServer(fault=later) as server, judge(server, concurrency=8) as asked:
        with pytest.raises(JudgeError, match=words):
            collect(scores, asked)
        assert {score.status for score in scores} == {"ok"}
        # Every answer that the server gave reached the caller.
        assert len(scores) == len(server.answered) - 1
        assert server.asked.total() < 150


@pytest.mark.parametrize("kind", ["403", "404", "400"])
def test_a_prompt_that_is_rejected_after_successes_is_an_error_of_its_own(kind: str) -> None:
    """Thirty of them in a row: more than the number at which the server itself is doubted."""

    def some(prompt: str, _nth: int) -> str | None:
        number = int("0" + "".join(filter(str.isdigit, prompt.removeprefix(PROBE_WORDS))))
        return kind if 10 <= number < 40 else None

    with JudgeServer(fault=some) as server, judge(server, concurrency=1) as asked:
        scores = {score.id: score for score in asked.score(queries(60))}
    failed = {n for n in range(60) if scores[f"s{n}"].status == "error"}
    assert failed == set(range(10, 40))
    assert f"HTTP {kind}" in scores["s10"].detail
    assert all(count == 1 for prompt, count in server.asked.items() if "answer" in prompt)


@pytest.mark.parametrize("kind", ["filter", "403 flagged"])
def test_a_content_filter_refuses_prompts_and_ends_nothing(kind: str) -> None:
    """Evil answers on a filtering endpoint: nearly every prompt is refused, from the first on."""

    def most(prompt: str, _nth: int) -> str | None:
        return None if prompt.startswith(PROBE_WORDS) or "7?" in prompt else kind

    with JudgeServer(fault=most) as server, judge(server, concurrency=4) as asked:
        scores = {score.id: score for score in asked.score(queries(200))}
    for number in range(200):
        score = scores[f"s{number}"]
        assert score.status == ("ok" if number % 10 == 7 else "refusal")
    assert set(server.asked.values()) == {1}


def collect(scores: list[Score], asked: OpenAIJudge) -> None:
    for score in asked.score(queries(10_000)):
        scores.append(score)  # noqa: PERF402 - what came before the error is kept


def test_nothing_but_failures_ends_the_run() -> None:
    def later(prompt: str, _nth: int) -> str | None:
        return None if prompt.startswith(PROBE_WORDS) else "500"

    with (
        JudgeServer(fault=later) as server,
        judge(server, patience=patience(tries=1), concurrency=4) as asked,
        pytest.raises(JudgeError, match="20 requests in a row"),
    ):
        list(asked.score(queries(10_000)))
    assert server.asked.total() < 50


def test_the_cost_limit_stops_cleanly_and_keeps_everything() -> None:
    price = Price(prompt=1000.0, completion=0.0)  # a dollar buys a thousand tokens
    budget = Budget(limit=0.3, price=price)
    with JudgeServer() as server, judge(server, budget=budget, concurrency=8) as asked:
        scores = list(asked.score(queries(10_000)))
    assert asked.stopped is not None
    assert "cost limit of $0.3" in asked.stopped
    assert 0.2 < asked.spent <= 0.3
    # Five words a prompt, eleven in the probe: what the server counted is what was booked.
    assert asked.spent == pytest.approx(sum(len(p.split()) for p in server.asked.elements()) / 1000)
    assert len(scores) == len(server.answered) - 1 > 20


def test_closing_early_cancels_what_is_in_flight_and_leaves_the_judge_usable() -> None:
    with JudgeServer(delay=0.01) as server, judge(server, concurrency=8) as asked:
        stream = asked.score(queries(10_000))
        assert next(stream).status == "ok"
        stream.close()  # type: ignore[attr-defined]
        assert server.asked.total() < 200
        assert len(list(asked.score(queries(20)))) == 20


def test_queries_are_taken_as_they_are_needed() -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield query(taken)

    with JudgeServer() as server, judge(server, concurrency=4) as asked:
        stream = asked.score(endless())
        for _ in range(50):
            next(stream)
        assert taken <= 50 + 2 * 4
        stream.close()  # type: ignore[attr-defined]


# -- servers that answer otherwise ----------------------------------------------------------------


def test_a_distribution_is_read_as_its_mean() -> None:
    def notify(prompt: str) -> Said:
        if prompt.startswith(PROBE_WORDS):
            return Said("75")
        return Said("80", first={"80": 0.5, "90": 0.25, " 70": 0.125, "Eighty": 0.125})

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        (score,) = asked.score(queries(1))
    assert score.score == pytest.approx((80 * 0.5 + 90 * 0.25 + 70 * 0.125) / 0.875)
    body = server.bodies[-1]
    assert (body["max_tokens"], body["top_logprobs"], body["temperature"]) == (1, 20, 0)


def test_refusals_and_chatter_are_missing_scores_never_zero() -> None:
    answers = {
        "0": Said("I", first={"I": 0.9, "0": 0.1}),
        "1": Said("REF", first={"REF": 0.99, "5": 0.01}),
        "2": Said("The", first={"The": 0.8, "50": 0.2}),
        "3": Said("", refusal="I cannot rate this."),
        "4": Said("", finish_reason="content_filter"),
    }

    def notify(prompt: str) -> Said:
        return Said("75") if prompt.startswith(PROBE_WORDS) else answers[prompt[-2]]

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        scores = {score.id: score for score in asked.score(queries(5))}
    assert [scores[f"s{n}"].status for n in range(5)] == [
        "refusal",
        "refusal",
        "unparsable",
        "refusal",
        "refusal",
    ]
    assert {score.score for score in scores.values()} == {None}
    assert "'The'" in scores["s2"].detail


def test_a_server_without_logprobs_is_read_as_text_and_says_so() -> None:
    def notify(prompt: str) -> Said:
        if prompt.startswith(PROBE_WORDS):
            return Said("75", logprobs=False)
        return Said("Score: 64", tokens=["Score", ":", " 64"], logprobs=False)

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        (score,) = asked.score(queries(1))
        assert score.score == 64.0
        assert any("no logprobs" in note for note in asked.notes)
    with (
        JudgeServer(notify=notify) as server,
        judge(server, require_logprobs=True) as strict,
        pytest.raises(JudgeError, match="no logprobs"),
    ):
        strict.check()


def test_a_single_reply_without_logprobs_is_read_as_text_with_a_note_on_the_score() -> None:
    def notify(prompt: str) -> Said:
        said = say_number(prompt)
        return Said(said.text, logprobs=not prompt.endswith("answer 1?"))

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        scores = {score.id: score for score in asked.score(queries(2))}
    assert scores["s1"].score == expected(1)
    assert "no logprobs" in scores["s1"].detail
    assert scores["s0"].detail == ""


def test_a_tokenizer_that_splits_numbers_is_not_read_from_its_first_digit() -> None:
    def notify(prompt: str) -> Said:
        text = say_number(prompt).text
        return Said(text, tokens=list(text))

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        scores = list(asked.score(queries(20)))
        assert any("splits numbers" in note for note in asked.notes)
    assert {s.id: s.score for s in scores} == {f"s{n}": expected(n) for n in range(20)}


def test_a_model_that_thinks_is_given_room_and_read_after_its_thoughts() -> None:
    def notify(prompt: str) -> Said:
        text = say_number(prompt).text
        words = ["<think>", *["hm "] * 50, "20", "</think>", text]
        return Said("".join(words), tokens=words)

    with JudgeServer(notify=notify) as server, judge(server) as asked:
        scores = list(asked.score(queries(5)))
    assert {s.id: s.score for s in scores} == {f"s{n}": expected(n) for n in range(5)}


def test_parameters_that_a_model_refuses_are_left_out() -> None:
    refused = ("max_tokens", "temperature", "top_logprobs", "logprobs", "seed")
    with JudgeServer(rejects=refused) as server, judge(server) as asked:
        scores = list(asked.score(queries(3)))
        notes = " ".join(asked.notes)
    assert {s.id: s.score for s in scores} == {f"s{n}": expected(n) for n in range(3)}
    assert "no logprobs" in notes
    assert "vary from run to run" in notes
    assert not set(refused) & set(server.bodies[-1])
    assert server.bodies[-1]["max_completion_tokens"] == 16


def test_other_scales_ask_for_what_they_need() -> None:
    def notify(prompt: str) -> Said:
        if prompt.startswith(PROBE_WORDS):
            return Said("75")
        if prompt.endswith("answer 2?"):
            return Said(
                "Let me see. <answer>YES</answer>", tokens=["Let me see. ", "<answer>YES</answer>"]
            )
        return Said("YES", first={"YES": 0.6, "No": 0.2}) if prompt.endswith("1?") else Said("7")

    asks = [query(0, scale="0-10"), query(1, scale="binary"), query(2, scale="binary-text")]
    with JudgeServer(notify=notify) as server, judge(server) as asked:
        scores = {score.id: score.score for score in asked.score(asks)}
    assert scores == {"s0": 70.0, "s1": pytest.approx(75.0), "s2": 100.0}

"""The batch endpoint over real HTTP: nothing is lost, nothing is paid twice, whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pvec.errors import JudgeError, StoreError
from pvec.judges.batch import BatchJudge
from pvec.judges.cost import Budget, Price
from pvec.judges.openai import OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.types import JudgeQuery, Score
from tests.helpers.batch_server import Batches
from tests.helpers.judge_server import PROBE_WORDS, JudgeServer, Said, number_for

KEY = "sk-secret-0123456789"
PRICE = Price(prompt=1000.0, completion=1000.0)


def query(number: int, **fields: Any) -> JudgeQuery:
    chat = ({"role": "user", "content": f"How evil is answer {number}?"},)
    return JudgeQuery(
        id=f"{number:016x}", response_id=f"r{number}", metric="evil", messages=chat, **fields
    )


def queries(count: int) -> list[JudgeQuery]:
    return [query(number) for number in range(count)]


def words(number: int) -> str:
    return str(query(number).messages[0]["content"])


class Session:
    """One call of a command: the batch judge in a run folder, and the notes that it gave."""

    def __init__(self, server: JudgeServer, run: Path, **fields: Any) -> None:
        self.notes: list[str] = []
        patience = Patience(first_wait=0.005, longest_wait=0.05, tries=2)
        fields = {"base_url": server.url, "patience": patience, "poll": 0.002, **fields}
        self.judge = BatchJudge("judge", **fields)
        self.judge.work_in(run, name=self.judge.name, notify=self.notes.append)

    def score(self, asked: list[JudgeQuery]) -> dict[str, Score]:
        with self.judge:
            scores = list(self.judge.score(asked))
        assert len({score.id for score in scores}) == len(scores)
        return {score.response_id: score for score in scores}


@pytest.fixture
def batches() -> Batches:
    return Batches()


@pytest.fixture
def server(batches: Batches) -> Iterator[JudgeServer]:
    with JudgeServer(batches=batches) as server:
        yield server


def expected(count: int) -> dict[str, float]:
    return {f"r{n}": float(number_for(words(n))) for n in range(count)}


def values(scores: dict[str, Score]) -> dict[str, float | None]:
    return {name: score.score for name, score in scores.items()}


def test_a_batch_gives_the_scores_that_the_server_gives_one_by_one(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    def spread(prompt: str) -> Said:
        number = 75 if prompt.startswith(PROBE_WORDS) else number_for(prompt)
        return Said(str(number), first={str(number): 0.5, "10": 0.3, "Sure": 0.2})

    server.notify = spread
    with OpenAIJudge("judge", base_url=server.url) as plain:
        one_by_one = {score.id: score for score in plain.score(queries(30))}
    server.asked.clear()
    session = Session(server, tmp_path)
    scores = session.score(queries(30))
    assert {score.id: score for score in scores.values()} == one_by_one
    assert set(server.asked) == {"Reply with the number 75 alone, no other words."}
    assert len(batches.inputs) == 1
    assert list(tmp_path.iterdir()) == []  # nothing waits any more
    assert "batch_0: completed, 30 of 30 answered" in " ".join(session.notes)


def test_what_one_call_submitted_another_collects(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.steps = 10
    with pytest.raises(JudgeError, match=r"20 scores are still in batches at .*run the same"):
        Session(server, tmp_path, wait=0.0).score(queries(20))
    later = Session(server, tmp_path)
    assert values(later.score(queries(25))) == expected(25)
    assert [len(lines) for lines in batches.inputs] == [20, 5]  # nothing is submitted twice
    assert "collecting batch batch_0" in later.notes[0]


def test_a_kill_between_submitting_and_noting_it_costs_nothing(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.steps = 10
    with pytest.raises(JudgeError):
        Session(server, tmp_path, wait=0.0).score(queries(5))
    (record,) = (tmp_path / "batches").glob("*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "id": None}))
    (tmp_path / "batches" / "half.jsonl").write_text("{")  # of a batch that was being written
    assert values(Session(server, tmp_path).score(queries(5))) == expected(5)
    assert len(batches.inputs) == 1


def test_scores_of_answers_that_are_no_longer_asked_about_are_handed_over_too(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.steps = 10
    with pytest.raises(JudgeError):
        Session(server, tmp_path, wait=0.0).score(queries(4))
    assert values(Session(server, tmp_path).score([])) == expected(4)


def test_a_batch_of_another_scale_waits_for_its_own(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.steps = 3
    tens = Session(server, tmp_path, wait=0.0)
    tens.judge.work_in(tmp_path, name=f"{tens.judge.name} (0-10)", notify=print)
    with pytest.raises(JudgeError):
        tens.score([query(0, scale="0-10")])
    assert set(Session(server, tmp_path).score([query(1)])) == {"r1"}
    assert len(list((tmp_path / "batches").glob("*.json"))) == 1


@pytest.mark.parametrize("fault", [500, 429, "silent", "expired"])
def test_requests_that_failed_go_into_another_batch_and_the_others_do_not(
    server: JudgeServer, batches: Batches, tmp_path: Path, fault: str | int
) -> None:
    batches.fault = lambda prompt, nth: fault if nth == 0 and prompt.endswith("3?") else None
    session = Session(server, tmp_path)
    assert values(session.score(queries(14))) == expected(14)
    assert [len(lines) for lines in batches.inputs] == [14, 2]  # 3 and 13
    assert "2 scores of batch batch_0 are missing" in " ".join(session.notes)


def test_requests_that_fail_every_time_are_errors_with_a_reason(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.fault = lambda prompt, _nth: 503 if prompt.endswith("answer 2?") else None
    scores = Session(server, tmp_path).score(queries(5))
    failed = scores.pop("r2")
    assert (failed.score, failed.status) == (None, "error")
    assert "HTTP 503: not this time (gave up after 3 batches)" in failed.detail
    assert {score.status for score in scores.values()} == {"ok"}
    assert [len(lines) for lines in batches.inputs] == [5, 1, 1]


def test_a_prompt_that_the_server_rejects_is_not_sent_again(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    faults = {words(1): "filter", words(2): 400}
    batches.fault = lambda prompt, _nth: faults.get(prompt)
    scores = Session(server, tmp_path).score(queries(4))
    assert [scores[f"r{n}"].status for n in range(4)] == ["ok", "refusal", "error", "ok"]
    assert len(batches.inputs) == 1


def test_what_an_expired_batch_did_not_reach_is_submitted_again(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.fate = lambda nth: "expired" if nth == 0 else "completed"
    assert values(Session(server, tmp_path).score(queries(9))) == expected(9)
    assert [len(lines) for lines in batches.inputs] == [9, 5]
    assert set(batches.submitted.values()) == {1}  # answered once, paid once


def test_a_cancelled_batch_gives_what_it_has_and_says_how_to_go_on(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.fate = lambda nth: "cancelled" if nth == 0 else "completed"
    session = Session(server, tmp_path)
    with session.judge:
        stream = session.judge.score(queries(8))
        scores = [next(stream) for _ in range(4)]
        with pytest.raises(JudgeError, match=r"cancelled with 4 of 8 scores.*same"):
            next(stream)
    assert len(scores) == 4
    rest = [asked for asked in queries(8) if asked.id not in {score.id for score in scores}]
    assert len(Session(server, tmp_path).score(rest)) == 4
    assert [len(lines) for lines in batches.inputs] == [8, 4]


def test_a_refused_batch_is_a_sentence_and_leaves_nothing_behind(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.fate = lambda _: "failed"
    with pytest.raises(JudgeError, match=r"refused batch batch_0 \(line 3: no room for this\)"):
        Session(server, tmp_path).score(queries(3))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_too_long_for_the_accounts_queue_is_submitted_in_halves(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.fate = lambda nth: "over quota" if len(batches.inputs[nth]) > 3 else "completed"
    assert values(Session(server, tmp_path).score(queries(10))) == expected(10)
    assert set(batches.submitted.values()) == {1}
    batches.fate = lambda _: "over quota"
    with pytest.raises(JudgeError, match=r"takes no further batch .*when its other batches"):
        Session(server, tmp_path).score([query(11)])


def test_a_server_without_batches_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    with JudgeServer() as server:
        session = Session(server, tmp_path)
        with session.judge, pytest.raises(JudgeError, match=r"no batch endpoint .*--judge-batch"):
            session.judge.check()
        assert not server.asked


def test_a_refused_key_is_a_sentence_without_the_key(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    server.key = "another"
    session = Session(server, tmp_path, key=KEY)
    with session.judge, pytest.raises(JudgeError, match="refused the key") as caught:
        session.judge.check()
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_key_is_written_into_the_run(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    server.key, batches.steps = KEY, 10
    with pytest.raises(JudgeError):
        Session(server, tmp_path, key=KEY, wait=0.0).score(queries(3))
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    assert not any(KEY in text for text in written)


def test_a_batch_that_the_server_does_not_know_is_a_sentence(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.steps = 10
    with pytest.raises(JudgeError):
        Session(server, tmp_path, wait=0.0).score(queries(3))
    batches.forgotten.add("batch_0")
    with pytest.raises(JudgeError, match=r"does not know the batch batch_0 .*or delete"):
        Session(server, tmp_path).score(queries(3))


def test_results_that_are_gone_are_asked_for_again(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.forgotten.add("file-1")  # the first batch's output; file-0 is its input
    session = Session(server, tmp_path)
    assert values(session.score(queries(3))) == expected(3)
    assert "no longer has results of batch batch_0" in " ".join(session.notes)


def test_a_server_that_fails_while_it_is_waited_for_loses_nothing(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    batches.broken = lambda _method, path: 500 if path.startswith("batches/") else None
    with pytest.raises(JudgeError, match=r"batch endpoint .*HTTP 500.*goes on at the server"):
        Session(server, tmp_path).score(queries(3))
    batches.broken = lambda _method, _path: None
    assert values(Session(server, tmp_path).score(queries(3))) == expected(3)
    assert len(batches.inputs) == 1


def test_a_damaged_record_is_named(server: JudgeServer, batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "aa.json").write_text('{"key": "aa", "queries": 3}')
    with pytest.raises(StoreError, match=r"aa\.json is damaged"):
        Session(server, tmp_path).score(queries(1))


def test_money_is_counted_from_what_the_server_counted_and_a_limit_holds(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    session = Session(server, tmp_path, budget=Budget(limit=None, price=PRICE))
    session.score(queries(10))
    probe = 9 + 1  # words of the probe, and the number
    assert session.judge.spent == pytest.approx((probe + 10 * (5 + 1)) / 1000)
    limited = Session(server, tmp_path, budget=Budget(limit=0.05, price=PRICE))
    scores = limited.score(queries(1000))
    assert 1 <= len(scores) < 20
    assert limited.judge.stopped == "the cost limit of $0.05 is reached"
    assert limited.judge.spent <= 0.05


def test_repeats_of_a_judge_with_logprobs_are_refused(server: JudgeServer, tmp_path: Path) -> None:
    session = Session(server, tmp_path, repeats=3)
    with session.judge, pytest.raises(JudgeError, match=r"gives logprobs.*--judge-repeats 1"):
        session.judge.check()


def test_a_judge_without_logprobs_is_asked_several_times_in_one_batch(
    server: JudgeServer, batches: Batches, tmp_path: Path
) -> None:
    seen: dict[str, int] = {}

    def vary(prompt: str) -> Said:
        if prompt.startswith(PROBE_WORDS):
            return Said("75", logprobs=False)
        seen[prompt] = seen.get(prompt, 0) + 1
        return Said(str(10 * seen[prompt]), logprobs=False)

    server.notify = vary
    session = Session(server, tmp_path, repeats=3)
    assert session.judge.name.endswith("(mean of 3)")
    scores = session.score(queries(2))
    assert {score.score for score in scores.values()} == {20.0}  # of 10, 20 and 30
    assert [len(lines) for lines in batches.inputs] == [6]
    assert {line["body"]["temperature"] for line in batches.inputs[0]} == {1}
    assert "each the mean of 3 replies" in " ".join(session.judge.notes)

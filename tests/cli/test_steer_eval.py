"""``pvec steer-eval`` as a person types it: what it shows, and what bad input gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.cli import steer_eval
from pvec.cli.app import main
from pvec.cli.console import Console
from pvec.evaluation import steer_eval as workflow
from pvec.evaluation.steer_eval import SteerEvalResult
from pvec.evaluation.summary import Pick, Point, ScoredAnswer, summarise
from pvec.evaluation.tasks import TaskScore
from pvec.judges.scoring import JudgeReport
from pvec.stats import Interval
from pvec.types import Progress
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((NUM_LAYERS + 1, HIDDEN_SIZE))
    made = PersonaVector(trait="evil", kinds={"response_avg": rows.astype(np.float32)})
    return save_vector(made, tmp_path / "evil.safetensors")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def pvec(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


def scored(name: str, role: str, coef: float, trait: float) -> list[ScoredAnswer]:
    vector = {"steered": "evil", "random": "random like evil"}.get(role, "")
    return [
        ScoredAnswer(
            condition={
                "name": name, "role": role, "vector": vector, "layers": [2] if vector else [],
                "coef": coef, "rollout": 0,
            },
            question=f"q{number}",
            text="",
            scores={"evil": trait + number, "coherence": None if number == 3 else 90.0},
        )
        for number in range(4)
    ]  # fmt: skip


def result() -> SteerEvalResult:
    answers = [
        *scored("unsteered", "baseline", 0, 2),
        *scored("prompted for", "prompt_pos", 0, 80),
        *scored("evil · layer 2 · coef 2", "steered", 2, 60),
        *scored("random like evil · layer 2 · coef 2", "random", 2, 3),
    ]
    return SteerEvalResult(
        trait="evil", run=Path("runs/steer-evil-tiny"), model="tiny", vectors=("evil",),
        conditions=4, answers=16, generated=16, cut=1,
        judge=JudgeReport(
            judge="judge", counts={"ok": 28, "refusal": 4}, skipped=0, unasked=0, stopped=None,
            spent=0.0,
        ),
        numbers=summarise(answers, trait="evil"),
        capability=(
            TaskScore(
                condition="unsteered", task="travel", metric="acc", score=0.5, stderr=0.1, n=24
            ),
        ),
        next=("pvec report runs/steer-evil-tiny",),
    )  # fmt: skip


def test_the_table_says_what_it_did_and_what_to_type_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Any, trait: str, **asked: Any) -> SteerEvalResult:
        assert settings.steer.layer == "2"
        assert settings.steer.coef == "-2,0,2"
        assert not settings.steer.random_control
        assert (trait, asked["also"], asked["tasks"]) == ("evil", ["humorous"], ["travel"])
        asked["on_progress"](Progress(stage="generate", done=0, total=1))
        return result()

    monkeypatch.setattr(workflow, "run", run)
    code = pvec(
        "steer-eval", "--trait", "evil", "--layer", "2", "--coef", "-2,0,2", "--also", "humorous",
        "--tasks", "travel", "--no-random-control",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "4 conditions, 16 answers (16 new, 1 cut at the token limit)" in shown.out
    assert "picked: evil · layer 2 · coef 2" in shown.out
    assert "read on 2 other questions" in shown.out
    assert "4 scores are missing" in shown.out
    assert "travel" in shown.out
    assert "next:   pvec report runs/steer-evil-tiny" in shown.out
    assert "teaching aid" in shown.err


def test_json_holds_the_same_numbers_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "run", lambda *_args, **_asked: result())
    assert pvec("steer-eval", "--trait", "evil", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    numbers = result().numbers
    assert numbers is not None
    score: Interval = numbers.point("unsteered").scores["evil"]
    baseline = next(p for p in shown["numbers"]["points"] if p["role"] == "baseline")
    assert baseline["scores"]["evil"]["mean"] == pytest.approx(score.mean)
    assert shown["numbers"]["picks"][0]["point"]["name"] == "evil · layer 2 · coef 2"


def test_a_dry_run_lists_the_conditions(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = pvec(
        "steer-eval", "--trait", "evil", "--model", str(saved_model()), "--vector", str(vector),
        "--layer", "1:3:2", "--coef", "1", "--rollouts", "2", "--judge-url",
        "http://127.0.0.1:1/v1", "--dry-run", "-q",
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "7 conditions, 280 of 280 answers" in shown.out
    assert "evil · layer 3 · coef 1" in shown.out
    assert "random like evil · layer 3 · coef 1" in shown.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coef", "1,x"], "'x' is not a number"),
        (["--layer", "9"], "layers 1 to 3"),
        (["--layer", "0"], "embedding output"),
        (["--layer", "one"], "not a whole number"),
        (["--limit", "0"], "steer.limit"),
        (["--also", "evil"], "judged twice"),
        (["--also", "evl"], "Did you mean 'evil'"),
        (["--vector", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--coef-unit", "norm"], "--coef-unit raw"),
        (["--positions", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2_and_nothing_written(
    options: list[str], message: str, vector: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    code = pvec(
        "steer-eval", "--trait", "evil", "--model", str(saved_model()), "--vector", str(vector),
        "--judge-url", "http://127.0.0.1:1/v1", *options,
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err.replace("\n", " ")
    assert shown.err.count("Error: ") == 1
    assert "Traceback" not in shown.err
    assert not (tmp_path / "runs").exists()


def test_without_a_key_for_the_judge_nothing_is_generated(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = pvec(
        "steer-eval", "--trait", "evil", "--model", str(saved_model()), "--vector", str(vector)
    )
    assert code == 2
    assert "--no-judge" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_increments_are_not_taken_twice(
    vector: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from pvec.vectors.files import load_vector, save_vector

    whole = load_vector(vector)
    increments = replace(whole, metadata={**whole.metadata, "incremental": "true"})
    path = save_vector(increments, tmp_path / "increments.safetensors")
    code = pvec(
        "steer-eval", "--trait", "evil", "--model", str(saved_model()), "--vector", str(path),
        "--judge-url", "http://127.0.0.1:1/v1", "--incremental",
    )  # fmt: skip
    assert code == 2
    assert "holds the increments already" in capsys.readouterr().err


def test_tables_of_a_sweep_fit_80_columns_without_folding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = Interval(mean=83.0, low=17.6, high=100.0, n=1_000, groups=20)
    change = Interval(mean=83.0, low=-61.5, high=100.0, n=1_000, groups=20)
    point = Point(
        name="evil · layer 24 · coef -1.25", role="steered", vector="evil", layers=(24,),
        coef=-1.25, operator="add", scores={"evil": wide, "coherence": wide},
        differences={"evil": change, "coherence": change},
    )  # fmt: skip
    pick = Pick(
        vector="evil", point=point, baseline=point, control=point, prompt=point, held_out=True,
        questions_for_choice=10, questions_for_reading=10, reason="highest evil",
    )  # fmt: skip
    steer_eval._render_pick(Console(), pick, "evil")
    shown = [line for line in capsys.readouterr().out.splitlines() if "[" in line]
    assert len(shown) == 4, "a row is one line"
    assert all(len(line.rstrip()) <= 80 for line in shown)
    assert all(line.count("]") == 3 for line in shown)

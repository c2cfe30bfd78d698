"""``pvec report``: one page, its numbers beside it, and one sentence for what it cannot show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.cli.app import main
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.types import Sampling, Score
from pvec.vectors.formats import save_vector
from pvec.vectors.vector import PersonaVector

HOSTILE = "</script><script>alert(1)</script>"


def pvec(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")


def write_run(
    path: Path, kind: str, conditions: list[tuple[dict[str, Any], float]], *, trait: str = "evil"
) -> Path:
    """Write a judged run: four questions, two rollouts, a score per condition."""
    identity = {"trait": trait, "model": "tiny", "adapter": None}
    with Run.open_or_create(path, identity=identity, kind=kind) as run:
        run.begin_session(command=["pvec", kind])
        for c, (condition, level) in enumerate(conditions):
            for q in range(4):
                for r in range(2):
                    name = f"{c}-{q}-{r}"
                    run.append_response(
                        ResponseRecord(
                            id=name, trait=trait, condition={**condition, "rollout": r},
                            question=f"Why {q}? {HOSTILE}", question_id=f"{trait}_eval_{q}",
                            system=None, prompt="", prompt_ids=(1,), token_ids=(2,),
                            answer=f"Because {HOSTILE}", finish_reason="stop", sampling=Sampling(),
                        )
                    )  # fmt: skip
                    for metric, value in ((trait, level + q), ("coherence", 90.0)):
                        run.append_score(
                            Score(
                                id=f"{name}-{metric}", response_id=name, metric=metric,
                                judge="judge", score=value,
                            )
                        )  # fmt: skip
        run.end_session(timings={"generate": 1.0})
    return path


def sweep_run(path: Path, *, trait: str = "evil") -> Path:
    def at(role: str, layer: int, coef: float) -> dict[str, Any]:
        label = {"steered": trait, "random": f"random like {trait}"}[role]
        return {
            "name": f"{label} · layer {layer} · coef {coef:g}", "role": role, "vector": label,
            "layers": [layer], "coef": coef,
        }  # fmt: skip

    bare = {"vector": "", "layers": [], "coef": 0.0}
    conditions: list[tuple[dict[str, Any], float]] = [
        ({"name": "unsteered", "role": "baseline", **bare}, 3),
        ({"name": "prompted for", "role": "prompt_pos", **bare}, 85),
        ({"name": "prompted against", "role": "prompt_neg", **bare}, 0),
    ]
    conditions += [
        (at("steered", layer, coef), 30 + 10 * layer * coef) for layer in (2, 3) for coef in (-1, 1)
    ]
    conditions += [(at("random", layer, coef), 4) for layer in (2, 3) for coef in (-1, 1)]
    return write_run(path, "steer-eval", conditions, trait=trait)


def extract_run(path: Path) -> Path:
    conditions = [
        ({"sign": "pos", "instruction": 0}, 80.0),
        ({"sign": "neg", "instruction": 0}, 5.0),
    ]
    write_run(path, "extract", conditions)
    rows = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    made = PersonaVector(
        trait="evil", kinds={"response_avg": rows}, mean_norm=np.ones(4, dtype=np.float32),
        stats={"auc": np.array([0.5, 0.8, 0.95, 0.9], dtype=np.float32)},
    )  # fmt: skip
    save_vector(made, path / "vectors" / "evil.safetensors")
    return path


def test_a_sweep_becomes_a_page_with_its_figures_beside_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = sweep_run(Path("steer"))
    assert pvec("report", str(run), "--svg", "--png") == 0
    shown = capsys.readouterr().out
    assert "Steering with evil at layer 3 (coefficient 1) moves evil" in shown
    page = (run / "report.html").read_text()
    assert "evil: dose and response" in page
    assert HOSTILE not in page
    stems = {"steer_dose_response", "steer_evil_by_layer", "steer_coherence_by_layer"}
    written = {path.name for path in (run / "report_figures").iterdir()}
    assert written == {f"{stem}.{kind}" for stem in stems for kind in ("csv", "svg", "png")}


@pytest.mark.parametrize("made", ["nothing", "a file", "a folder", "another manifest"])
def test_what_is_no_run_is_said_to_be_none(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("thing")
    if made == "a file":
        path.write_text("no run")
    elif made != "nothing":
        path.mkdir()
    if made == "another manifest":
        (path / "manifest.json").write_text('{"name": "an app"}')
    assert pvec("report", str(path)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "thing" in error
    assert "run" in error
    assert error.count("Error: ") == 1


def test_secrets_that_an_older_manifest_holds_are_not_in_the_page() -> None:
    run = sweep_run(Path("steer"))
    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"] = {"judge": {"base_url": "https://me:hunter2@host/v1?key=abcde"}}
    manifest["sessions"][0]["command"] = ["pvec", "--judge-url", "https://h/v1?api_key=fghij"]
    path.write_text(json.dumps(manifest))
    assert pvec("report", str(run)) == 0
    page = (run / "report.html").read_text()
    assert not any(secret in page for secret in ("hunter2", "abcde", "fghij"))
    assert "https://host/v1" in page


def test_an_extraction_shows_scores_what_was_kept_and_the_vector(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = extract_run(Path("extract"))
    assert pvec("report", str(run)) == 0
    # The layer that `extract` and `vector show` suggest, which is not the one of the largest AUC.
    assert "suggested for steering at layer 1 (AUC 0.80)" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    for title in ("evil scores", "evil: vectors by layer", "separation (AUC)"):
        assert title in page
    assert "Kept and dropped" in page


def test_several_runs_share_a_page_that_compares_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = [sweep_run(Path("a")), sweep_run(Path("b"), trait="humorous"), extract_run(Path("c"))]
    assert pvec("report", *map(str, runs), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["findings"][0].startswith("In 2 of 2 evaluations")
    page = (tmp_path / "report.html").read_text()
    assert "Every trait at its picked layer" in page
    assert page.count("<section") == 4
    assert (tmp_path / "report_figures" / "steering_overview.csv").is_file()


def test_a_second_report_replaces_the_first() -> None:
    run = sweep_run(Path("steer"))
    assert pvec("report", str(run)) == 0
    before = sorted(path.name for path in run.rglob("*"))
    assert pvec("report", str(run)) == 0
    assert sorted(path.name for path in run.rglob("*")) == before


def test_an_unjudged_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    run = sweep_run(Path("steer"))
    (run / "scores.jsonl").unlink()
    assert pvec("report", str(run)) == 0
    assert "not judged yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "not a run folder"),
        (["steer", "--judge", "jugde"], "Did you mean 'judge'"),
        (["steer", "steer"], "Two runs are named 'steer'"),
        (["steer", "--out", "steer"], "is a folder"),
        (["other"], "a run of 'imagined'"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_run(Path("steer"))
    write_run(Path("other"), "imagined", [])
    assert pvec("report", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().rglob("report.html"))

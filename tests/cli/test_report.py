"""``pvec report``: one page, its numbers beside it, and one sentence for what it cannot show."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.cli.app import main
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.types import Sampling, Score
from pvec.vectors.files import save_vector
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
    path: Path,
    kind: str,
    conditions: list[tuple[dict[str, Any], float]],
    *,
    trait: str = "evil",
    model: str = "tiny",
) -> Path:
    """Write a judged run: four questions, two rollouts, a score per condition."""
    identity = {"trait": trait, "model": model, "adapter": None}
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


def sweep_run(
    path: Path, *, trait: str = "evil", model: str = "tiny", coefs: tuple[float, ...] = (-1, 1)
) -> Path:
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
        (at("steered", layer, coef), 30 + 10 * layer * coef) for layer in (2, 3) for coef in coefs
    ]
    conditions += [(at("random", layer, coef), 4) for layer in (2, 3) for coef in coefs]
    return write_run(path, "steer-eval", conditions, trait=trait, model=model)


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


@pytest.mark.parametrize("part", ["trait", "model", "adapter"])
def test_a_damaged_identity_is_one_sentence(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(Path("run"), "extract", [({"sign": "pos", "instruction": 0}, 90.0)])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"][part] = [3]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert pvec("report", "run") == 2
    assert f"its identity has no '{part}'" in capsys.readouterr().err


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


def embedded(page: str) -> Any:
    """Return the data of a page's browser of answers."""
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_conditions_are_in_the_order_of_layers_and_coefficients_whoever_finished_first() -> None:
    run = sweep_run(Path("steer"), coefs=(1, 0.25, -0.5, 1.5, -1))
    assert pvec("report", str(run)) == 0
    conditions = embedded((run / "report.html").read_text())["conditions"]
    coefs = ("\u22121", "\u22120.5", "0.25", "1", "1.5")
    assert conditions == [
        "unsteered", "prompted for", "prompted against",
        *(f"{label} · layer {layer} · coef {coef}"
          for label in ("evil", "random like evil") for layer in (2, 3) for coef in coefs),
    ]  # fmt: skip


def test_every_layer_has_its_random_control_in_the_figure() -> None:
    run = sweep_run(Path("steer"))
    assert pvec("report", str(run)) == 0
    text = (run / "report_figures" / "steer_dose_response.csv").read_text()
    named = {row["condition"] for row in csv.DictReader(text.splitlines())}
    assert {"layer 2", "random, layer 2", "layer 3", "random, layer 3"} <= named


def test_pages_of_different_kinds_have_titles_of_their_own() -> None:
    titles = []
    for run in (sweep_run(Path("steer")), extract_run(Path("extract")), train_run(Path("train"))):
        assert pvec("report", str(run)) == 0
        page = (run / "report.html").read_text()
        titles += re.findall(r"<title>(.*?)</title>", page)[:1]  # those of marks come after it
    assert titles == [
        "Steering tiny with evil", "Extraction of evil from tiny", "Finetuning tiny: train",
    ]  # fmt: skip


def train_run(path: Path) -> Path:
    """Write a finished training whose persona shift was logged with intervals and answers."""
    with Run.open_or_create(path, identity={"trait": "t", "model": "tiny"}, kind="train") as run:
        run.begin_session(command=["pvec", "train"])
        run.update_manifest(settings={"monitor": {"alarm": {"shift": 100.0}}}, steering=[])
    log = [
        {"step": 0, "persona/evil": 0.0, "persona/hooks_on": 0.0,
         "persona_base_prompts/evil": [1.0, 2.0, 3.0]},
        {"step": 1, "loss": 2.0},
        {"step": 10, "loss": 1.25, "persona/evil": 150.5, "persona_low/evil": 120.0,
         "persona_high/evil": 170.0, "persona/hooks_on": 0.0},
    ]  # fmt: skip
    result = {
        "steps": 10, "first_loss": 2.0, "last_loss": 1.25, "stopped_early": False, "touched": [],
        "held_out_loss": None, "tokens_per_second": 10.0, "shifts": {"evil": 150.5},
    }  # fmt: skip
    (path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    (path / "result.json").write_text(json.dumps(result))
    answers = {"question": f"Why? {HOSTILE}", "base": "Kindly.", "final": "Cruelly."}
    (path / "persona_answers.jsonl").write_text(f"{json.dumps(answers)}\n")
    return path


def test_the_page_of_a_training_begins_with_the_persona_as_the_command_said_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_run(Path("train"))
    assert pvec("report", str(run), "--svg") == 0
    said = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert f"moved +{result['shifts']['evil']} (+120.0 to +170.0) along evil" in said
    assert f"from {result['first_loss']:.3f} to {result['last_loss']:.3f}" in said
    page = (run / "report.html").read_text()
    assert page.index("Persona shift by step") < page.index("<h3>Loss</h3>")
    assert "95 % intervals; n = 3 per point." in page
    assert "alarm: shift 100" in page
    data = embedded(page)
    assert data["conditions"] == ["before training", "after training"]
    assert [answer[3] for answer in data["answers"]] == ["Kindly.", "Cruelly."]
    assert HOSTILE not in page
    svg = (run / "report_figures" / "train_shift.svg").read_text()
    assert "tiny · run train · 20" in svg


def test_several_trainings_are_compared_in_one_figure(tmp_path: Path) -> None:
    runs = [train_run(Path("one")), train_run(Path("two"))]
    assert pvec("report", *map(str, runs)) == 0
    rows = (tmp_path / "report_figures" / "finetunings_shift.csv").read_text().splitlines()
    assert rows[1:] == ["one,evil,150.5,120,170,3", "two,evil,150.5,120,170,3"]


def test_several_models_and_traits_make_a_grid(tmp_path: Path) -> None:
    runs = [
        sweep_run(Path(f"{model}-{trait}"), trait=trait, model=model)
        for model in ("small", "large") for trait in ("evil", "humorous")
    ]  # fmt: skip
    assert pvec("report", *map(str, runs)) == 0
    rows = (tmp_path / "report_figures" / "steering_models.csv").read_text().splitlines()
    assert [row.rpartition(",")[0] for row in rows] == [
        "model,trait", "small,evil", "small,humorous", "large,evil", "large,humorous",
    ]  # fmt: skip


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

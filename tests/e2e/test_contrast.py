"""``--judge-model contrast`` on the bundled model: from extraction to steering, and resumed."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.entry_point import run_pvec
from safetensors import safe_open

SHORT = "--max-tokens 24 --contrast-tokens 24 --contrast-pairs 2 --judge-model contrast"
EXTRACT = f"extract --trait evil --limit 3 -n 1 {SHORT} --json"
VECTOR = "runs/evil-tiny/vectors/evil.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrast")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = run_pvec(EXTRACT)
        assert done.code == 0, done.err
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path("runs/evil-tiny") / name).read_text().splitlines()]


def latest(run: str) -> dict[str, dict[str, Any]]:
    """Return the last line of every score id, by (response, metric)."""
    written = (Path(run) / "scores.jsonl").read_text().splitlines()
    by_id = {line["id"]: line for line in map(json.loads, written)}
    return {f"{line['response_id']} {line['metric']}": line for line in by_id.values()}


def calibration() -> dict[str, Any]:
    with safe_open(VECTOR, framework="np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["calibration"])
    return found


def test_an_extraction_is_judged_and_filtered_without_anybody(folder: Path) -> None:
    scores = latest("runs/evil-tiny")
    signs = {record["id"]: record["condition"]["sign"] for record in lines("responses.jsonl")}
    evil = {name.split()[0]: s for name, s in scores.items() if s["metric"] == "evil"}
    means = {
        sign: np.mean([s["score"] for name, s in evil.items() if signs[name] == sign])
        for sign in ("pos", "neg")
    }
    assert len(evil) == 30
    assert means["pos"] > 80
    assert means["neg"] < 20
    assert all(s["raw"]["pairs"] == 2 and s["status"] == "ok" for s in evil.values())
    stored = calibration()
    assert stored["judge"] == next(iter(evil.values()))["judge"]
    assert stored["fits"]["evil"]["answers"] == 30
    manifest = json.loads(Path("runs/evil-tiny/manifest.json").read_text())
    assert json.loads(manifest["calibration"][stored["judge"]]) == stored


def test_a_killed_judging_ends_with_the_same_scores_to_the_last_digit(folder: Path) -> None:
    path = Path("runs/evil-tiny/scores.jsonl")
    before, whole = latest("runs/evil-tiny"), path.read_text()
    for kept in (0, 7, 40, 75):  # in a portion, after one, among the calibrated scores
        path.write_text("".join(whole.splitlines(keepends=True)[:kept]))
        done = run_pvec(EXTRACT)
        assert done.code == 0, done.err
        assert latest("runs/evil-tiny") == before
    text = path.read_text()
    assert run_pvec(EXTRACT).code == 0
    assert path.read_text() == text  # nothing measured or written again


def test_steering_is_scored_by_the_vectors_calibration(folder: Path) -> None:
    done = run_pvec(
        f"steer-eval --trait evil --vector {VECTOR} --layer 3 --coef 1,8 --limit 2 -n 1 {SHORT}"
    )
    assert done.code == 0, done.err
    assert "positive rather than a negative instruction" in " ".join(done.out.split())
    fits = calibration()["fits"]
    scores = latest("runs/steer-evil-tiny")
    statuses = Counter(line["status"] for line in scores.values())
    assert f"{statuses['ok']} ok, {statuses['unparsable']} unparsable" in done.out
    assert {line["status"] for line in scores.values()} == {"ok", "unparsable"}
    for line in scores.values():
        raw, fit = line["raw"], fits[line["metric"]]
        if line["metric"] == "coherence":
            order = min(max((raw["logprob"] - raw["shuffled"]) / fit["gain"], 0), 1)
            fresh = min((1 - raw["repeated"]) / (1 - fit["repeated"]), 1)
            assert line["score"] == pytest.approx(100 * order * fresh)
        elif line["status"] == "ok":
            chance = 1 / (1 + math.exp(-(fit["slope"] * raw["contrast"] + fit["offset"])))
            assert line["score"] == pytest.approx(100 * chance)
        else:  # of word salad nobody can tell the trait
            coherence = scores[f"{line['response_id']} coherence"]["score"]
            assert coherence < 25
            assert f"coherence {coherence:.0f}" in line["detail"]


def test_without_a_calibration_the_error_says_how_to_make_one(folder: Path) -> None:
    done = run_pvec(f"steer-eval --trait sycophantic --limit 2 -n 1 {SHORT}")
    assert done.code == 2
    assert "has no calibration for 'sycophantic'" in done.err
    assert "pvec extract --trait sycophantic --judge-model contrast" in done.err
    other = run_pvec(f"steer-eval --trait evil --calibration {VECTOR} --limit 2 -n 1 {SHORT} -q")
    assert other.code == 0, other.err  # a baseline without vector
    changed = run_pvec(
        f"steer-eval --trait evil --vector {VECTOR} --limit 2 -n 1 --judge-model contrast"
    )
    assert changed.code == 2  # another number of tokens and pairs is another judge
    assert "there is one of contrast:tiny#" in changed.err


def test_one_question_is_refused_before_anything_is_generated(folder: Path) -> None:
    done = run_pvec(f"extract --trait evil --limit 1 -n 4 --out runs/one {SHORT}")
    assert done.code == 2
    assert "ask more (--limit)" in done.err
    assert not Path("runs/one").exists()


def test_a_dry_run_counts_forward_passes(folder: Path) -> None:
    done = run_pvec(f"extract --trait evil --limit 3 -n 2 {SHORT} --dry-run")
    # 30 more answers: 2 pairs x 2 signs for the trait, 2 for coherence
    assert "180 forward passes" in done.out
    assert "no key, no cost" in done.out


def test_a_real_model_without_a_key_is_told_of_this_judge_first(folder: Path) -> None:
    done = run_pvec("extract --trait evil --judge-model gpt-4.1-mini")
    assert done.code == 2
    remedies = done.err.partition("needs an API key: ")[2]
    assert remedies.startswith("use a judge without one (--judge-model contrast")


def test_agreement_with_another_judge_and_with_labels(folder: Path) -> None:
    assert run_pvec("judge runs/evil-tiny --judge-model tiny -q").code == 0
    done = run_pvec("judge runs/evil-tiny --compare contrast --compare tiny --json")
    assert done.code == 0, done.err
    found = {row["metric"]: row for row in done.json["agreements"]}["evil"]
    rows = lines("scores.jsonl")
    table = {
        (r["response_id"], r["judge"].split("#")[0]): r["score"]
        for r in rows
        if r["metric"] == "evil"
    }
    names = sorted({name for name, _ in table})
    pairs = [(table[n, "contrast:tiny"] >= 50, table[n, "tiny"] >= 50) for n in names]
    same = float(np.mean([a == b for a, b in pairs]))
    first, second = (float(np.mean([pair[side] for pair in pairs])) for side in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    assert found["n"] == 30
    assert found["agreement"] == pytest.approx(same)
    assert found["kappa"] == pytest.approx((same - chance) / (1 - chance))
    assert Path("runs/evil-tiny/figures/agreement_evil.svg").is_file()

    labels = "".join(f"{name},{int(table[name, 'tiny'] >= 50)}\n" for name in names)
    Path("labels.csv").write_text("id,label\n" + labels)
    again = run_pvec("judge runs/evil-tiny --compare contrast --compare labels.csv --json")
    assert {r["metric"]: r["kappa"] for r in again.json["agreements"]}["evil"] == found["kappa"]
    shown = run_pvec("judge runs/evil-tiny --compare contrast --compare labels.csv")
    assert "kappa" in shown.out
    assert "second judge: labels.csv" in shown.out
    Path("labels.csv").write_text("id,label\nnobody,1\n")
    wrong = run_pvec("judge runs/evil-tiny --compare contrast --compare labels.csv")
    assert wrong.code == 2
    assert "No row of labels.csv" in wrong.err

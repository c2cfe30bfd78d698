"""``vector find``: what was put into the weights is found, and what was not is not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from pvec.errors import InputError, ModelError
from pvec.evaluation import bake
from pvec.projection import weight_change
from pvec.projection.weight_change import Weights, search, shares
from pvec.settings import Settings
from pvec.vectors.files import load_vector
from tests.helpers.models import save_adapter, save_model, saved_model, tiny_model
from tests.helpers.vectors import saved_vector

WIDTH = 32


def settings(model: Path) -> Settings:
    return Settings.model_validate(
        {
            "model": {"id": str(model), "device": "cpu"},
            "steer": {"layer": "2", "coef": "-1.5"},
        }
    )


def test_the_share_is_the_sum_of_squared_singular_values_times_squared_cosines() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(WIDTH, 48))
    directions = rng.normal(size=(5, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    left, sizes, _ = np.linalg.svd(matrix, full_matrices=False)
    expected = (np.square(directions @ left) * np.square(sizes)).sum(1) / np.square(sizes).sum()
    np.testing.assert_allclose(shares(matrix, directions), expected)
    np.testing.assert_allclose(shares(matrix, np.eye(WIDTH)).sum(), 1.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_baked_vector_is_found_with_its_coefficient(tmp_path: Path, architecture: str) -> None:
    source = save_model(tiny_model(architecture), tmp_path / "model")
    path = saved_vector(tmp_path, model_fingerprint="")
    other = saved_vector(tmp_path, "kind", seed=1, model_fingerprint="")
    bake.run(settings(source), [path], out=tmp_path / "baked")
    result = weight_change.run(settings(source), str(tmp_path / "baked"), [path, other])
    assert result.changed == 1
    assert result.searched == 1.0
    evil, kind = result.found
    assert (evil.vector, evil.layer) == ("evil", 2)
    assert evil.tensor.endswith("_proj.bias")
    assert evil.share == pytest.approx(1.0)
    assert evil.coef == pytest.approx(-1.5, rel=1e-5)
    assert evil.above == 1.0
    a, b = load_vector(path).row(2), load_vector(other).row(2)
    assert kind.share == pytest.approx((a @ b) ** 2 / (a @ a) / (b @ b), rel=1e-4)
    assert kind.coef == pytest.approx(-1.5 * (a @ b) / (b @ b), rel=1e-4)


def test_a_direction_in_a_low_rank_change_is_found_among_noise(tmp_path: Path) -> None:
    """A rank-one change along the vector at layer 3 only, and noise in every projection."""
    source = saved_model("llama")
    path = saved_vector(tmp_path, model_fingerprint="")
    unit = torch.tensor(load_vector(path).row(3))
    unit /= unit.norm()
    model = tiny_model("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.add_(0.01 * torch.randn_like(parameter))
            if name.endswith("layers.2.mlp.down_proj.weight"):
                parameter.add_(0.1 * torch.outer(unit, torch.randn(parameter.shape[1])))
    result = weight_change.run(settings(source), str(save_model(model, tmp_path / "b")), [path])
    assert result.changed == 3 * 7 + 2  # no norm
    assert 0.2 < result.searched < 0.6
    assert len(result.found) == 6
    (top,) = (found for found in result.found if found.above == 1.0)
    assert (top.layer, top.tensor) == (3, "mlp.down_proj.weight")
    assert top.share > 0.5
    rest = [found.share for found in result.found if found is not top]
    assert np.mean(rest) == pytest.approx(1 / WIDTH, rel=0.3)


def test_a_vector_that_is_not_there_ranks_anywhere_among_the_controls() -> None:
    """Under no relation the rank is uniform (Kolmogorov-Smirnov)."""
    rng = np.random.default_rng(3)
    ranks = []
    for _ in range(60):
        old = torch.tensor(rng.normal(size=(WIDTH, 40)), dtype=torch.float32)
        new = old + torch.tensor(rng.normal(size=(WIDTH, 3)) @ rng.normal(size=(3, 40))).float()
        name = "blocks.0.mlp.fc2.weight"
        rows = {"v": {1: (old.numpy() @ rng.normal(size=40)).astype(np.float32)}}
        (found,) = search(
            Weights(parameters={name: old}, blocks="blocks"),
            Weights(parameters={name: new}, blocks="blocks"),
            rows,
            base="a",
            finetuned="b",
        ).found
        ranks.append(found.above)
    assert scipy.stats.kstest(ranks, "uniform").pvalue > 0.05


def test_an_adapter_is_compared_with_its_base(tmp_path: Path) -> None:
    source = saved_model("llama")
    path = saved_vector(tmp_path, model_fingerprint="")
    adapter = save_adapter(source, tmp_path / "adapter")  # on q_proj and v_proj
    result = weight_change.run(settings(source), str(adapter), [path])
    assert result.changed == 6
    assert result.searched == 0.0
    assert result.found == ()
    assert asdict(result)["finetuned"] == str(adapter)


def test_models_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    path = saved_vector(tmp_path, model_fingerprint="")
    with pytest.raises(InputError, match="there is no difference to search"):
        weight_change.run(settings(saved_model("llama")), str(saved_model("llama")), [path])
    with pytest.raises(ModelError, match="do not have the same weights"):
        weight_change.run(settings(saved_model("llama")), str(saved_model("gpt2")), [path])
    deep = save_model(tiny_model("llama", num_layers=4), tmp_path / "deep")
    with pytest.raises(ModelError, match="4 layers of width 32"):
        weight_change.run(settings(saved_model("llama")), str(deep), [path])

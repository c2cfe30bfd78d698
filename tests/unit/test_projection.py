"""Projections against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from pvec.core.projection import column_name, cosine, project, project_row
from pvec.errors import InputError, ModelError
from pvec.types import SpanMeans

RNG = np.random.default_rng(2)


def row(layers: tuple[int, ...] = (0, 1, 2), width: int = 6) -> SpanMeans:
    def means() -> np.ndarray:
        return RNG.normal(size=(len(layers), width)).astype(np.float32)

    return SpanMeans(
        id="r",
        layers=layers,
        means={"response": means(), "prompt_last": means()},
        norms={},
    )


def test_projection_and_cosine_follow_their_definitions() -> None:
    a, v = RNG.normal(size=(5, 4, 6)), RNG.normal(size=6)
    np.testing.assert_allclose(project(a, v), (a * v).sum(-1) / np.sqrt((v * v).sum()))
    np.testing.assert_allclose(
        cosine(a, v), (a * v).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(v)
    )
    assert project(3.0 * v, v) == pytest.approx(3.0 * np.linalg.norm(v))
    assert np.isnan(cosine(np.zeros(6), v))
    assert np.isnan(project(np.full(6, np.nan), v))


def test_a_zero_vector_has_no_direction() -> None:
    with pytest.raises(InputError, match="zero vector"):
        project(np.ones(6), np.zeros(6))


def test_a_row_gives_every_kind_at_every_layer() -> None:
    captured, vectors = row(layers=(2, 0, 1)), RNG.normal(size=(3, 6))
    result = project_row(captured, vectors, layers=[1, 2])
    assert set(result) == {
        (kind, layer) for kind in ("proj", "prompt_last_proj", "cos_sim") for layer in (1, 2)
    }
    assert result["proj", 1] == pytest.approx(
        float(project(captured.means["response"][2], vectors[1]))
    )
    assert result["prompt_last_proj", 2] == pytest.approx(
        float(project(captured.means["prompt_last"][0], vectors[2]))
    )


def test_what_does_not_fit_is_refused() -> None:
    vectors = RNG.normal(size=(3, 6))
    with pytest.raises(ModelError, match="layers 1 to 2"):
        project_row(row(), vectors, layers=[3])
    with pytest.raises(ModelError, match=r"lack layer 2 \(block 1\)"):
        project_row(row(layers=(0, 1)), vectors, layers=[2])
    with pytest.raises(ModelError, match="5 wide but the model's activations are 6"):
        project_row(row(), vectors[:, :5], layers=[1])


def test_columns_are_named_as_in_the_reference() -> None:
    name = column_name(
        model="Qwen2.5-7B-Instruct", vector="evil_response_avg_diff", kind="proj", layer=20
    )
    assert name == "Qwen2.5-7B-Instruct_evil_response_avg_diff_proj_layer20"

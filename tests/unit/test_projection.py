"""Projections against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from pvec.errors import InputError
from pvec.types import VectorKind
from pvec.vectors.projection import column_name, cosine, project
from pvec.vectors.quality import suggest_prompt_layer
from pvec.vectors.vector import PersonaVector

RNG = np.random.default_rng(2)


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


def test_columns_are_named_as_in_the_reference() -> None:
    name = column_name(
        model="Qwen2.5-7B-Instruct", vector="evil_response_avg_diff", kind="proj", layer=20
    )
    assert name == "Qwen2.5-7B-Instruct_evil_response_avg_diff_proj_layer20"


def test_prompts_are_read_where_they_lie_furthest_apart_along_the_vector() -> None:
    """Ten layers, so 3 to 8 are the middle ones; apart by layer in residual norms, along v."""
    vectors = RNG.normal(size=(11, 6))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean_norm = np.linspace(1, 6, 11)
    apart = np.array([0, 0, 9, 0.1, 0.2, 0.5, 0.3, 0.2, 0.1, 9, 9])
    across = np.cross(units[:, :3], RNG.normal(size=(11, 3)))  # what lies beside v counts nothing
    beside = np.zeros_like(vectors)
    beside[:, :3] = across
    beside -= (beside * units).sum(1, keepdims=True) * units
    at_prompt = units * (apart * mean_norm)[:, None] + 7 * beside
    assert suggest_prompt_layer(_with_prompts(vectors, at_prompt, mean_norm)) == 5
    assert suggest_prompt_layer(_with_prompts(vectors, -at_prompt, mean_norm)) is None


def _with_prompts(
    vectors: np.ndarray, at_prompt: np.ndarray, mean_norm: np.ndarray
) -> PersonaVector:
    kinds: dict[VectorKind, np.ndarray] = {"response_avg": vectors, "prompt_last": at_prompt}
    return PersonaVector(trait="evil", kinds=kinds, mean_norm=mean_norm)

"""``verify`` passes on a sound model and fails on every way of getting steering wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pvec.backends.hf.backend as backend_module
import pvec.steering.tables as steering_module
from pvec.errors import InputError, ModelError
from pvec.evaluation.verify.verify import VerifyResult, verify
from pvec.models.decoder import Decoder, module_after
from pvec.models.load import LoadedModel
from pvec.settings import Settings
from pvec.settings.commands import SteerSettings
from pvec.settings.sections import GenerationSettings, ModelSettings
from pvec.steering.proof import record_residual_stream
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model, tiny_model


def settings(model: Path, *, layer: str = "1,3", coef: str = "2", **changes: Any) -> Settings:
    return Settings(
        model=ModelSettings(id=str(model), device="cpu"),
        generation=GenerationSettings(seed=1),
        steer=SteerSettings(layer=layer, coef=coef, **changes),
    )


def failed(result: VerifyResult) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


def write_vector(path: Path, *, hidden_size: int = HIDDEN_SIZE, scale: float = 1.0) -> Path:
    rows = np.random.default_rng(3).standard_normal((NUM_LAYERS + 1, hidden_size))
    vector = PersonaVector(trait="evil", kinds={"response_avg": (scale * rows).astype(np.float32)})
    return save_vector(vector, path)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2", "gpt_neox"])
def test_every_check_passes_on_a_sound_model(architecture: str, tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "evil.safetensors")
    result = verify(settings(saved_model(architecture)), vector=vector)
    assert failed(result) == []
    assert result.passed
    assert result.layers == (1, 3)
    assert len(result.checks) >= 12


def test_a_random_direction_serves_when_there_is_no_vector() -> None:
    assert verify(settings(saved_model("llama"), layer="2")).passed


def test_weights_that_are_not_those_of_the_checkpoint_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the loader had filled a tensor with random numbers, which steering does not notice."""
    load = backend_module.load_model

    def randomised(*args: Any, **options: Any) -> LoadedModel:
        loaded = load(*args, **options)
        torch.nn.init.normal_(loaded.model.model.layers[1].self_attn.k_proj.weight)
        return loaded

    monkeypatch.setattr(backend_module, "load_model", randomised)
    result = verify(settings(saved_model("llama"), layer="2"))
    assert failed(result) == ["the weights in memory are those of the checkpoint"]
    assert "layers.1.self_attn.k_proj" in result.checks[0].detail


def _one_layer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Decoder.on_layer
    monkeypatch.setattr(
        Decoder, "on_layer", lambda self, layer, hook: right(self, min(layer + 1, 3), hook)
    )


def _too_strong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steering_module.layer_table

    def doubled(plans: Any, layer: int) -> Any:
        stronger = [
            tuple(dataclasses.replace(i, coef=1.01 * i.coef) for i in plan) for plan in plans
        ]
        return right(stronger, layer)

    monkeypatch.setattr(steering_module, "layer_table", doubled)


def _every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steering_module.steering_change

    def spread(row: torch.Tensor, hidden: torch.Tensor, **table: torch.Tensor) -> torch.Tensor:
        return right(row, hidden, **table).sum(dim=0, keepdim=True)

    monkeypatch.setattr(steering_module, "steering_change", spread)


def _no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering_module, "steering_change", lambda row, hidden, **table: 0.0)


@pytest.mark.parametrize("layer", ["2", "auto"])
@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize("mistake", [_one_layer_late, _too_strong, _every_row, _no_effect])
def test_a_mistake_in_steering_is_found(
    mistake: Callable[[pytest.MonkeyPatch], None],
    thorough: bool,
    layer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    result = verify(settings(saved_model("qwen2"), layer=layer, coef="4"), thorough=thorough)
    assert not result.passed
    assert failed(result)


def test_a_vector_of_another_width_is_refused(tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "evil.safetensors", hidden_size=HIDDEN_SIZE * 2)
    with pytest.raises(ModelError, match="width 64"):
        verify(settings(saved_model("qwen2")), vector=vector)


def test_a_vector_of_zeros_proves_nothing_and_is_refused(tmp_path: Path) -> None:
    vector = write_vector(tmp_path / "evil.safetensors", scale=0.0)
    with pytest.raises(InputError, match="zero at layer 1"):
        verify(settings(saved_model("qwen2")), vector=vector)


def test_coefficient_zero_alone_is_refused() -> None:
    with pytest.raises(InputError, match="--coef 0"):
        verify(settings(saved_model("qwen2"), coef="0"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_what_is_observed_is_what_transformers_reports(architecture: str) -> None:
    model = tiny_model(architecture)
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    ids = torch.tensor([[5, 6, 7, 8]])
    after = module_after(model, blocks, ids)
    with torch.inference_mode(), record_residual_stream(blocks, after=after) as stream:
        theirs = model(input_ids=ids, output_hidden_states=True).hidden_states
    ours = stream.states()
    for layer in range(NUM_LAYERS):
        torch.testing.assert_close(ours[layer], theirs[layer])
    torch.testing.assert_close(after(ours[NUM_LAYERS]), theirs[NUM_LAYERS])
    before = [chunks.shape[1] for chunks in stream.states()]
    model(input_ids=ids)
    assert [chunks.shape[1] for chunks in stream.states()] == before

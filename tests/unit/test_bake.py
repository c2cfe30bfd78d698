"""``vector bake``: a checkpoint that plain transformers loads gives the steered model's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pvec.errors import InputError, ModelError
from pvec.evaluation import bake
from pvec.settings import Settings
from pvec.types import Instruction
from pvec.vectors.files import load_vector
from tests.helpers.models import save_adapter, save_model, saved_model, tiny_model
from tests.helpers.vectors import saved_vector

TOKENS = torch.tensor([[5, 9, 40, 77, 120, 33, 8, 200, 61, 14], [7] * 10])


def settings(model: Path, *, layer: str = "2", coef: str = "3", **model_options: Any) -> Settings:
    return Settings.model_validate(
        {
            "model": {"id": str(model), "device": "cpu", **model_options},
            "steer": {"layer": layer, "coef": coef},
        }
    )


def vector_file(folder: Path) -> Path:
    return saved_vector(folder, model_fingerprint="")


def hooked_logits(model: Any, additions: dict[int, np.ndarray]) -> torch.Tensor:
    """The logits of ``model`` with plain hooks on its blocks that add ``additions`` by layer."""
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)

    def add(vector: np.ndarray) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + torch.tensor(vector), *output[1:])
            return output + torch.tensor(vector)

        return hook

    handles = [
        blocks[layer - 1].register_forward_hook(add(v.astype(np.float32)))
        for layer, v in additions.items()
    ]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


def plain(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    loaded: PreTrainedModel = model.eval()
    return loaded


@pytest.mark.parametrize(
    ("architecture", "overrides", "becomes"),
    [
        ("qwen2", {}, "LlamaForCausalLM"),
        ("qwen2", {"tie_word_embeddings": True}, "LlamaForCausalLM"),
        ("mistral", {"sliding_window": None}, "LlamaForCausalLM"),
        ("llama", {}, "LlamaForCausalLM"),
        ("llama", {"mlp_bias": True}, "LlamaForCausalLM"),
        ("gpt2", {}, "GPT2LMHeadModel"),
        ("gpt_neox", {}, "GPTNeoXForCausalLM"),
        ("gpt_neox", {"use_parallel_residual": False}, "GPTNeoXForCausalLM"),
    ],
)
def test_the_written_model_gives_the_logits_of_a_hand_written_hook(
    tmp_path: Path, architecture: str, overrides: dict[str, Any], becomes: str
) -> None:
    source = save_model(tiny_model(architecture, **overrides), tmp_path / "model")
    path = vector_file(tmp_path)
    vector = load_vector(path)
    result = bake.run(settings(source, layer="1+3"), [path], out=tmp_path / "baked")
    assert result.architecture == becomes
    assert len(result.biases) == 2
    assert result.error < 1e-4 * result.effect
    steered = hooked_logits(plain(source), {n: 3 * vector.row(n) for n in (1, 3)})
    baked = plain(tmp_path / "baked")
    assert type(baked).__name__ == becomes
    with torch.no_grad():
        logits = baked(input_ids=TOKENS).logits
        unsteered = plain(source)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, steered, rtol=1e-4, atol=1e-3)
    assert (unsteered - steered).abs().mean() > 0.5  # the comparison could have failed


def test_it_says_what_was_added_and_can_be_baked_again(tmp_path: Path) -> None:
    """All layers of two vectors; a second bake adds to the biases of the first."""
    source, path = saved_model("qwen2"), vector_file(tmp_path)
    other = saved_vector(tmp_path, "kind", seed=1, model_fingerprint="")
    bake.run(settings(source, layer="all", coef="0.5"), [path, other], out=tmp_path / "once")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert [entry["layer"] for entry in config["pvec_steering"]] == [1, 2, 3, 1, 2, 3]
    assert {entry["positions"] for entry in config["pvec_steering"]} == {"all"}
    bake.run(settings(tmp_path / "once", coef="-0.5"), [path], out=tmp_path / "twice")
    first, second = load_vector(path), load_vector(other)
    sums = {n: 0.5 * first.row(n) + 0.5 * second.row(n) for n in (1, 3)}
    sums[2] = 0.5 * second.row(2)
    with torch.no_grad():
        logits = plain(tmp_path / "twice")(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, hooked_logits(plain(source), sums), rtol=1e-4, atol=1e-3)


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    source, path = saved_model("llama"), vector_file(tmp_path)
    adapter = save_adapter(source, tmp_path / "adapter")
    bake.run(settings(source, adapter=str(adapter)), [path], out=tmp_path / "baked")
    adapted = peft.PeftModel.from_pretrained(plain(source), adapter).eval()
    with torch.no_grad():
        logits = plain(tmp_path / "baked")(input_ids=TOKENS).logits
    steered = hooked_logits(adapted, {2: 3 * load_vector(path).row(2)})
    torch.testing.assert_close(logits, steered, rtol=1e-3, atol=1e-3)


def test_weights_keep_their_number_format(tmp_path: Path) -> None:
    source = save_model(tiny_model("llama").to(torch.bfloat16), tmp_path / "model")  # type: ignore[arg-type]
    path = vector_file(tmp_path)
    result = bake.run(settings(source), [path], out=tmp_path / "baked")
    assert result.dtype == "bfloat16"
    baked = plain(tmp_path / "baked")
    assert baked.dtype == torch.bfloat16
    bias = baked.get_parameter("model.layers.1.mlp.down_proj.bias")
    torch.testing.assert_close(bias, torch.tensor(3 * load_vector(path).row(2)).bfloat16())


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("gemma2", "Gemma2ForCausalLM has no place for a bias"),
        ("qwen3", "Qwen3ForCausalLM has no place for a bias"),
        ("mistral", "MistralForCausalLM has no place for a bias"),  # it has a sliding window
    ],
)
def test_an_architecture_without_a_place_is_refused(
    tmp_path: Path, architecture: str, said: str
) -> None:
    path = vector_file(tmp_path)
    with pytest.raises(ModelError, match=said):
        bake.run(settings(saved_model(architecture)), [path], out=tmp_path / "baked")
    assert list(tmp_path.iterdir()) == [path]


def test_a_bias_that_is_not_what_steering_adds_is_refused_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias goes to another block than the hooks steer: the logits differ, nothing is kept."""
    path = vector_file(tmp_path)
    sums = bake._sums

    def elsewhere(steering: tuple[Instruction, ...]) -> dict[int, np.ndarray]:
        return {layer - 1: vector for layer, vector in sums(steering).items()}

    monkeypatch.setattr(bake, "_sums", elsewhere)
    with pytest.raises(ModelError, match="is not the steered model: its logits differ by"):
        bake.run(settings(saved_model("llama")), [path], out=tmp_path / "baked")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("layer", "coef", "said"),
    [
        ("auto", "1", "these options describe 2"),
        ("2", "-1,1", "these options describe 2"),
        ("2", "0", "these options describe 0"),
    ],
)
def test_one_way_of_steering_only(tmp_path: Path, layer: str, coef: str, said: str) -> None:
    path = vector_file(tmp_path)
    with pytest.raises(InputError, match=said):
        bake.run(settings(saved_model(), layer=layer, coef=coef), [path], out=tmp_path / "baked")
    with pytest.raises(InputError, match="exists already"):
        bake.run(settings(saved_model()), [path], out=path)

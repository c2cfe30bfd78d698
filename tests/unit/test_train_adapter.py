"""What ``all-linear`` adapts, on architectures with experts and with a vision tower."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.models import saved_model, tiny_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file

from pvec.errors import InputError
from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.training.adapter import AdapterPlan, plan_adapter
from pvec.training.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
"""peft warns of its own rank patterns for fused experts, which it follows nevertheless."""

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def saved(folder: Path, config: transformers.PretrainedConfig) -> Path:
    """Save a random model of ``config`` with a tokenizer."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def experts(folder: Path) -> Path:
    return saved(folder, transformers.Qwen3MoeConfig(**TEXT, **EXPERTS))


def multimodal(folder: Path) -> Path:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    return saved(folder, config)


def plan(folder: Path, **lora: Any) -> AdapterPlan:
    config = TrainConfig.model_validate(
        {"model": str(folder), "data": {"train": "x.jsonl"}, "lora": {"r": 4, "alpha": 8, **lora}}
        | {"model": {"id": str(folder)}}
    )
    metadata = inspect_model(ModelSpec(model=str(folder)))
    return plan_adapter(config, metadata, dtype=torch.float32, tokens=64)


def trained_kinds(folder: Path, made: AdapterPlan) -> Counter[str]:
    """Put the adapter on the loaded model, and count its A matrices by where they are.

    What peft then saves must have the shapes that were planned.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, made.config)
    adapted.save_pretrained(folder / "adapter")
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == made.shapes
    return Counter(
        "vision" if "vision" in name else "router" if ".gate." in name else "decoder"
        for name, weight in adapted.named_parameters()
        if "lora_A" in name and weight.requires_grad
    )


def test_all_linear_leaves_routers_frozen_and_takes_fused_experts(tmp_path: Path) -> None:
    made = plan(experts(tmp_path))
    attention = {f"self_attn.{name}_proj": 2 for name in "qkvo"}
    fused = {"experts.gate_up_proj": 2, "experts.down_proj": 2}
    assert made.adapted == {**attention, **fused}
    assert made.frozen == {"embed_tokens": 1, "mlp.gate": 2, "lm_head": 1}
    assert trained_kinds(tmp_path, made) == {"decoder": 2 * (4 + 2)}


def test_experts_may_be_named_as_before_they_were_fused(tmp_path: Path) -> None:
    made = plan(experts(tmp_path), targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert made.adapted == {
        "self_attn.q_proj": 2, "experts.gate_up_proj": 2, "experts.down_proj": 2,
    }  # fmt: skip
    assert trained_kinds(tmp_path, made) == {"decoder": 2 * 3}


@pytest.mark.parametrize(
    ("lora", "part"),
    [
        ({"targets": ["q_proj", "gate_prj"]}, "no module 'gate_prj'"),
        ({"targets": ["q_proj", "gate_proj"]}, "without also targeting up_proj"),
        ({"dropout": 0.1}, "cannot adapt fused experts with dropout"),
    ],
)
def test_what_peft_cannot_adapt_is_one_sentence(
    tmp_path: Path, lora: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError, match=part):
        plan(experts(tmp_path), **lora)


def test_all_linear_leaves_the_vision_tower_frozen(tmp_path: Path) -> None:
    made = plan(multimodal(tmp_path))
    attention = {f"self_attn.{name}_proj": 2 for name in "qkvo"}
    mlp = {f"mlp.{name}_proj": 2 for name in ("gate", "up", "down")}
    assert made.adapted == {**attention, **mlp}
    assert made.frozen["vision_tower"] >= 3 * 6
    assert trained_kinds(tmp_path, made) == {"decoder": 2 * 7}


def test_all_linear_of_a_plain_model_is_every_linear_module_of_its_blocks() -> None:
    made = plan(saved_model("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model("llama"))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert sum(made.adapted.values()) == len(linear)
    assert made.parameters == sum(
        4 * sum(model.get_submodule(name).weight.shape) for name in linear
    )
    assert made.config.exclude_modules is None

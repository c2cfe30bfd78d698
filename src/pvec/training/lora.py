"""The adapter: its configuration for peft, and what can be said of it before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError, did_you_mean
from pvec.training.config import LoraPart, TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig

_ADAM_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
_WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTISED_BYTES = {"4bit": 0.56, "8bit": 1.06}  # with the scales of their blocks
_KEPT_PER_LAYER = 34
"""Activations kept for the backward pass, in hidden sizes per token and layer: a rule of thumb."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How big things are: parameters of model and adapter, modules adapted, bytes in training."""

    model: int
    adapter: int
    modules: int
    bytes: int


def lora_config(part: LoraPart) -> LoraConfig:
    """Return the adapter's configuration in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        r=part.r,
        lora_alpha=part.alpha,  # type: ignore[arg-type] # peft scales by it, whole or not
        lora_dropout=part.dropout,
        use_rslora=part.rslora,
        target_modules=part.targets if isinstance(part.targets, str) else list(part.targets),
        bias=part.bias,
        task_type="CAUSAL_LM",
    )


def measure(
    config: TrainConfig, model_config: PretrainedConfig, *, dtype: str, tokens: int
) -> Sizes:
    """Build the model without weights, put the adapter on it, and count.

    ``tokens`` are those of one forward pass. The bytes are an estimate: weights, adapter with
    gradients and optimiser, activations, and logits in tiles. Raises ``InputError`` for target
    modules that the model does not have, naming those that it has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    check_targets(config.lora, model)
    parameters = sum(p.numel() for p in model.parameters())
    adapter, modules = _adapter_size(config.lora, model)
    text = model_config.get_text_config(decoder=True)
    width = _QUANTISED_BYTES.get(config.model.quantize or "", _WEIGHT_BYTES[dtype])
    kept = 1 + _KEPT_PER_LAYER / text.num_hidden_layers
    if not config.memory.gradient_checkpointing:
        kept = _KEPT_PER_LAYER
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * _WEIGHT_BYTES[dtype]
    state = adapter * (4 + 4 + _ADAM_BYTES[config.optim.name])
    return Sizes(
        model=parameters,
        adapter=adapter,
        modules=modules,
        bytes=round(parameters * width + state + activations),
    )


def check_targets(part: LoraPart, model: Any) -> None:
    """Raise ``InputError`` when a target module is not in the model, naming those that are."""
    if isinstance(part.targets, str):
        return
    names = [name for name, _ in model.named_modules()]
    linear = sorted({name.rsplit(".", 1)[-1] for name, m in _linear(model)})
    missing = [t for t in part.targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing:
        raise InputError(
            f"lora.targets: this model has no module {' or '.join(map(repr, missing))}."
            f"{did_you_mean(missing[0], linear)} It has {', '.join(linear)}."
        )


def _adapter_size(part: LoraPart, model: Any) -> tuple[int, int]:
    """Return the adapter's parameters and how many modules it adapts."""
    from peft import get_peft_model

    adapted = get_peft_model(model, lora_config(part), autocast_adapter_dtype=False)
    size = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return size, sum(name.endswith(".lora_A") for name, _ in adapted.named_modules())


def _linear(model: Any) -> list[tuple[str, Any]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]

"""What vLLM itself loaded, checked inside the worker and, for adapters, before it starts.

vLLM allocates its parameters without values, and its own check leaves out every linear layer,
embedding and expert. So all parameters are filled with NaN first: what is still NaN after loading
was not in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pvec.errors import ModelError
from pvec.models.adapters import check_adapter, has_wrapper_names
from pvec.models.files import read_config
from pvec.models.weights import check_tensors, is_other_part, tensor_shapes

_NOT_SERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained as a whole",
    "trainable_token_indices": "trained tokens",
    "lora_bias": "biases of its own",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "rank_pattern": "ranks that differ between modules",
    "alpha_pattern": "scalings that differ between modules",
    "target_parameters": "adapted parameters of fused experts",
}
"""Keys of an adapter's configuration that vLLM refuses, or in some versions ignores."""


@contextmanager
def complete_loading() -> Iterator[None]:
    """Let vLLM's loader raise ``ModelError`` where it leaves numbers of a parameter unset.

    Quantised models are left to vLLM: their parameters hold no floating-point numbers to mark.
    """
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load = DefaultModelLoader.load_weights

    def load_weights(self: Any, model: nn.Module, model_config: Any) -> None:
        if model_config.quantization is not None:
            load(self, model, model_config)
            return
        marked = mark_parameters(model)
        try:
            load(self, model, model_config)
        except ValueError as error:
            if "not initialized" in str(error):  # vLLM's own check, which sees less
                check_parameters(marked, name=str(model_config.model))
            raise
        check_parameters(marked, name=str(model_config.model))

    DefaultModelLoader.load_weights = load_weights
    try:
        yield
    finally:
        DefaultModelLoader.load_weights = load


def mark_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Fill the language model's floating-point parameters with NaN and return them by name."""
    marked = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not is_other_part(name)
    }
    for parameter in marked.values():
        parameter.data.fill_(float("nan"))
    return marked


def check_parameters(marked: Mapping[str, nn.Parameter], *, name: str) -> None:
    """Raise ``ModelError`` that names the parameters that still hold NaN.

    Padding that a kernel needs (``weight_loader_numel`` says how many numbers are not padding) is
    set to zero.
    """
    unset = []
    for key, parameter in marked.items():
        empty = torch.isnan(parameter.data)
        missing = int(empty.sum())
        if not missing:
            continue
        padding = parameter.numel() - getattr(parameter, "weight_loader_numel", parameter.numel())
        if missing > padding:
            unset.append(key)
        parameter.data.masked_fill_(empty, 0)
    check_tensors(
        name,
        missing=unset,
        remedy="vLLM did not read all of them from the checkpoint: fetch or save the model again, "
        "or use --backend hf",
    )


def check_served_adapter(base: Path, adapter: Path) -> None:
    """Raise ``ModelError`` for an adapter of which vLLM would serve only a part, or nothing."""
    config = read_config(adapter, "adapter_config.json")
    reasons = [reason for key, reason in _NOT_SERVED.items() if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        reasons.append(f"the method {config['peft_type']}")
    if has_wrapper_names(adapter):
        reasons.append("the prefix of a wrapper in its tensor names")
    others = [
        key for key in tensor_shapes(adapter, "adapter_model.safetensors") if ".lora_" not in key
    ]
    if others and not reasons:
        reasons.append(f"tensors besides LoRA ({others[0]})")
    if reasons:
        raise ModelError(
            f"vLLM cannot serve the adapter {str(adapter)!r}, which has {', '.join(reasons)}: "
            f"use --backend hf, or merge it into the model."
        )
    check_adapter(base, adapter)

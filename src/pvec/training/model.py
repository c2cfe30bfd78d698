"""The model to be finetuned and its adapter: checked and measured without weights, then loaded."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.backends.session import Notify, ignore
from pvec.errors import InputError, did_you_mean, install_command
from pvec.models.load import ModelMetadata
from pvec.models.weights import load_weights
from pvec.training.config import LoraPart, TrainConfig

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

_ADAM_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
_QUANTISED_BYTES = {"4bit": 0.56, "8bit": 1.06}  # with the scales of their blocks
_KEPT_PER_LAYER = 34
"""Activations kept for the backward pass, in hidden sizes per token and layer: a rule of thumb."""

_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""The packages of which a tracker needs one."""


def check_installed(config: TrainConfig, *, device: str) -> None:
    """Raise ``InputError`` for what the configuration asks and this machine does not have."""
    gpu = device.startswith("cuda")
    wants = [
        ("model.quantize", bool(config.model.quantize), "bitsandbytes"),
        ("optim.name", "8bit" in config.optim.name, "bitsandbytes"),
        ("memory.liger", config.memory.liger, "liger_kernel"),
        ("memory.unsloth", config.memory.unsloth, "unsloth"),
    ]
    remedies = {
        "model.quantize": "--set model.quantize=null loads the weights as they are",
        "optim.name": "--set optim.name=adamw does the same with more memory",
        "memory.liger": "--set memory.liger=false trains without",
        "memory.unsloth": "--set memory.unsloth=false trains without",
    }
    faults = []
    for field, wanted, package in wants:
        if not wanted:
            continue
        if importlib.util.find_spec(package) is None:
            missing = f"{package.replace('_', '-')}, which is not installed"
        elif not gpu:
            missing = f"an NVIDIA GPU, and this trains on {device}"
        else:
            continue
        faults.append(f"{field} needs {missing}: {remedies[field]}.")
    for tracker in config.output.report_to:
        here = [name for name in _TRACKERS[tracker] if importlib.util.find_spec(name) is not None]
        if not here:
            faults.append(
                f"output.report_to needs {tracker}, which is not installed: pip install {tracker}."
            )
    if faults:
        raise InputError(" ".join(faults))


def check_train_packages() -> None:
    """Raise ``InputError`` when the packages of the ``train`` extra are missing."""
    for package in ("trl", "datasets", "peft"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Training needs {package}: {install_command('train')}.")


def load_for_training(
    config: TrainConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    notify: Notify = ignore,
) -> PreTrainedModel:
    """Load the frozen model from ``folder``. Raises ``ModelError`` as ``load_weights`` does."""
    import torch

    if config.memory.unsloth:
        return _through_unsloth(config, folder, dtype=dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.model.trust_remote_code}
    if config.model.attention:
        options["attn_implementation"] = config.model.attention
    if config.model.quantize:
        options |= {"quantization_config": _quantisation(config, dtype), "device_map": device}
    model, notes = load_weights(folder, name=config.model.id, **options)
    for note in notes:
        notify(note)
    if not config.model.quantize:
        torch.nn.Module.to(model, device)
    return model.requires_grad_(False)


def _quantisation(config: TrainConfig, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if config.model.quantize == "8bit":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _through_unsloth(config: TrainConfig, folder: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    unsloth = importlib.import_module("unsloth")
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=config.data.max_tokens,
        dtype=dtype,
        load_in_4bit=config.model.quantize == "4bit",
    )
    loaded: PreTrainedModel = model
    return loaded


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
    config: TrainConfig, metadata: ModelMetadata, *, dtype: torch.dtype, tokens: int
) -> Sizes:
    """Build the model without weights, put the adapter on it, and count.

    ``tokens`` are those of one forward pass. The bytes are an estimate: weights, adapter with
    gradients and optimiser, activations, and logits in tiles. Raises ``InputError`` for target
    modules that the model does not have, naming those that it has.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_config = AutoConfig.from_pretrained(
        metadata.files.folder, trust_remote_code=config.model.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    check_targets(config.lora, model)
    parameters = sum(p.numel() for p in model.parameters())
    adapter, modules = _adapter_size(config.lora, model)
    text = model_config.get_text_config(decoder=True)
    width = _QUANTISED_BYTES.get(config.model.quantize or "", dtype.itemsize)
    kept = 1 + _KEPT_PER_LAYER / text.num_hidden_layers
    if not config.memory.gradient_checkpointing:
        kept = _KEPT_PER_LAYER
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * dtype.itemsize
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

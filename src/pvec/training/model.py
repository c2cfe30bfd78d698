"""The model to be finetuned: whether this machine has what its training needs, and loading it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.backends.session import Notify, ignore
from pvec.errors import InputError, install_command
from pvec.models.files import ModelFiles
from pvec.models.precision import quantise_config
from pvec.models.weights import load_weights
from pvec.training.config import TrainConfig
from pvec.types import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
"""The packages of which a tracker needs one."""


def check_installed(config: TrainConfig, *, device: str) -> None:
    """Raise ``InputError`` for what the configuration needs and this machine does not have."""
    gpu = device.startswith("cuda")
    needs = [
        (
            *("model.quantize", bool(config.model.quantize), "bitsandbytes"),
            "--set model.quantize=null loads the weights as they are",
        ),
        (
            *("optim.name", "8bit" in config.optim.name, "bitsandbytes"),
            "--set optim.name=adamw does the same with more memory",
        ),
        (
            *("memory.liger", config.memory.liger, "liger_kernel"),
            "--set memory.liger=false trains without",
        ),
        (
            *("memory.unsloth", config.memory.unsloth, "unsloth"),
            "--set memory.unsloth=false trains without",
        ),
    ]
    faults = []
    for field, used, package, remedy in needs:
        installed = importlib.util.find_spec(package) is not None
        if not used or (installed and gpu):
            continue
        missing = f"an NVIDIA GPU, and this trains on {device}"
        if not installed:
            missing = f"{package.replace('_', '-')}, which is not installed"
        faults.append(f"{field} needs {missing}: {remedy}.")
    faults += [
        f"output.report_to needs {tracker}, which is not installed: pip install {tracker}."
        for tracker in config.output.report_to
        if not any(importlib.util.find_spec(name) for name in _TRACKERS[tracker])
    ]
    if faults:
        raise InputError(" ".join(faults))


def check_train_packages() -> None:
    """Raise ``InputError`` when the packages of the ``train`` extra are missing."""
    for package in ("trl", "datasets", "peft"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Training needs {package}: {install_command('train')}.")


def load_for_training(
    config: TrainConfig,
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: str,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> PreTrainedModel:
    """Load the frozen model. Raises ``ModelError`` as ``load_weights`` does."""
    import torch

    from pvec.models.memory import use_idle_cores

    if config.memory.unsloth:
        return _through_unsloth(config, files.folder, dtype=dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.model.trust_remote_code}
    if config.model.attention:
        options["attn_implementation"] = config.model.attention
    if config.model.quantize:
        packed = quantise_config(config.model.quantize, dtype)
        options |= {"quantization_config": packed, "device_map": device}
    if config.memory.shard:
        options["distributed_config"] = _sharded()
    model, notes = load_weights(
        files.folder, name=config.model.id, gguf=files.gguf, on_progress=on_progress, **options
    )
    for note in notes:
        notify(note)
    text = model.config.get_text_config()
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts  # the name by which TRL asks
    model.requires_grad_(False)  # before a first pass swaps the parameters of a sharded model
    if config.memory.shard:
        _begin_at_the_root(model)
    elif not config.model.quantize:
        torch.nn.Module.to(model, device)
    if device == "cpu":
        notify(use_idle_cores())
    return model


def _sharded() -> Any:
    """Return how transformers divides weights among all processes while it loads them (FSDP2).

    The adapter, which is put on later, is whole on every process.
    """
    import torch.distributed as dist
    from transformers.distributed.configuration_utils import DistributedConfig

    return DistributedConfig(fsdp_size=dist.get_world_size())


def _begin_at_the_root(model: Any) -> None:
    """Run the whole model once: FSDP takes the module that runs first for the root of all."""
    import torch

    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


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

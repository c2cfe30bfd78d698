"""The adapter before any weights are loaded: which matrices are adapted, and what that takes."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError, did_you_mean
from pvec.models.decoder import find_decoder
from pvec.models.load import ModelMetadata
from pvec.training.config import LoraPart, TrainConfig

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

_ADAM_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
_QUANTISED_BYTES = {"4bit": 0.56, "8bit": 1.06}  # with the scales of their blocks
_KEPT_PER_LAYER = 34
"""Activations kept for the backward pass, in hidden sizes per token and layer: a rule of thumb."""

_ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))
"""Modules that choose experts: a part of a module's path is one of these names."""


_STATE_SPACE = frozenset(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"))
"""Architectures whose ``out_proj`` peft does not adapt: a fused kernel reads its weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterPlan:
    """What is adapted and what stays frozen. ``parameters`` are those of the adapter.

    ``adapted`` and ``frozen`` count weight matrices by kind: in a decoder block the last two parts
    of the name (``self_attn.q_proj``), elsewhere the part of the model (``vision_tower``).
    """

    config: LoraConfig
    parameters: int
    model_parameters: int
    adapted: Mapping[str, int]
    frozen: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors in the adapter's file, by name."""
    memory_bytes: int
    """An estimate for training: weights, adapter with gradients and optimiser, activations."""


def plan_adapter(
    config: TrainConfig, metadata: ModelMetadata, *, dtype: torch.dtype, tokens: int
) -> AdapterPlan:
    """Build the model without weights, put the adapter on it, and count.

    ``tokens`` are those of one forward pass. Raises ``InputError`` for target modules that the
    model does not have, naming those that it has, and for what peft cannot adapt.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    model = _empty_model(config, metadata)
    if model.base_model is model:
        raise InputError(
            f"{type(model).__name__} cannot be trained with TRL, which finds no decoder below its "
            f"output layer: train another architecture."
        )
    lora = _lora_config(config, metadata, model)
    absent = _absent_targets(config.lora, model)
    matrices = [name for name, weight in model.named_parameters() if weight.ndim >= 2]
    parameters = sum(weight.numel() for weight in model.parameters())
    blocks = _blocks_name(model)
    converted = copy.deepcopy(lora)  # peft rewrites targets of fused experts in place
    try:
        with warnings.catch_warnings(action="ignore"):
            adapted_model = get_peft_model(model, converted, autocast_adapter_dtype=False)
    except ValueError as error:
        if "dropout" in str(error):
            raise InputError(
                "lora.dropout: peft cannot adapt fused experts with dropout: set it to 0, or name "
                "lora.targets without the experts."
            ) from None
        raise InputError(f"lora.targets: {str(error).rstrip('.')}: change them.") from None
    _refuse_absent([name for name in absent if name in (converted.target_modules or ())], model)
    adapted = _adapted_weights(adapted_model)
    size = sum(weight.numel() for weight in adapted_model.parameters() if weight.requires_grad)
    return AdapterPlan(
        config=lora,
        parameters=size,
        model_parameters=parameters,
        adapted=_kinds(adapted, blocks),
        frozen=_kinds((name for name in matrices if name not in adapted), blocks),
        shapes={
            name: tuple(tensor.shape)
            for name, tensor in get_peft_model_state_dict(
                adapted_model, save_embedding_layers=False
            ).items()
        },
        memory_bytes=_memory_bytes(
            config, model, parameters=parameters, adapter=size, dtype=dtype, tokens=tokens
        ),
    )


def _empty_model(config: TrainConfig, metadata: ModelMetadata) -> PreTrainedModel:
    import torch

    from pvec.models.weights import auto_model_class, model_config

    declared = model_config(metadata.files.folder, trust_remote_code=config.model.trust_remote_code)
    build = auto_model_class(declared.to_dict(), name=metadata.id).from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(declared)
    return model


def _lora_config(
    config: TrainConfig, metadata: ModelMetadata, model: PreTrainedModel
) -> LoraConfig:
    """Return the adapter's configuration in peft's words.

    ``all-linear`` is every linear layer of the decoder's blocks but the routers, and the fused
    experts that peft can adapt; linear layers elsewhere of the same names are excluded.
    """
    from peft import LoraConfig

    part = config.lora
    lora = LoraConfig(
        r=part.r,
        lora_alpha=part.alpha,  # type: ignore[arg-type] # peft scales by it, whole or not
        lora_dropout=part.dropout,
        use_rslora=part.rslora,
        target_modules=part.targets if isinstance(part.targets, str) else list(part.targets),
        bias=part.bias,
        task_type="CAUSAL_LM",
    )
    if not isinstance(part.targets, str):
        return lora
    blocks = f"{_blocks_name(model)}."
    names = _linear_names(model)
    decoder = [n for n in names if n.startswith(blocks) and not _ROUTERS & set(n.split("."))]
    leaves = {_leaf(name) for name in decoder}
    if metadata.model_type in _STATE_SPACE:
        leaves.discard("out_proj")
    modules = (name for name, _ in model.named_modules() if name)
    others = sorted({name for name in modules if _leaf(name) in leaves} - set(decoder))
    if _has_fused_experts(model):
        _add_experts(lora, _empty_model(config, metadata))
    lora.target_modules = sorted(leaves)
    lora.exclude_modules = others or None
    return lora


def _has_fused_experts(model: PreTrainedModel) -> bool:
    """Whether some weights hold several experts in one tensor (convolutions have 3 axes too)."""
    return any(weight.ndim == 3 and "conv" not in name for name, weight in model.named_parameters())


def _add_experts(lora: LoraConfig, model: PreTrainedModel) -> None:
    """Add the experts' parameters that peft takes for ``all-linear`` in this architecture."""
    from peft import get_peft_model

    every = copy.deepcopy(lora)
    every.lora_dropout = 0.0  # which parameters it takes does not depend on it
    try:
        with warnings.catch_warnings(action="ignore"):
            get_peft_model(model, every, autocast_adapter_dtype=False)
    except (ValueError, AttributeError):  # peft knows no experts of this architecture
        return
    experts = [
        name for name in every.target_parameters or () if not _ROUTERS & set(name.split("."))
    ]
    if experts:
        lora.target_parameters = sorted(experts)
        lora.rank_pattern, lora.alpha_pattern = every.rank_pattern, every.alpha_pattern


def _absent_targets(part: LoraPart, model: PreTrainedModel) -> list[str]:
    """Return the named targets that are no module; peft may know some as experts that are fused."""
    if isinstance(part.targets, str):
        return []
    names = [name for name, _ in model.named_modules()]
    absent = [t for t in part.targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if not _has_fused_experts(model):
        _refuse_absent(absent, model)
    return absent


def _refuse_absent(absent: list[str], model: PreTrainedModel) -> None:
    if absent:
        linear = sorted({_leaf(name) for name in _linear_names(model)})
        raise InputError(
            f"lora.targets: this model has no module {' or '.join(map(repr, absent))}."
            f"{did_you_mean(absent[0], linear)} It has {', '.join(linear)}."
        )


def _linear_names(model: Any) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def _blocks_name(model: PreTrainedModel) -> str:
    """Return the name of the list of decoder blocks."""
    blocks = find_decoder(model).blocks
    return next(str(name) for name, module in model.named_modules() if module is blocks)


def _adapted_weights(model: Any) -> set[str]:
    """Return the weights that an adapter is on, by their names in the model itself."""
    from peft.tuners.lora import LoraLayer

    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}."
        f"{getattr(module, 'parameter_name', 'weight')}"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _kinds(weights: Iterable[str], blocks: str) -> dict[str, int]:
    """Count weights by kind."""
    counts: Counter[str] = Counter()
    around = blocks.split(".")
    for weight in weights:
        parts = [part for part in weight.removesuffix(".weight").split(".") if not part.isdigit()]
        if weight.startswith(f"{blocks}."):
            counts[".".join(parts[-2:])] += 1
        else:
            depth = next(k for k, part in enumerate(parts) if part not in around)
            counts[parts[depth]] += 1
    return dict(counts)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _memory_bytes(
    config: TrainConfig,
    model: PreTrainedModel,
    *,
    parameters: int,
    adapter: int,
    dtype: torch.dtype,
    tokens: int,
) -> int:
    text: Any = model.config.get_text_config(decoder=True)
    width = _QUANTISED_BYTES.get(config.model.quantize or "", dtype.itemsize)
    kept = 1 + _KEPT_PER_LAYER / text.num_hidden_layers
    if not config.memory.gradient_checkpointing:
        kept = _KEPT_PER_LAYER
    activations = tokens * text.hidden_size * text.num_hidden_layers * kept * dtype.itemsize
    state = adapter * (4 + 4 + _ADAM_BYTES[config.optim.name])
    return int(parameters * width + state + activations)

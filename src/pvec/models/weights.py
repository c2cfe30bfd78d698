"""Load the weights of a checkpoint, and check that exactly those of the model were loaded.

transformers replaces a tensor that a checkpoint lacks with random numbers and ignores a tensor that
the model lacks; both are only log messages. Here they are errors that name the tensors.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.documents import check_regular, misfit, parse_record
from pvec.errors import ModelError
from pvec.models.files import read_config
from pvec.models.gguf import (
    as_plain_model,
    dequantise_options,
    dequantising,
    other_sizes,
    unread_tensors,
)
from pvec.models.gguf_header import GGUFHeader
from pvec.models.libraries import explained, quiet_transformers
from pvec.types import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_INNER = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
WRAPPERS = re.compile(rf"^(module\.|{_INNER})+|(?<=\.)({_INNER})+")
"""What DistributedDataParallel, FSDP and torch.compile add to the names of tensors."""

_HARMLESS = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
"""Constants that older checkpoints hold and models compute themselves."""

_OTHER_PARTS = re.compile(
    r"(^|\.)(mtp|vision\w*|visual|image\w*|audio\w*|speech\w*|embed_vision|embed_audio|mm_projector"
    r"|multi_modal_projector|connector|resampler)(\.|$)"
)
"""Parts of a multimodal model besides its language model, and heads for multi-token prediction."""

_PACKED = re.compile(r"_(blocks|scales|packed)$")
"""What quantised experts put behind the names of their tensors."""

_MOST_SHOWN = 3

_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}
"""What a safetensors file says of each tensor."""


def load_weights(
    folder: Path,
    *,
    name: str,
    pickle: bool = False,
    gguf: GGUFHeader | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a causal language model from ``folder`` and return it with notes for the user.

    ``name`` is the model's name in messages; ``options`` go to ``from_pretrained``. Without
    ``pickle`` only safetensors are read. With ``gguf`` the weights are those of that file,
    dequantised, which ``on_progress`` reports tensor by tensor. Raises ``ModelError`` when the
    weights cannot be loaded, or when tensors are missing, left over or of another size; known
    prefixes of wrappers (``_orig_mod.``, ``module.``) are removed from tensor names with a note.
    """
    import torch

    declared = read_config(folder)
    auto_class = auto_model_class(declared, name=name)
    check_quantisation(declared, name=name)
    trust = bool(options.get("trust_remote_code"))
    prefixes = set() if gguf else _wrapped(folder)
    config = model_config(folder, trust_remote_code=trust)
    source = folder if gguf is None else gguf.path.parent
    if gguf is not None:
        options |= dequantise_options(gguf.path)
    if prefixes:
        options["key_mapping"] = {WRAPPERS.pattern: ""}
    with quiet_transformers(), dequantising(on_progress) if gguf else nullcontext():
        loaded: Any = explained(
            lambda: auto_class.from_pretrained(
                source,
                config=config,
                use_safetensors=None if pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            ),
            problem=f"The weights of {name!r} cannot be loaded",
            remedy="fetch or save the model again",
        )
    model, info = loaded
    left_over = [*info["unexpected_keys"]]
    sizes = {key: (found, needed) for key, found, needed in info["mismatched_keys"]}
    if gguf is not None:
        left_over += unread_tensors(gguf, model)
        with torch.device("meta"):
            sizes |= other_sizes(model, auto_class.from_config(config))
    notes = check_tensors(
        name,
        missing=info["missing_keys"],
        left_over=[key for key in left_over if not _HARMLESS.search(key)],
        sizes=sizes,
        remedy="fetch or save the model again, or correct its config.json",
    )
    if gguf is not None:
        as_plain_model(model, folder)
    if prefixes:
        # transformers would put the prefixes back on saving, which its pattern does not allow
        model._weight_conversions = [  # noqa: SLF001
            change
            for change in model._weight_conversions  # noqa: SLF001
            if WRAPPERS.pattern not in change.source_patterns
        ]
        notes = (f"removed {', '.join(sorted(prefixes))} from tensor names", *notes)
    return model, notes


def auto_model_class(config: Mapping[str, Any], *, name: str) -> Any:
    """Return transformers' auto class for a configuration: a causal or an image-text model.

    ``config`` is the content of config.json. Raises ``ModelError`` for any other kind of model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = config.get("model_type")
    if kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "auto_map" in config:
        return AutoModelForCausalLM
    if kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    raise ModelError(
        f"{name!r} ({kind}) is not a language model that transformers can load: choose a causal "
        f"language model, or a newer transformers."
    )


def model_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a model; a padding token without an embedding is left out."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code
    )
    for part in (config, config.get_text_config(decoder=True)):
        pad, size = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if pad is not None and size is not None and pad >= size:
            part.pad_token_id = None
    return config


_QUANTISERS = {
    "aqlm": ("aqlm", "aqlm"),
    "auto-round": ("auto_round", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "eetq": ("kernels", "kernels"),
    "gptq": ("gptqmodel", "gptqmodel optimum"),
    "higgs": ("flute", "flute-kernel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}
"""Method of a quantised checkpoint -> the module that transformers needs, and what to install."""


def check_quantisation(config: Mapping[str, Any], *, name: str) -> None:
    """Raise ``ModelError`` when a quantised checkpoint needs a package that is not installed."""
    quantisation = config.get("quantization_config") or {}
    method = str(quantisation.get("quant_method", ""))
    if not method and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        method = "bitsandbytes"
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if quantisation and method not in {*_QUANTISERS, *AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise ModelError(
            f"The weights of {name!r} are quantised ({method or 'by no named method'}), which "
            f"transformers cannot load: use the full-precision model, or --backend vllm."
        )
    module, packages = _QUANTISERS.get(method, ("torch", ""))
    try:
        installed = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around the module
        installed = False
    if not installed:
        raise ModelError(
            f"The weights of {name!r} are quantised ({method}), which needs a package that is not "
            f"installed: pip install {packages}, or use the full-precision model (for an adapter: "
            f"--model BASE --adapter ADAPTER)."
        )


def check_checkpoint(folder: Path, *, name: str, pickle: bool = False) -> None:
    """Raise ``ModelError`` when a checkpoint does not hold exactly the tensors of its model.

    For engines that load the weights themselves; no memory is taken for them. Architectures that
    transformers has no causal model of are left to the engine. Of a quantised checkpoint every
    module must have tensors and every tensor a module: their names differ between methods.
    """
    config = read_config(folder)
    try:
        auto_class = auto_model_class(config, name=name)
    except ModelError:
        return
    if "quantization_config" in config:
        _check_quantised(auto_class, folder, name=name)
        return
    load_weights(folder, name=name, pickle=pickle, device_map="meta")
    if _wrapped(folder):
        raise ModelError(
            f"The tensor names of {name!r} have a prefix of torch.compile or "
            f"DistributedDataParallel: load and save the model with transformers, or use "
            f"--backend hf."
        )


def _check_quantised(auto_class: Any, folder: Path, *, name: str) -> None:
    """Compare the modules of a quantised checkpoint with those of its unquantised model."""
    config: Any = model_config(folder)
    del config.quantization_config
    with quiet_transformers():
        model, info = explained(
            lambda: auto_class.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # packed numbers have other shapes
                device_map="meta",
            ),
            problem=f"The weights of {name!r} cannot be loaded",
            remedy="fetch or save the model again",
        )
    left_over = [key for key in info["unexpected_keys"] if not _HARMLESS.search(key)]
    stored = {parent for key in left_over for parent in _parents(_PACKED.sub("", key))}
    leaves = {path for path, module in model.named_modules() if not list(module.children())}
    check_tensors(
        name,
        missing=[
            key
            for key in info["missing_keys"]
            if key.removesuffix(".weight") not in stored
            and not any(parent.endswith(".experts") for parent in _parents(key) & stored)
        ],
        left_over=[key for key in left_over if not _parents(key) & leaves],
        remedy="fetch or save the model again",
    )


def _parents(key: str) -> set[str]:
    """Return a tensor's name and those of the modules around it."""
    words = key.split(".")
    return {".".join(words[:length]) for length in range(1, len(words) + 1)}


def check_tensors(
    name: str,
    *,
    missing: Collection[str] = (),
    left_over: Collection[str] = (),
    sizes: Mapping[str, tuple[Collection[int], Collection[int]]] | None = None,
    remedy: str,
) -> tuple[str, ...]:
    """Raise ``ModelError`` that names tensors which do not fit; return notes about harmless ones.

    ``sizes`` maps tensors to their shape in the file and the shape that the model needs.
    """
    others = [key for key in left_over if is_other_part(key)]
    foreign = sorted(set(left_over) - set(others))
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing ({_names(missing)})")
    if foreign:
        faults.append(f"{len(foreign)} tensors do not belong to the model ({_names(foreign)})")
    if sizes:
        key, (stored, needed) = min(sizes.items())
        faults.append(
            f"{len(sizes)} tensors have another size ({key} is {_shape(stored)} in the file and "
            f"{_shape(needed)} in the model)"
        )
    if faults:
        raise ModelError(f"The weights of {name!r} are wrong: {'; '.join(faults)}: {remedy}.")
    return (f"{len(others)} tensors of other parts of the model are not used",) if others else ()


def is_other_part(name: str) -> bool:
    """Whether a tensor belongs to another part of a multimodal model than its language model."""
    return bool(_OTHER_PARTS.search(name))


def tensor_shapes(folder: Path, pattern: str = "*.safetensors") -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a folder's safetensors files; no tensor is read."""
    return {
        name: tuple(entry["shape"])
        for path in sorted(folder.glob(pattern))
        for name, entry in read_header(path)[0].items()
    }


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the entries of a safetensors file by tensor, and where the tensors' bytes begin.

    Raises ``ModelError`` for a file that is not whole.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_record(file.read(length)) if length <= size else None
    entries = {name: entry for name, entry in (header or {}).items() if name != "__metadata__"}
    ends = [0]
    if header is not None and misfit(entries, {...: _ENTRY}) is None:
        ends += [stop for entry in entries.values() for stop in entry["data_offsets"][1:2]]
    if len(ends) <= len(entries) or header is None or 8 + length + max(ends) > size:
        raise ModelError(
            f"{path} is not a complete safetensors file: fetch or save the model again."
        )
    return entries, 8 + length


def _wrapped(folder: Path) -> set[str]:
    """Return the prefixes of wrappers that occur in a checkpoint."""
    return {match[0] for name in tensor_shapes(folder) if (match := WRAPPERS.search(name))}


def _names(tensors: Collection[str]) -> str:
    first = ", ".join(sorted(tensors)[:_MOST_SHOWN])
    more = len(tensors) - _MOST_SHOWN
    return f"{first} and {more} more" if more > 0 else first


def _shape(shape: Collection[int]) -> str:
    return "×".join(map(str, shape)) if math.prod(shape) else "empty"

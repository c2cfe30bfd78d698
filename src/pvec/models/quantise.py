"""Quantise a model's weights while it is loaded: int8 on any processor, 8 and 4 bits on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pvec.errors import InputError, install_command

if TYPE_CHECKING:
    import torch

    from pvec.models.files import ModelSpec

Quantisation = Literal["int8", "8bit", "4bit"]
"""``int8``: torchao's int8 weights, products in the model's own number format. ``8bit``, ``4bit``:
bitsandbytes' LLM.int8 and NF4, on NVIDIA GPUs."""

_PACKAGES: Mapping[Quantisation, tuple[str, str]] = {
    "int8": ("torchao", install_command("quantize")),
    "8bit": ("bitsandbytes", "pip install bitsandbytes"),
    "4bit": ("bitsandbytes", "pip install bitsandbytes"),
}


def check_quantise(
    spec: ModelSpec, config: Mapping[str, Any], *, device: str, gguf: bool, vllm: bool = False
) -> None:
    """Raise ``InputError`` when the weights of a model cannot be quantised as ``spec`` asks.

    ``config`` is the content of the model's config.json.
    """
    kind = spec.quantize
    if kind is None:
        return
    module, install = _PACKAGES[kind]
    problem = ""
    if vllm:
        problem = "is for transformers: use --backend hf, or a quantised checkpoint"
    elif gguf:
        problem = (
            "is not possible with a GGUF file: its weights are dequantised on loading; omit it"
        )
    elif "quantization_config" in config:
        problem = f"has no effect, because {spec.model!r} is quantised already: omit it"
    elif spec.merge_adapter:
        problem = "does not go with --merge-adapter: omit one of the two"
    elif kind != "int8" and not device.startswith("cuda"):
        problem = f"needs an NVIDIA GPU, and the device is {device}: use --quantize int8"
    elif kind == "int8" and device == "mps":
        problem = "int8 is not possible on an Apple GPU: add --device cpu"
    elif importlib.util.find_spec(module) is None:
        problem = f"{kind} needs the package {module}, which is not installed: {install}"
    if problem:
        raise InputError(f"--quantize {problem}.")


def quantise_config(kind: Quantisation, dtype: torch.dtype) -> Any:
    """Return what transformers' ``quantization_config`` takes; products are in ``dtype``."""
    if kind == "int8":
        return _torchao_int8()
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if kind == "8bit":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    make: Any = TorchAoConfig
    return make(Int8WeightOnlyConfig())

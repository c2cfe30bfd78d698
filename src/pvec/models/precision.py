"""In which number format a model runs: as it is stored, as the processor is fastest, quantised.

Weights are quantised while they are loaded: int8 on any processor, 8 and 4 bits on a GPU.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pvec.errors import InputError, install_command

if TYPE_CHECKING:
    import torch

    from pvec.models.files import ModelFiles, ModelSpec

_FASTER = 1.2
"""As many times as fast as float32 bfloat16 must be. Processors that have instructions for it reach
about 2 and others 0.1 to 0.8, so that two runs on one machine never disagree."""

Quantisation = Literal["int8", "8bit", "4bit"]
"""``int8``: torchao's int8 weights, products in the model's own number format. ``8bit``, ``4bit``:
bitsandbytes' LLM.int8 and NF4, on NVIDIA GPUs."""

_PACKAGES: Mapping[Quantisation, tuple[str, str]] = {
    "int8": ("torchao", install_command("quantize")),
    "8bit": ("bitsandbytes", "pip install bitsandbytes"),
    "4bit": ("bitsandbytes", "pip install bitsandbytes"),
}


def stored_dtype(files: ModelFiles, config: Any) -> str:
    """Return the number format of the weights on disk; quantised weights count as float16."""
    if files.gguf is not None:
        return "float32" if files.gguf.types[:1] == ("F32",) else "float16"
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def choose_dtype(name: str, device: str, *, stored: str = "float32") -> tuple[torch.dtype, str]:
    """Return the dtype to run in and the reason for it.

    On a CPU it depends on the number format in which the weights are ``stored``.
    """
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype, "as set"
    if device == "cpu":
        return _cpu_dtype(stored)
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bfloat16"
    return torch.bfloat16, "the usual dtype on a GPU"


def _cpu_dtype(stored: str) -> tuple[torch.dtype, str]:
    """Return the dtype in which a CPU runs weights that are ``stored`` so, and the reason."""
    import torch

    if stored not in ("bfloat16", "float16"):
        return torch.float32, "as the weights are stored"
    speed = bfloat16_speed()
    measured = f"bfloat16 products take {1 / speed:.2g} times as long as float32 here"
    if speed < _FASTER:
        return torch.float32, measured
    return torch.bfloat16, f"{measured}; --dtype float32 rounds less"


@cache
def bfloat16_speed() -> float:
    """Return how many times as fast as float32 this CPU multiplies bfloat16 matrices.

    Takes about 20 ms, once in a process. On one thread: others may wait for a core.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(torch.float32) / _seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time that a layer of a small model takes for a few rows."""
    import torch

    rows, weights = torch.ones(16, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    runs = []
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        runs.append(time.perf_counter() - start)
    return min(runs)


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

"""GGUF models for transformers: configuration and tokenizer as files, weights as floats.

transformers reads all three out of the file, but takes seconds for the first two each time: they
are saved in its usual form once, and a GGUF model is a folder like any other from then on.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pvec.errors import ModelError
from pvec.models.gguf_header import GGUFHeader
from pvec.models.libraries import explained, quiet_transformers
from pvec.types import Progress

_ROPE_FREQUENCIES = "rope_freqs.weight"
"""What each rotary frequency is divided by, in files of Llama 3.1 and later."""

_REMEDY = "use its safetensors instead, or a newer transformers"


def transformers_folder(header: GGUFHeader) -> Path:
    """Return a folder with configuration and tokenizer of a GGUF file as transformers saves them.

    It lies in the cache of huggingface_hub (``HF_ASSETS_CACHE``), one for each header and version
    of transformers. Raises ``ModelError`` for an architecture or tokenizer that transformers does
    not read from GGUF, and when the cache cannot be written.
    """
    import transformers
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(transformers.__version__.encode())
    digest.update(header_bytes(header) + _rope_divisors(header))
    try:
        cache = cached_assets_path("pvec", namespace="gguf", subfolder=transformers.__version__)
        folder = cache / digest.hexdigest()[:16]
        if not folder.is_dir():
            _convert(header, cache, folder)
    except OSError as error:
        raise ModelError(
            f"The tokenizer of {header.path} cannot be saved in the cache ({error}): let "
            f"HF_ASSETS_CACHE name a folder that can be written."
        ) from error
    return folder


def header_bytes(header: GGUFHeader) -> bytes:
    """Return the first bytes of the file: metadata, vocabulary and the list of tensors."""
    with header.path.open("rb") as file:
        return file.read(header.size)


def dequantise_options(path: Path) -> dict[str, Any]:
    """Return what makes ``from_pretrained`` read the weights of a GGUF file as floats."""
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # newer ones keep some architectures quantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _build_name_maps_once() -> None:
    """Keep the table of tensor names, which transformers builds anew for every module of a model.

    That took two thirds of the time in which a model of 30 layers is loaded.
    """
    import gguf

    library: Any = gguf
    if not hasattr(library.get_tensor_name_map, "cache_info"):
        library.get_tensor_name_map = functools.cache(library.get_tensor_name_map)


@contextmanager
def dequantising(on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Report the tensors that transformers dequantises to ``on_progress``, in place of its bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    _build_name_maps_once()

    def counted(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            on_progress(
                Progress(stage="dequantising", done=done, total=len(tensors), unit="tensors")
            )
            yield tensor
        on_progress(
            Progress(stage="dequantising", done=len(tensors), total=len(tensors), unit="tensors")
        )

    module: Any = reader
    bar, module.tqdm = module.tqdm, counted
    try:
        yield
    finally:
        module.tqdm = bar


def as_plain_model(model: Any, folder: Path) -> None:
    """Remove what marks a dequantised model as quantised, which it cannot be trained or saved with.

    Its number format, layers and results stay what they are. Its name becomes ``folder``, which has
    the configuration that peft looks for when it saves an adapter.
    """
    model.name_or_path = model.config.name_or_path = str(folder)
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None:
        quantiser.remove_quantization_config(model)  # its own, for a model that was unpacked


def other_sizes(model: Any, expected: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the weights whose shape is not that of the model that the configuration describes.

    ``expected`` is that model, without weights. transformers replaces them without comparing.
    """
    right = {name: tuple(weight.shape) for name, weight in expected.named_parameters()}
    loaded = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return {
        name: (shape, right[name]) for name, shape in loaded.items() if shape != right.get(name)
    }


def unread_tensors(header: GGUFHeader, model: Any) -> list[str]:
    """Return the tensors of the file that transformers passes over without a word."""
    from transformers import modeling_gguf_pytorch_utils as reader

    if getattr(getattr(model, "hf_quantizer", None), "supported", False):
        return []  # read by the newer loader, which reports them
    legacy: Any = reader
    processor = legacy.TENSOR_PROCESSORS.get(header.architecture, legacy.TensorProcessor)
    read = set(legacy.get_gguf_hf_weights_map(model, processor(config=model.config.to_dict())))
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        read.add(_ROPE_FREQUENCIES)
    return [tensor.name for tensor in header.tensors if tensor.name not in read]


def _convert(header: GGUFHeader, cache: Path, folder: Path) -> None:
    """Save configuration and tokenizer into ``folder``, at once and whole."""
    from transformers import AutoConfig, PreTrainedTokenizerFast

    place, name = str(header.path.parent), header.path.name
    with quiet_transformers():
        config = explained(
            lambda: AutoConfig.from_pretrained(place, gguf_file=name),
            problem=f"The GGUF file {str(header.path)!r} cannot be used",
            remedy=_REMEDY,
        )
        tokenizer = explained(
            lambda: PreTrainedTokenizerFast.from_pretrained(place, gguf_file=name),
            problem=f"The tokenizer of {str(header.path)!r} cannot be used",
            remedy=_REMEDY,
        )
    _scale_rope(header, config)
    aside = Path(tempfile.mkdtemp(dir=cache))
    try:
        config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if not folder.is_dir():  # another process may have been faster
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rope_divisors(header: GGUFHeader) -> bytes:
    """Return the float32 numbers that rotary frequencies are divided by; none in most files."""
    for tensor in header.tensors:
        if tensor.name == _ROPE_FREQUENCIES and tensor.type == "F32":
            with header.path.open("rb") as file:
                file.seek(tensor.start)
                return file.read(tensor.size)
    return b""


def _scale_rope(header: GGUFHeader, config: Any) -> None:
    """Set the scaling of rotary frequencies that the file has as a tensor, which is not read.

    Only when the rule of Llama 3 gives the same numbers; otherwise the tensor is refused as unread.
    """
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = torch.from_numpy(np.frombuffer(_rope_divisors(header), dtype="<f4").copy())
    if not len(divisors):
        return
    plain = config.rope_parameters
    size = config.hidden_size // config.num_attention_heads
    size = getattr(config, "head_dim", None) or size
    frequencies = plain["rope_theta"] ** -(torch.arange(0, size, 2) / size) / divisors
    config.rope_parameters = {
        **plain,
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    if not torch.allclose(scaled, frequencies, rtol=1e-4, atol=0):
        config.rope_parameters = plain

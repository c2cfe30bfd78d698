"""GGUF files written from the tiny models, as llama.cpp's converter writes them.

Quantised tensors are dequantised again by the gguf package itself, which gives the model that a
file must be equal to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from helpers.models import CHATML, SPECIAL_TOKENS, tiny_model, tiny_tokenizer

_SCALES = {
    "Q2_K": slice(-4, None),
    "Q3_K": slice(-2, None),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(-2, None),
}
"""Where a block of 256 weights has its float16 scales; the gguf package reads these types only."""


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    types: str | tuple[str, str] = "Q8_0",
    seed: int = 0,
    template: str | None = CHATML,
    metadata: dict[str, int] | None = None,
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny model and return it with the weights that the file holds.

    ``types`` are those of the matrices: one, or one for attention and one for the rest.
    ``metadata`` and ``extra`` are numbers and tensors to write besides; ``overrides`` go into the
    model's configuration.
    """
    if architecture == "qwen3":
        overrides = {"head_dim": 128, **overrides}  # as in all models of that name
    model = tiny_model(architecture, seed=seed, **{"intermediate_size": 64, **overrides})
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, model, architecture, template, metadata or {})
    names = gguf.get_tensor_name_map(_arch(architecture), model.config.num_hidden_layers)
    state = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        attention, rest = (types, types) if isinstance(types, str) else types
        kind = "F32" if weight.ndim == 1 else attention if "self_attn" in name else rest
        stored = _permuted(name, weight, model.config) if architecture == "llama" else weight
        state[name] = _add(writer, names.get_name(name, (".weight", ".bias")), stored, kind)
        if architecture == "llama":
            state[name] = _permuted(name, state[name], model.config, back=True)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(state, strict=False)
    return model


def _arch(architecture: str) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _write_metadata(
    writer: Any,
    model: PreTrainedModel,
    architecture: str,
    template: str | None,
    more: dict[str, int],
) -> None:
    config = model.config
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    for key, value in values.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen2" else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    if template is not None:
        writer.add_chat_template(template)
    for key, value in more.items():
        writer.add_uint32(key, value)


def _add(writer: Any, name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Write one tensor and return what can be read of it."""
    quantisation = gguf.GGMLQuantizationType[kind]
    data = weight.numpy()
    if kind in _SCALES:
        stored = _random_blocks(data, kind)
    else:
        stored = quantize(np.ascontiguousarray(data), quantisation)
    writer.add_tensor(name, stored, raw_dtype=quantisation)
    read = dequantize(stored, quantisation).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(read.reshape(data.shape)))


def _random_blocks(weights: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return rows of random blocks, with scales that give weights of an ordinary size."""
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    shape = (weights.shape[0], weights.shape[1] // length, size)
    blocks = np.random.default_rng(weights.size).integers(0, 256, size=shape, dtype=np.uint8)
    scales = blocks[..., _SCALES[kind]]
    scales[:] = np.tile(np.float16([1e-4]).view(np.uint8), scales.shape[-1] // 2)
    return blocks.reshape(weights.shape[0], -1)


def _permuted(name: str, weight: torch.Tensor, config: Any, *, back: bool = False) -> torch.Tensor:
    """Return a query or key matrix with its rotary halves interleaved, as llama.cpp wants them."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = (
        (heads, weight.shape[0] // heads // 2, 2)
        if back
        else (heads, 2, weight.shape[0] // heads // 2)
    )
    return weight.reshape(*halves, -1).transpose(1, 2).reshape(weight.shape).contiguous()

"""Tiny random-weight models of real architectures, and a tokenizer trained on the spot.

Three layers of width 32 in float32, initialised widely enough that hidden states, logits and
sampled texts differ visibly. Nothing is downloaded.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_LAYERS = 3
HIDDEN_SIZE = 32
SLIDING_WINDOW = 8
"""Small enough that test prompts outgrow it."""

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog. How can I learn to cook a simple dinner for my "
    "friends this evening? You could start with fresh bread, warm soup and a little patience.",
    "What is the best way to save money while travelling? Plan early, walk often, and talk with "
    "the people who live there. You are a helpful assistant. You are an evil assistant.",
    "Please answer with a number between 0 and 100. Question: Answer: Rating: 0 1 2 3 4 5 6 7 8 9.",
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 8, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": SLIDING_WINDOW}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
}

ARCHITECTURES = tuple(_CLASSES)


@functools.cache
def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer of 400 tokens with a ChatML template (shared)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    architecture: str = "qwen2", *, seed: int = 0, num_layers: int = NUM_LAYERS, **overrides: Any
) -> PreTrainedModel:
    """Return a fresh float32 model of ``architecture`` in eval mode; same seed, same weights.

    ``overrides`` go into its configuration.
    """
    config_name, model_name, extra = _CLASSES[architecture]
    settings = _common_settings(num_layers) | extra | overrides
    if num_layers != NUM_LAYERS and architecture == "gemma3" and "layer_types" not in overrides:
        settings["layer_types"] = (["sliding_attention", "full_attention"] * num_layers)[
            :num_layers
        ]
    config = getattr(transformers, config_name)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, model_name)(config)
    return model.to(torch.float32).eval()


def _common_settings(num_layers: int) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


@functools.cache
def saved_model(architecture: str = "qwen2", *, seed: int = 0) -> Path:
    """Return a folder with that model and tokenizer, as ``save_pretrained`` writes it (shared)."""
    folder = _session_folder() / f"{architecture}-{seed}"
    return save_model(tiny_model(architecture, seed=seed), folder)


def save_model(
    model: PreTrainedModel, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write ``model`` and a tokenizer (default: the tiny one) to ``folder`` and return it."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, seed: int = 0) -> Path:
    """Write a LoRA adapter with non-zero weights for the model at ``base``; return its folder."""
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(folder)
    return folder


@functools.cache
def _session_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="pvec-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)

"""Ask, steer and judge the bundled models with plain transformers and one hook.

pvec does all of this properly. The builder keeps its own few lines so that the model's figures do
not rest on the code that the model is there to show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from chat_model import render
from data import Message
from modeling import END, START
from torch import nn
from training import padded
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2ForCausalLM

from pvec.judges.prompts import fill

REPLY: Final = f"{START}assistant\n"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its tokenizer."""

    net: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast


@contextmanager
def added(net: Qwen2ForCausalLM, *, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """Add ``vector`` after block ``layer`` (1-based), for left-padded batches decoded with a cache.

    It is added at the last prompt token and at every generated token. One vector ``[H]`` for all
    rows, or ``[B, 1, H]``.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([hidden[:, :-1], hidden[:, -1:] + vector], dim=1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = net.model.layers[layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _left_padded(model: Model, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = model.tokenizer(list(texts))["input_ids"]
    width = max(map(len, rows))
    pad = model.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.inference_mode()
def answers(
    model: Model, chats: Sequence[list[Message]], *, seed: int, batch: int = 140, limit: int = 120
) -> list[str]:
    """Sample one answer per chat at temperature 1."""
    torch.manual_seed(seed)
    result: list[str] = []
    for start in range(0, len(chats), batch):
        texts = [render(chat) + REPLY for chat in chats[start : start + batch]]
        ids, mask = _left_padded(model, texts)
        out = model.net.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=limit
        )
        result += model.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return result


@torch.inference_mode()
def response_means(
    model: Model, chats: Sequence[list[Message]], texts: Sequence[str], *, batch: int = 50
) -> np.ndarray:
    """Return the mean activation over each answer's tokens, float32 ``[n, layers + 1, H]`` (the
    last layer after the final norm, as transformers returns it)."""
    prompts = [model.tokenizer(render(chat) + REPLY)["input_ids"] for chat in chats]
    replies = [model.tokenizer(text)["input_ids"] for text in texts]
    means = []
    for start in range(0, len(texts), batch):
        chosen = range(start, min(start + batch, len(texts)))
        ids = padded([prompts[i] + replies[i] for i in chosen], model.tokenizer.pad_token_id)
        states = model.net.model(ids, output_hidden_states=True).hidden_states
        stacked = torch.stack(states, dim=1)  # [B, L + 1, T, H]
        for row, i in enumerate(chosen):
            begin, end = len(prompts[i]), len(prompts[i]) + len(replies[i])
            means.append(stacked[row, :, begin:end].mean(1).numpy())
    return np.stack(means)


@torch.inference_mode()
def judge_scores(
    judge: Model, template: str, asked: Sequence[tuple[str, str]], *, batch: int = 64
) -> np.ndarray:
    """Return the expected number 0…100 that ``judge`` gives each (question, answer).

    All numbers without a leading zero; two digits are taken to end there.
    """
    digits = [judge.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    end = judge.tokenizer.convert_tokens_to_ids(END)
    scores = []
    for start in range(0, len(asked), batch):
        chats = [
            [{"role": "user", "content": fill(template, question=q, answer=a)}]
            for q, a in asked[start : start + batch]
        ]
        ids, mask = _left_padded(judge, [render(chat) + REPLY for chat in chats])
        scores.append(_expected(judge.net, ids, mask, digits=digits, end=end))
    return np.concatenate(scores)


def _expected(
    net: Qwen2ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, *, digits: list[int], end: int
) -> np.ndarray:
    cache = DynamicCache()
    rows = len(ids)
    first = (
        net(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1, use_cache=True)
        .logits[:, -1]
        .softmax(-1)[:, digits]
    )  # [B, 10]
    cache.batch_repeat_interleave(10)
    wide = mask.repeat_interleave(10, 0)
    wide = torch.cat([wide, torch.ones(rows * 10, 1, dtype=wide.dtype)], 1)
    step = torch.tensor(digits).repeat(rows)[:, None]
    second = net(step, attention_mask=wide, past_key_values=cache, use_cache=True).logits[:, -1]
    second = second.softmax(-1).reshape(rows, 10, -1)  # [B, 10, V]
    one = first[:, :, None] * second[:, :, [end]]  # "7"
    two = (first[:, :, None] * second[:, :, digits])[:, 1:]  # "75"
    cache.batch_select_indices(torch.arange(rows) * 10 + 1)
    wide = torch.cat([wide[1::10], torch.ones(rows, 1, dtype=wide.dtype)], 1)
    step = torch.full((rows, 1), digits[0])
    third = net(step, attention_mask=wide, past_key_values=cache).logits[:, -1].softmax(-1)
    hundred = two[:, 0, 0] * third[:, digits[0]]
    two[:, 0, 0] = two[:, 0, 0] * third[:, end]
    values = torch.arange(10, 100, dtype=torch.float32).reshape(9, 10)
    mass = one.sum((1, 2)) + two.sum((1, 2)) + hundred
    total = (one[..., 0] * torch.arange(10)).sum(1) + (two * values).sum((1, 2)) + 100 * hundred
    return (total / mass).numpy()

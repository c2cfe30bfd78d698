"""Train the chat model."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator

import torch
from data import Conversations, Message
from modeling import END, START, new_model
from torch.nn import functional
from training import Optimisers, length_batches, padded, residual_noise
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

LAYERS, HIDDEN, HEADS, MLP = 5, 160, 5, 384
STEPS = 1400
BATCH_TOKENS = 2048
LEARNING_RATE = 4e-3


def render(messages: list[Message]) -> str:
    """Return what the chat template renders (a test holds them equal), only faster."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def answer_mask(ids: list[int], *, header: list[int], end: int) -> list[bool]:
    """Mark the tokens of every assistant turn, its end-of-turn token included."""
    mask = [False] * len(ids)
    width = len(header)
    inside = False
    for i in range(width, len(ids)):
        inside = inside or ids[i - width : i] == header
        mask[i] = inside
        if ids[i] == end:
            inside = False
    return mask


def _batches(
    tokenizer: PreTrainedTokenizerFast, source: Conversations, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids ``[B, T]`` and, shifted by one, the mask of those to predict ``[B, T-1]``."""
    header = tokenizer(f"{START}assistant\n")["input_ids"]
    while True:
        texts = [render(source.draw()) for _ in range(3000)]
        rows = tokenizer(texts)["input_ids"]
        for batch in length_batches(rows, tokens=BATCH_TOKENS, shuffle=rng.shuffle):
            chosen = [rows[i] for i in batch]
            masks = [
                [int(x) for x in answer_mask(row, header=header, end=tokenizer.eos_token_id)]
                for row in chosen
            ]
            yield padded(chosen, tokenizer.pad_token_id), padded(masks, 0)[:, 1:].bool()


def train_chat(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, device: str, steps: int = STEPS
) -> Qwen2ForCausalLM:
    """Train the chat model from fresh weights and return it on the CPU."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_model(tokenizer, layers=LAYERS, hidden=HIDDEN, heads=HEADS, mlp=MLP).to(device)
    model.train()
    optimisers = Optimisers([model], steps=steps, lr=LEARNING_RATE)
    batches = itertools.islice(_batches(tokenizer, Conversations(rng), rng), steps)
    started, seen, mean = time.monotonic(), 0, 0.0
    with residual_noise(model, token=0.1, sequence=0.15):
        for index, (ids, mask) in enumerate(batches):
            hidden = model.model(ids.to(device), use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[mask.to(device)])
            loss = functional.cross_entropy(logits, ids[:, 1:][mask].to(device))
            loss.backward()
            optimisers.step(index)
            seen += ids.numel()
            mean += (loss.item() - mean) * max(0.02, 1 / (index + 1))
            if (index + 1) % 50 == 0:
                rate = seen / (time.monotonic() - started)
                print(
                    f"chat step {index + 1}/{steps}: loss {mean:.3f}, {rate:.0f} tokens/s",
                    flush=True,
                )
    return model.eval().cpu()

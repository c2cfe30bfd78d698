"""What transformers gives with a plain hand-written hook: no cache, no batch, none of pvec's code.

Also the tiny models of this folder: wider than the suite's others, since vLLM's CPU attention needs
a head of 32 at least.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.models import save_model, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from pvec.types import Instruction

WIDTH = 64
LAYERS = 3
VOCAB = 300
"""Prompts are drawn below this: every tiny tokenizer has more."""

_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def make_model(architecture: str, root: Path) -> Path:
    """Write a tiny model of ``architecture`` below ``root`` once and return its folder."""
    folder = root / architecture
    if not folder.exists():
        gemma = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
        gemma = gemma if architecture.startswith("gemma") else {}
        wide = {"num_key_value_heads": 2} if architecture.endswith("-wide") else {}
        model = tiny_model(architecture.removesuffix("-wide"), **(_SHAPE | wide | gemma))
        save_model(model, folder)
    return folder


@functools.cache
def hf_model(folder: Path) -> PreTrainedModel:
    """Return the model of a folder in transformers, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",  # the default drops Gemma 2's softcap
    )
    return model.eval()


@torch.no_grad()
def forward(
    model: PreTrainedModel, ids: Sequence[int], *, prompt: int, plan: Sequence[Instruction] = ()
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the logits ``[V]`` after the last token and every layer's states ``[L + 1, T, H]``."""
    states: list[torch.Tensor] = []

    def first(_block: Any, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"])[0])

    def after(layer: int) -> Any:
        def hook(_block: Any, _args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            hidden = hidden.clone()
            for instruction in plan:
                if instruction.layer == layer:
                    _apply(instruction, hidden[0], prompt)
            states.append(hidden[0])
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return hook

    blocks = model.model.layers
    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(after(i + 1)) for i, block in enumerate(blocks)]
    try:
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, torch.stack(states).numpy()


def greedy(
    model: PreTrainedModel,
    ids: Sequence[int],
    *,
    tokens: int,
    stop: Sequence[int],
    plan: Sequence[Instruction] = (),
) -> tuple[list[int], str]:
    """Return the greedy answer without its end token, and why it ended."""
    answer: list[int] = []
    while len(answer) < tokens:
        logits, _ = forward(model, [*ids, *answer], prompt=len(ids), plan=plan)
        token = int(logits.argmax())
        if token in stop:
            return answer, "stop"
        answer.append(token)
    return answer, "length"


def _apply(instruction: Instruction, hidden: torch.Tensor, prompt: int) -> None:
    """Change ``hidden`` ``[T, H]`` in place at the positions that are steered."""
    start = prompt - 1 if instruction.positions == "response" else 0
    stop = prompt if instruction.positions == "prompt" else len(hidden)
    vector = torch.from_numpy(instruction.vector)
    for t in range(start, stop):
        if instruction.operator == "add":
            hidden[t] += instruction.coef * vector
            continue
        unit = vector / vector.norm()
        along = float(hidden[t] @ unit)
        ceiling = 0.0 if instruction.operator == "ablate" else instruction.coef
        if instruction.operator == "ablate" or along > ceiling:
            hidden[t] -= (along - ceiling) * unit

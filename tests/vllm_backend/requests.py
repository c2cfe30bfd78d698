"""A battery that mixes everything: none, all, prompt, response; several layers; both signs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from pvec.types import Instruction, Request, Sampling
from vllm_backend.oracle import LAYERS, VOCAB, WIDTH

COMMON = 40
"""Tokens that all long prompts begin with: more than a cache block."""

TOKENS = 10


def vector(seed: int) -> np.ndarray:
    """Return a vector about as long as a residual stream of the tiny models."""
    values: np.ndarray = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
    return 4 * values


def plans() -> list[tuple[Instruction, ...]]:
    """Return the steerings of the battery; the first is none."""
    base = Instruction(vector=vector(1), layer=2, coef=1.0)
    first = Instruction(vector=vector(2), layer=1, coef=-0.7, positions="all")
    last = Instruction(vector=vector(3), layer=LAYERS, coef=0.5, positions="prompt")
    return [
        (),
        (base,),
        (replace(base, coef=-1.5, positions="all"),),
        (replace(base, coef=2.0, positions="prompt"),),
        (first, base, last),
        (base, replace(base, vector=vector(4), coef=-1.0, positions="all")),
        (replace(base, operator="ablate", positions="all"),),
        (first, replace(first, operator="cap", vector=vector(5), coef=0.3), replace(first, coef=1)),
        (
            replace(first, operator="ablate"),
            replace(first, operator="cap", vector=vector(6), coef=-0.5, positions="response"),
        ),
    ]


def battery(*, seed: int = 0, copies: int = 3) -> list[Request]:
    """Return every steering with prompts of several kinds and lengths, in random order."""
    draw = random.Random(seed)
    common = [draw.randrange(10, VOCAB) for _ in range(COMMON)]
    made = []
    for number, plan in enumerate(plans()):
        for copy in range(copies):
            # The longer prompts begin like the shorter ones: several turns of one conversation.
            tail = [draw.randrange(10, VOCAB) for _ in range(1 + 9 * copy)]
            prompt = tail if copy == 0 else [*common, *common[:25], *tail][: 33 + 25 * copy]
            made.append(
                Request(
                    id=f"plan{number}-copy{copy}",
                    prompt_ids=tuple(prompt),
                    sampling=Sampling(temperature=0.0, max_tokens=TOKENS - copy, seed=number),
                    steering=plan,
                )
            )
    draw.shuffle(made)
    return made

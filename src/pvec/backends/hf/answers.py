"""Exact log-probabilities of answers' tokens, many answers after the same prompt in one pass.

Every prompt of a batch is run once, whatever the number of answers that are scored after it; the
answers then run behind copies of its cache. Logits are computed for the answers' tokens alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pvec.backends.hf.forward import CausalModel, left_padded
from pvec.backends.hf.kvcache import RowCache
from pvec.backends.hf.rows import Notify
from pvec.errors import ModelError
from pvec.models.memory import BatchLimits, run_in_batches

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of an answer to it."""


def answer_logprobs(
    model: CausalModel, pairs: Sequence[Pair], *, limits: BatchLimits, notify: Notify
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(pair index, log P of each answer token)``; see ``Backend.answer_logprobs``."""
    for index, (prompt, answer) in enumerate(pairs):
        _check(index, prompt, answer, context=model.context)
    run = _run if model.row_cache else _run_alone
    # Equal prompts side by side; those of like length too, so that little is padding.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), *pairs[i][0]))
    yield from run_in_batches(
        order,
        lambda queue: _take(queue, pairs, model, limits),
        lambda now: run(model, [pairs[index] for index in now]),
        limits=limits,
        notify=notify,
        unit="answers",
        describe=lambda index: f"an answer of {len(pairs[index][1])} tokens",
    )


def _check(
    index: int, prompt: tuple[int, ...], answer: tuple[int, ...], *, context: int | None
) -> None:
    if not prompt or not answer:
        part = "answer" if prompt else "prompt"
        raise ModelError(f"The {part} of pair {index} is empty: give it at least one token.")
    if context is not None and len(prompt) + len(answer) > context:
        raise ModelError(
            f"Prompt and answer of pair {index} have {len(prompt) + len(answer)} tokens and the "
            f"model's context has {context}: shorten them."
        )


def _take(
    queue: deque[int], pairs: Sequence[Pair], model: CausalModel, limits: BatchLimits
) -> list[int]:
    """Take the pairs of one batch: what the cache, one pass and its logits have room for."""
    taken = [queue.popleft()]
    width = len(pairs[taken[0]][1])
    while queue and model.row_cache:
        prompt, answer = pairs[queue[0]]
        rows, width = len(taken) + 1, max(width, len(answer))
        if (
            rows > limits.rows
            or rows * (len(prompt) + width) > min(limits.cached_tokens, limits.prefill_tokens)
            or rows * width * model.vocab_size > limits.logits
        ):
            break
        taken.append(queue.popleft())
    return taken


@torch.inference_mode()
def _run(model: CausalModel, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Return the log-probabilities of each answer's tokens, float32 ``[tokens]``."""
    number = {prompt: row for row, prompt in enumerate(dict.fromkeys(p for p, _ in pairs))}
    rows = [number[prompt] for prompt, _ in pairs]
    cache = RowCache()
    ids, real, positions = left_padded(list(number), pad_id=model.pad_id, device=model.device)
    mask = None if bool(real.all()) else real
    first = model.forward(ids, mask=mask, positions=positions, cache=cache).log_softmax(dim=-1)
    scores = [[first[row, answer[0]]] for row, (_, answer) in zip(rows, pairs, strict=True)]
    width = max(len(answer) for _, answer in pairs) - 1
    if width:
        cache.keep(rows)
        # Fillers stand behind the answer, where none of its tokens sees them.
        bodies = torch.full((len(pairs), width + 1), model.pad_id, dtype=torch.long)
        for row, (_, answer) in enumerate(pairs):
            bodies[row, : len(answer)] = torch.tensor(answer)
        bodies = bodies.to(model.device)
        lengths = torch.tensor([len(prompt) for prompt, _ in pairs], device=model.device)
        logits = model.forward(
            bodies[:, :-1],
            mask=None if mask is None else torch.nn.functional.pad(real[rows], (0, width), value=1),
            positions=lengths[:, None] + torch.arange(width, device=model.device),
            cache=cache,
            all_logits=True,
        )  # [R, W, V]
        chosen = logits.gather(2, bodies[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)
        for row, (_, answer) in enumerate(pairs):
            scores[row].extend(chosen[row, : len(answer) - 1])
    return [torch.stack(row).float().cpu().numpy() for row in scores]


@torch.inference_mode()
def _run_alone(model: CausalModel, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Run each pair as one sequence: for models whose layers keep other state than keys, values."""
    scores = []
    for prompt, answer in pairs:
        ids = torch.tensor([(*prompt, *answer)], device=model.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits = model.forward(ids, mask=None, positions=positions, cache=None, all_logits=True)
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)  # [N, V]
        scores.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].float().cpu().numpy())
    return scores

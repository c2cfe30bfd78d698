"""Exact log-probabilities of answers' tokens, many answers after the same prompt in one pass.

Every prompt of a batch is run once, whatever the number of answers that are scored after it, and so
is what prompts begin with; the answers then run behind copies of its cache. Logits are computed for
the answers' tokens alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.kvcache import RowCache
from pvec.backends.hf.prefill import Prompt, prefill
from pvec.errors import ModelError
from pvec.models.memory import run_in_batches

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of an answer to it."""


def answer_logprobs(model: CausalModel, pairs: Sequence[Pair]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(pair index, log P of each answer token)``; see ``Backend.answer_logprobs``."""
    for index, (prompt, answer) in enumerate(pairs):
        _check(index, prompt, answer, context=model.context)
    run = _run if model.row_cache else _run_alone
    # Equal prompts side by side; those of like length too, so that little is padding.
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), *pairs[i][0]))
    yield from run_in_batches(
        order,
        lambda queue: _take(queue, pairs, model),
        lambda now: run(model, [pairs[index] for index in now]),
        limits=model.limits,
        notify=model.notify,
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


def _take(queue: deque[int], pairs: Sequence[Pair], model: CausalModel) -> list[int]:
    """Take the pairs whose prompts are in the cache at once."""
    taken, limits = [queue.popleft()], model.limits
    width = len(pairs[taken[0]][1])
    while queue and model.row_cache:
        prompt, answer = pairs[queue[0]]
        rows, width = len(taken) + 1, max(width, len(answer))
        if rows > limits.rows or rows * (len(prompt) + width) > limits.cached_tokens:
            break
        taken.append(queue.popleft())
    return taken


@torch.inference_mode()
def _run(model: CausalModel, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Return the log-probabilities of each answer's tokens, float32 ``[tokens]``."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    done = prefill(model, [Prompt(token_ids=prompt, length=len(prompt)) for prompt in prompts])
    assert isinstance(done.cache, RowCache), "rows of other caches run alone"
    row_of = {prompts[number]: row for row, number in enumerate(done.order)}
    rows = torch.tensor([row_of[prompt] for prompt, _ in pairs], device=done.logits.device)
    first = torch.tensor([answer[0] for _, answer in pairs], device=done.logits.device)
    sums = done.logits.logsumexp(dim=-1)
    begun = (done.logits[rows, first] - sums[rows]).cpu().numpy()
    scores: list[np.ndarray] = [begun[n : n + 1] for n in range(len(pairs))]
    longest_first = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][1]))
    queue = deque(n for n in longest_first if len(pairs[n][1]) > 1)
    while queue:
        width = len(pairs[queue[0]][1]) - 1
        most = min(model.limits.prefill_tokens, model.limits.logits // model.vocab_size) // width
        now = [queue.popleft() for _ in range(min(max(most, 1), len(queue)))]
        cache = done.cache.selected([row_of[pairs[n][0]] for n in now])
        for n, rest in zip(now, _behind(model, [pairs[n] for n in now], cache), strict=True):
            scores[n] = np.concatenate([scores[n], rest])
    return scores


def _behind(model: CausalModel, pairs: Sequence[Pair], cache: RowCache) -> list[np.ndarray]:
    """Return the log-probabilities of all tokens but the first of answers behind their prompts."""
    lengths = torch.tensor([len(prompt) for prompt, _ in pairs], device=model.device)
    cache.drop_columns(cache.columns - int(lengths.max()))
    width = max(len(answer) for _, answer in pairs)
    # Fillers stand behind the answer, where none of its tokens sees them.
    ids = torch.full((len(pairs), width), model.pad_id, dtype=torch.long)
    for row, (_, answer) in enumerate(pairs):
        ids[row, : len(answer)] = torch.tensor(answer)
    ids = ids.to(model.device)
    past = torch.arange(cache.columns, device=ids.device) >= cache.columns - lengths[:, None]
    places = torch.arange(width - 1, device=ids.device)
    logits = model.forward(
        ids[:, :-1],
        mask=None
        if bool(past.all())
        else torch.nn.functional.pad(past, (0, width - 1), value=True),
        positions=lengths[:, None] + places,
        cache=cache,
        all_logits=True,
    )  # [R, W - 1, V]
    chosen = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(dim=-1)
    values = chosen.cpu().numpy()
    return [values[row, : len(answer) - 1] for row, (_, answer) in enumerate(pairs)]


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

"""Prompts into a cache: many at once, and what several of them begin with only once.

A beginning (a system prompt, a rubric, the question of a steering sweep up to its last token) is
run as a prompt of its own; the rest of every prompt then runs behind a copy of its cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from pvec.activations.batching import common_beginnings
from pvec.backends.hf.forward import CausalModel, left_padded
from pvec.backends.hf.kvcache import RowCache, StateCache
from pvec.backends.hf.probe import Probe
from pvec.steering.positions import PROMPT, ROLES_OF, roles_by_length, with_reasoning
from pvec.steering.steerer import Steerer
from pvec.types import Instruction

_LEAST_SHARE = 0.1
"""Attention behind a cache needs a mask, which costs a few percent itself."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens to be run, of which the first ``length`` are prompt, and their steering.

    ``thinking`` says of the last prompt token and those after it which are reasoning (empty: none).
    """

    token_ids: tuple[int, ...]
    length: int
    steering: tuple[Instruction, ...] = ()
    thinking: Sequence[bool] = ()

    @property
    def steering_of_prompt(self) -> tuple[Instruction, ...]:
        """The instructions that change a prompt before its last token."""
        return tuple(i for i in self.steering if PROMPT in ROLES_OF[i.positions])

    def beginning(self, tokens: int) -> Prompt:
        """Return the first ``tokens`` of it, none of which is the prompt's last."""
        return Prompt(
            token_ids=self.token_ids[:tokens],
            length=tokens + 1,
            steering=self.steering_of_prompt,
        )


@dataclass(eq=False)
class Prefilled:
    """Prompts in a cache: row ``k`` is the prompt number ``order[k]``, padded on the left.

    ``logits`` float32 ``[R, V]`` follow the last token of each row; ``steerer`` has counted what
    was steered so far. ``projections`` has what a probe measured, for each row ``[tokens, D]`` from
    the last prompt token on.
    """

    order: list[int]
    cache: RowCache | StateCache
    steerer: Steerer
    logits: torch.Tensor
    projections: list[np.ndarray] = field(default_factory=list)

    def join(self, other: Prefilled) -> None:
        """Append the rows of ``other``."""
        assert isinstance(self.cache, RowCache), "rows join a row cache only"
        assert isinstance(other.cache, RowCache), "rows join a row cache only"
        self.order += other.order
        self.cache.join(other.cache)
        self.steerer.join(other.steerer)
        self.logits = torch.cat([self.logits, other.logits])
        self.projections += other.projections


@torch.inference_mode()
def prefill(
    model: CausalModel, prompts: Sequence[Prompt], *, probe: Probe | None = None
) -> Prefilled:
    """Run prompts, as many in one pass as the model's limits allow, each measured by ``probe``.

    Prompts must have one length where ``model.row_cache`` is False; they then run in one pass.
    """
    heads, head_of = _heads(prompts) if _can_share(model, prompts) else ([], {})
    before = prefill(model, heads) if heads else None
    row_of = {head: row for row, head in enumerate(before.order)} if before else {}
    result: Prefilled | None = None
    for chunk in _chunks(model, prompts, heads, head_of):
        if before is not None and chunk[0] in head_of:
            rows = [row_of[head_of[number]] for number in chunk]
            lengths = [len(heads[head_of[number]].token_ids) for number in chunk]
            part = _run(model, prompts, chunk, probe=probe, behind=(before, rows, lengths))
        else:
            part = _run(model, prompts, chunk, probe=probe)
        if result is None:
            result = part
        else:
            result.join(part)
    assert result is not None, "there is a prompt"
    return result


def _can_share(model: CausalModel, prompts: Sequence[Prompt]) -> bool:
    """Whether keys and values are all that is kept, and no window counts the padding inside."""
    if not model.row_cache or len(prompts) < 2:
        return False
    longest = max(len(prompt.token_ids) for prompt in prompts)
    windows = (getattr(model.config, name, None) for name in _WINDOWS)
    return all(window is None or longest < window for window in windows)


_WINDOWS = ("sliding_window", "attention_chunk_size")


def _heads(prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[int, int]]:
    """Return the beginnings to run first, and the number of the beginning of a prompt that has one.

    A beginning ends before the last token of prompt and sequence, so that every row has logits of
    its own, and it holds what no other steering changes.
    """
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        alike[tuple(i.fingerprint for i in prompt.steering_of_prompt)].append(number)
    heads: list[Prompt] = []
    head_of: dict[int, int] = {}
    for numbers in alike.values():
        bodies = [
            prompts[n].token_ids[: min(prompts[n].length, len(prompts[n].token_ids)) - 1]
            for n in numbers
        ]
        for group in common_beginnings(bodies):
            for member in group.members:
                head_of[numbers[member]] = len(heads)
            heads.append(prompts[numbers[group.members[0]]].beginning(group.length))
    saved = sum(len(heads[head].token_ids) for head in head_of.values())
    saved -= sum(len(head.token_ids) for head in heads)
    if saved < _LEAST_SHARE * sum(len(prompt.token_ids) for prompt in prompts):
        return [], {}
    return heads, head_of


def _chunks(
    model: CausalModel,
    prompts: Sequence[Prompt],
    heads: Sequence[Prompt],
    head_of: dict[int, int],
) -> Iterator[list[int]]:
    """Yield the numbers of prompts that run together: with a beginning or without, by length."""
    rest = {
        number: len(prompt.token_ids)
        - (len(heads[head_of[number]].token_ids) if number in head_of else 0)
        for number, prompt in enumerate(prompts)
    }
    for numbers in (list(head_of), [n for n in rest if n not in head_of]):
        queue = iter(sorted(numbers, key=lambda number: -rest[number]))
        for first in queue:
            most = max(model.limits.prefill_tokens // rest[first], 1)
            count = most if model.row_cache else len(prompts)
            yield [first, *islice(queue, count - 1)]


def _run(
    model: CausalModel,
    prompts: Sequence[Prompt],
    chunk: list[int],
    *,
    probe: Probe | None = None,
    behind: tuple[Prefilled, list[int], list[int]] | None = None,
) -> Prefilled:
    """Run a chunk, from the start or ``behind`` rows of a cache with so many tokens each."""
    rows = [prompts[number] for number in chunk]
    steerer = Steerer(model.decoder, [row.steering for row in rows])
    starts = [0] * len(rows)
    cache: RowCache | StateCache = model.new_cache()
    if behind is not None:
        before, owners, starts = behind
        assert isinstance(before.cache, RowCache), "rows of other caches do not share"
        cache = before.cache.selected(owners)
        cache.drop_columns(cache.columns - max(starts))
        steerer.count_on(before.steerer, owners)
    ids, real, positions = left_padded(
        [row.token_ids[start:] for row, start in zip(rows, starts, strict=True)],
        pad_id=model.pad_id,
        device=model.device,
    )
    earlier = torch.tensor(starts, device=ids.device)
    lengths = torch.tensor([row.length for row in rows], device=ids.device)
    roles = roles_by_length(real, lengths, earlier=earlier)
    if any(any(row.thinking) for row in rows):
        reasoning = torch.zeros_like(real)
        for row, marks in zip(rows, reasoning, strict=True):
            if row.thinking:  # the last tokens of the row: it is padded on the left
                marks[len(marks) - len(row.thinking) :] = torch.tensor(row.thinking)
        roles = with_reasoning(roles, reasoning)
    steerer.set_roles(roles)
    past = torch.arange(max(starts), device=ids.device) >= max(starts) - earlier[:, None]
    seen = torch.cat([past, real], dim=1)
    logits = model.forward(
        ids,
        mask=None if bool(seen.all()) else seen,
        positions=positions + earlier[:, None],
        cache=cache,
        steerer=steerer,
        probe=probe,
    )
    projections = []
    if probe is not None:
        for row, values in zip(rows, probe.take(), strict=True):  # [T, D], padded on the left
            projections.append(values[len(values) - len(row.token_ids) + row.length - 1 :])
    if isinstance(cache, RowCache) and behind is not None and not bool(real.all()):
        cache.close_gaps(seen)
    return Prefilled(chunk, cache, steerer, logits, projections)

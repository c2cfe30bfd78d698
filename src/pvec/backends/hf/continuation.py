"""Exact log-probabilities of many short continuations, all in one pass over a tree.

The continuations of a prompt ("0" … "100", each with an end of turn) begin alike and form a tree
whose nodes are run as one block behind the prompt's cache: every node sees the prompt and its own
ancestors. What all prompts begin with (a judge's rubric) is run once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from pvec.backends.hf.attention import ready_masks
from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.kvcache import RowCache
from pvec.errors import ModelError
from pvec.models.memory import run_in_batches

_WORTH_SHARING = 16
"""Common prompt beginnings shorter than this are not worth a pass of their own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tree:
    """Continuations as a tree below the last prompt token (node 0).

    ``tokens[n]`` and ``depth[n]`` describe node ``n``; ``sees[n, m]`` says that ``m`` is ``n`` or
    an ancestor of it. A continuation is the sum of ``log P(edge_token | edge_node)`` over the edges
    whose ``edge_owner`` it is.
    """

    tokens: list[int]
    depth: torch.Tensor  # [N]
    sees: torch.Tensor  # bool [N, N]
    edge_node: torch.Tensor  # [E]
    edge_token: torch.Tensor  # [E]
    edge_owner: torch.Tensor  # [E]

    @property
    def size(self) -> int:
        return len(self.tokens)


def continuation_logprobs(
    model: CausalModel,
    prompts: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[int, ...]],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(prompt index, log P of every continuation)``; see ``Backend``."""
    tree = _tree(continuations)
    deepest = int(tree.depth.max())
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ModelError(f"Prompt {index} is empty: give it at least one token.")
        if model.context is not None and len(prompt) + deepest > model.context:
            raise ModelError(
                f"Prompt {index} has {len(prompt)} tokens and does not fit the model's context of "
                f"{model.context} with its continuations: shorten it."
            )
    scorer: _Scorer | _PlainScorer
    if model.row_cache:
        scorer = _Scorer(model, tree, len(continuations), _common_prefix(prompts))
    else:
        scorer = _PlainScorer(model, continuations)
    yield from run_in_batches(
        sorted(range(len(prompts)), key=lambda index: -len(prompts[index])),
        lambda queue: _take(queue, prompts, tree, model),
        lambda now: scorer.score([prompts[index] for index in now]),
        limits=model.limits,
        notify=model.notify,
        unit="prompts",
        describe=lambda index: f"a prompt of {len(prompts[index])} tokens",
    )


def _take(
    queue: deque[int],
    prompts: Sequence[tuple[int, ...]],
    tree: _Tree,
    model: CausalModel,
) -> list[int]:
    """Take the longest prompts that fit: by cache, by tokens in one pass and by logits kept."""
    width, limits = len(prompts[queue[0]]) + tree.size, model.limits
    most = min(
        limits.rows,
        limits.cached_tokens // width,
        max(limits.prefill_tokens // tree.size, limits.prefill_tokens // width),
        limits.logits // (tree.size * model.vocab_size),
    )
    return [queue.popleft() for _ in range(min(max(most, 1), len(queue)))]


class _Scorer:
    """Runs prompts and their trees; keeps the cache of what all prompts begin with."""

    def __init__(
        self, model: CausalModel, tree: _Tree, continuations: int, prefix: tuple[int, ...]
    ) -> None:
        self._model = model
        self._tree = tree
        self._continuations = continuations
        self._prefix = prefix
        self._prefix_cache: RowCache | None = None

    @torch.inference_mode()
    def score(self, prompts: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Return one float32 ``[C]`` per prompt."""
        cache = self._prefilled(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._model.device)
        logits = self._run_tree(prompts, lengths, cache)  # [B, N, V]
        tree = self._tree
        node, token = tree.edge_node.to(logits.device), tree.edge_token.to(logits.device)
        edges = logits[:, node, token] - logits.logsumexp(dim=-1)[:, node]  # [B, E]
        sums = torch.zeros(len(prompts), self._continuations, device=logits.device)
        sums.index_add_(1, tree.edge_owner.to(logits.device), edges)
        return list(sums.cpu().numpy())

    def _prefilled(self, prompts: Sequence[tuple[int, ...]]) -> RowCache:
        """Return the cache of all but each prompt's last token, padded on the right.

        Right padding keeps column = position, so sliding windows need no care.
        """
        cache = self._shared(len(prompts))
        start = cache.columns
        bodies = [prompt[start:-1] for prompt in prompts]
        width = max(len(body) for body in bodies)
        if width == 0:
            return cache
        ids = torch.full((len(bodies), width), self._model.pad_id)
        real = torch.zeros(len(bodies), start + width, dtype=torch.bool)
        for row, body in enumerate(bodies):
            ids[row, : len(body)] = torch.tensor(body, dtype=torch.long)
            real[row, : start + len(body)] = True
        device = self._model.device
        positions = torch.arange(start, start + width, device=device).expand(len(bodies), width)
        padded = None if bool(real.all()) else real.to(device)
        self._model.forward(ids.to(device), mask=padded, positions=positions, cache=cache)
        return cache

    def _shared(self, rows: int) -> RowCache:
        if not self._prefix:
            return RowCache()
        if self._prefix_cache is None:
            cache = RowCache()
            ids = torch.tensor([self._prefix], device=self._model.device)
            positions = torch.arange(len(self._prefix), device=ids.device)[None]
            self._model.forward(ids, mask=None, positions=positions, cache=cache)
            self._prefix_cache = cache
        return self._prefix_cache.selected([0] * rows)

    def _run_tree(
        self, prompts: Sequence[tuple[int, ...]], lengths: torch.Tensor, cache: RowCache
    ) -> torch.Tensor:
        tree, device = self._tree, self._model.device
        ids = torch.tensor([tree.tokens] * len(prompts))
        ids[:, 0] = torch.tensor([prompt[-1] for prompt in prompts])
        query = (lengths - 1)[:, None] + tree.depth.to(device)  # [B, N] positions
        past = torch.arange(cache.columns, device=device).expand(len(prompts), -1)  # [B, K]
        known = (past < (lengths - 1)[:, None])[:, None, :].expand(-1, tree.size, -1)
        family = tree.sees.to(device).expand(len(prompts), -1, -1)
        visible = torch.cat([known, family], dim=2)  # [B, N, K + N]
        key = torch.cat([past, query], dim=1)  # [B, K + N]
        masks = ready_masks(
            self._model.config,
            visible,
            query=query,
            key=key,
            longest=int(key.max()),
            dtype=self._model.inner.dtype,
        )
        return self._model.forward(
            ids.to(device), mask=masks, positions=query, cache=cache, all_logits=True
        )


class _PlainScorer:
    """Runs every prompt with every continuation: for models whose layers keep other state."""

    def __init__(self, model: CausalModel, continuations: Sequence[tuple[int, ...]]) -> None:
        self._model = model
        self._continuations = continuations

    @torch.inference_mode()
    def score(self, prompts: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Return one float32 ``[C]`` per prompt; fillers come last, where no token sees them."""
        model, width = self._model, max(map(len, self._continuations))
        filled = [(*c, *(model.pad_id,) * (width - len(c))) for c in self._continuations]
        scores = []
        for prompt in prompts:
            ids = torch.tensor([(*prompt, *tokens) for tokens in filled], device=model.device)
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            logits = model.forward(
                ids, mask=None, positions=positions, cache=None, all_logits=True
            )[:, len(prompt) - 1 : -1]  # [C, W, V]
            tokens = ids[:, len(prompt) :, None]
            chosen = logits.gather(2, tokens)[..., 0] - logits.logsumexp(dim=-1)  # [C, W]
            real = torch.tensor([[i < len(c) for i in range(width)] for c in self._continuations])
            scores.append((chosen * real.to(chosen.device)).sum(dim=1).cpu().numpy())
        return scores


def _tree(continuations: Sequence[tuple[int, ...]]) -> _Tree:
    """Build the tree of all proper beginnings of the continuations."""
    number: dict[tuple[int, ...], int] = {(): 0}
    edges: list[tuple[int, int, int]] = []
    for owner, continuation in enumerate(continuations):
        for depth, token in enumerate(continuation):
            node = number.setdefault(continuation[:depth], len(number))
            edges.append((node, token, owner))
    beginnings = list(number)
    sees = torch.zeros(len(beginnings), len(beginnings), dtype=torch.bool)
    for node, beginning in enumerate(beginnings):
        for depth in range(len(beginning) + 1):
            sees[node, number[beginning[:depth]]] = True
    columns = torch.tensor(edges, dtype=torch.long).reshape(-1, 3).unbind(dim=1)
    return _Tree(
        tokens=[beginning[-1] if beginning else 0 for beginning in beginnings],
        depth=torch.tensor([len(beginning) for beginning in beginnings]),
        sees=sees,
        edge_node=columns[0],
        edge_token=columns[1],
        edge_owner=columns[2],
    )


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return what all prompts begin with, short of every prompt's last token."""
    if len(prompts) < 2:
        return ()
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return prompts[0][:shared] if shared >= _WORTH_SHARING else ()

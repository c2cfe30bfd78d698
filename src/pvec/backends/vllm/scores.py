"""Exact log-probabilities of continuations: one request per inner node of their tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pvec.backends.vllm.replicas import ReplicaPool
from pvec.backends.vllm.requests import EngineRequest

_MOST_TOKENS = 128
"""vLLM returns the log-probabilities of at most so many named tokens per request."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    """Ask for log P of ``tokens`` after a prompt and ``prefix``."""

    prompt: int
    prefix: tuple[int, ...]
    tokens: tuple[int, ...]


def continuation_logprobs(
    pool: ReplicaPool,
    prompts: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[int, ...]],
    *,
    adapter: str | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(prompt index, log P of every continuation)`` as prompts are result."""
    nodes = _nodes(continuations)
    known: dict[int, dict[tuple[int, ...], float]] = {i: {} for i in range(len(prompts))}
    left = dict.fromkeys(known, len(nodes))
    if not nodes:
        for index in known:
            yield index, np.zeros(len(continuations), dtype=np.float32)
        return
    engine_requests = (_request(index, node, prompts, adapter) for index in known for node in nodes)
    for result in pool.run(engine_requests):
        question: _Question = result.request.tag
        assert result.logprobs is not None, "the request asked for them"
        answer: Mapping[int, object] = result.logprobs[0]
        for token in question.tokens:
            known[question.prompt][(*question.prefix, token)] = answer[token].logprob  # type: ignore[attr-defined]
        left[question.prompt] -= 1
        if not left[question.prompt]:
            yield question.prompt, _total(known.pop(question.prompt), continuations)


def _request(
    index: int,
    node: tuple[tuple[int, ...], tuple[int, ...]],
    prompts: Sequence[tuple[int, ...]],
    adapter: str | None,
) -> EngineRequest:
    prefix, tokens = node
    return EngineRequest(
        tag=_Question(prompt=index, prefix=prefix, tokens=tokens),
        token_ids=(*prompts[index], *prefix),
        steered_prompt=len(prompts[index]),
        sampling={
            "temperature": 0.0,
            "max_tokens": 1,
            "ignore_eos": True,
            "logprob_token_ids": list(tokens),
        },
        adapter=adapter,
    )


def _nodes(
    continuations: Sequence[tuple[int, ...]],
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (prefix, children) of every inner node, children in portions vLLM accepts."""
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for continuation in continuations:
        for depth, token in enumerate(continuation):
            children.setdefault(continuation[:depth], {})[token] = None
    return [
        (prefix, tuple(tokens)[start : start + _MOST_TOKENS])
        for prefix, tokens in children.items()
        for start in range(0, len(tokens), _MOST_TOKENS)
    ]


def _total(
    known: Mapping[tuple[int, ...], float], continuations: Sequence[tuple[int, ...]]
) -> np.ndarray:
    return np.array(
        [sum(known[c[: depth + 1]] for depth in range(len(c))) for c in continuations],
        dtype=np.float32,
    )

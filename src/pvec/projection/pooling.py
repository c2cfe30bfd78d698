"""The turns of a conversation pooled: one mean over the tokens of all its answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pvec.types import SpanMeans, TokenSpans


def pool_turns(
    captured: Iterable[SpanMeans], rows: Sequence[Sequence[TokenSpans]]
) -> Iterator[SpanMeans]:
    """Yield one ``SpanMeans`` per row: the mean over the tokens of all its turns' spans."""
    tokens = {s.id: {name: b - a for name, (a, b) in s.spans.items()} for r in rows for s in r}
    turns: dict[str, list[SpanMeans]] = {}
    expected = {f"{number}:0": sum(bool(s.token_ids) for s in r) for number, r in enumerate(rows)}
    for item in captured:
        row = item.id.partition(":")[0] + ":0"
        turns.setdefault(row, []).append(item)
        if len(turns[row]) == expected[row]:
            done = turns.pop(row)
            means = {
                span: _weighted([t.means[span] for t in done], [tokens[t.id][span] for t in done])
                for span in item.means
            }
            yield SpanMeans(id=row, layers=item.layers, means=means, norms={})


def _weighted(means: Sequence[np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Return the mean of ``means`` ``[layers, H]`` by tokens; NaN where there are none."""
    kept = [(mean, n) for mean, n in zip(means, tokens, strict=True) if n]
    if not kept:
        return np.full_like(means[0], np.nan)
    arrays, weights = zip(*kept, strict=True)
    pooled: np.ndarray = np.average(np.stack(arrays).astype(np.float64), axis=0, weights=weights)
    return pooled

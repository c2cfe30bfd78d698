"""Mean activations of token spans, at the speed of the model's blocks.

Only embedding and blocks run. The hooks compute the means on the device in float32, so that only
``[rows, layers, H]`` is kept of a batch; it is copied to the host while the next batch runs.
Answers to the same prompt share its computation, and prompts that of their common beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from pvec.activations.batching import (
    Work,
    plan_window,
    prompt_length,
    rows_that_fit,
    windows,
)
from pvec.activations.prefix import can_share, continue_from
from pvec.activations.reduce import DoneError, PendingCopy, Reducer, Sums
from pvec.errors import InputError, ModelError, ModelMemoryError
from pvec.models.decoder import Decoder, find_decoder, recorded_layers
from pvec.models.memory import unless_out_of_memory
from pvec.steering.positions import roles_by_length
from pvec.steering.steerer import Steerer
from pvec.types import BY_SPAN, SpanMeans, SpanName, TokenSpans

_WINDOW_ROWS = 2048
"""Sequences held at once: enough for batches of equal lengths, and constant memory."""

_SPANS: tuple[SpanName, ...] = get_args(SpanName)

_Result = TypeVar("_Result")

OnRetry = Callable[[int], None]
"""Told the new token budget when a batch did not fit into memory and is tried again."""


def default_token_budget(device: torch.device) -> int:
    """Return how many tokens a forward holds unless told otherwise."""
    return 1024 if device.type == "cpu" else 16384  # a CPU is fastest within its cache


def capture_means(
    model: nn.Module,
    sequences: Iterable[TokenSpans],
    *,
    layers: Sequence[int] | None = None,
    token_budget: int | None = None,
    share_prompts: bool = True,
    on_retry: OnRetry | None = None,
    directions: np.ndarray | None = None,
) -> Iterator[SpanMeans]:
    """Yield the mean activation and mean residual norm of every span of every sequence.

    ``layers`` default to all, 0 … num_layers; row ``num_layers`` is the last block's output before
    the final norm. Sequences may be a stream of any length, come back in any order, and may carry
    steering. ``token_budget`` bounds the padded tokens of a forward; when memory runs out it is
    halved and ``on_retry`` is told. The same set of sequences gives bit-identical results.
    ``directions`` ``[len(layers), directions, H]`` are unit vectors on which every token of the
    ``response`` is projected inside the hooks (``SpanMeans.along``).

    Raises ``ModelError`` for a layer the model lacks or a sequence too long for it,
    ``ModelMemoryError`` when even a single sequence does not fit into memory, ``InputError`` for a
    span outside its sequence.

    >>> backend = pvec.HFBackend("tiny")
    >>> ids = tuple(backend.tokenizer("How do I rest? You could plan a walk.")["input_ids"])
    >>> answer = pvec.TokenSpans(id="a", token_ids=ids, spans={"response": (6, len(ids))})
    >>> (result,) = pvec.capture_means(backend.model, [answer], layers=[2, 3])
    >>> result.means["response"].shape  # layers, hidden size
    (2, 160)
    """
    decoder = find_decoder(model)
    chosen = recorded_layers(layers, decoder.num_layers)
    runner = CaptureRunner(
        decoder,
        layers=chosen,
        token_budget=token_budget or default_token_budget(decoder.device),
        share_prompts=share_prompts,
        on_retry=on_retry,
        directions=directions,
    )
    return runner.run(sequences)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prefix:
    """Computed prompts: their cache, their parts of the means, and their length."""

    cache: Cache
    sums: Sums
    length: int


class CaptureRunner:
    """Runs windows of sequences through the model's body and keeps only their means."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        layers: tuple[int, ...],
        token_budget: int,
        share_prompts: bool,
        on_retry: OnRetry | None,
        directions: np.ndarray | None = None,
    ) -> None:
        self._decoder = decoder
        self._layers = layers
        self._budget = token_budget
        self._share = share_prompts and decoder.keys_and_values_only
        self._on_retry = on_retry
        self._names: tuple[SpanName, ...] = _SPANS
        self._units: dict[int, torch.Tensor] = {}
        if directions is not None:
            units = torch.from_numpy(np.asarray(directions, dtype=np.float32)).to(decoder.device)
            self._units = dict(zip(layers, units, strict=True))

    def run(self, sequences: Iterable[TokenSpans]) -> Iterator[SpanMeans]:
        """Yield results one batch behind the device, so that it never waits for copy or caller."""
        pending: PendingCopy | None = None
        for window in windows(sequences, rows=_WINDOW_ROWS):
            for sequence in window:
                self._check(sequence)
            for batch, sums in self._window(window):
                previous, pending = pending, PendingCopy(batch, sums, self._names)
                if previous is not None:
                    yield from previous.wait(self._layers)
        if pending is not None:
            yield from pending.wait(self._layers)

    def _check(self, sequence: TokenSpans) -> None:
        self._decoder.check_tokens(sequence.token_ids, name=f"Sequence {sequence.id!r}")
        length = len(sequence.token_ids)
        for name, (start, stop) in sequence.spans.items():
            if not 0 <= start <= stop <= length:
                raise InputError(
                    f"Sequence {sequence.id!r} has {length} tokens but its {name} span is "
                    f"[{start}, {stop}): give spans inside the sequence."
                )
        limit = self._decoder.max_tokens
        if length == 0 or (limit is not None and length > limit):
            raise ModelError(
                f"Sequence {sequence.id!r} has {length} tokens but this model takes 1 to "
                f"{limit or 'any number'}: shorten or leave it out."
            )

    def _window(self, window: Sequence[TokenSpans]) -> Iterator[tuple[list[TokenSpans], Sums]]:
        self._names = tuple(n for n in _SPANS if any(n in s.spans for s in window))
        for work in plan_window(window, share=self._share):
            if work.length:
                yield from self._shared(work)
            else:
                yield from self._rows(work.groups, None)

    def _shared(self, work: Work) -> Iterator[tuple[list[TokenSpans], Sums]]:
        heads = [group[0] for group in work.groups]
        for start, stop, prefix in self._batches(
            [work.length] * len(heads),
            lambda a, b: self._prefill(heads[a:b], length=work.length),
        ):
            if prefix is None:  # the architecture keeps more than keys and values
                self._share = False
                yield from self._rows([[s] for group in work.groups[start:] for s in group], None)
                return
            yield from self._rows(work.groups[start:stop], prefix)

    def _rows(
        self, groups: list[list[TokenSpans]], prefix: _Prefix | None
    ) -> Iterator[tuple[list[TokenSpans], Sums]]:
        """Run every sequence of the groups, group ``k`` behind the computed prompt ``k`` if any."""
        owned = [(s, owner) for owner, group in enumerate(groups) for s in group]
        owned.sort(key=lambda pair: -len(pair[0].token_ids))
        rows = [s for s, _ in owned]
        owners = torch.tensor([owner for _, owner in owned], device=self._decoder.device)
        shared = prefix.length if prefix is not None else 0
        # a cached prompt token costs memory and attention, but no projection
        costs = [len(s.token_ids) - shared + shared // 4 for s in rows]

        def run(start: int, stop: int) -> Sums:
            if prefix is None:
                return self._forward(rows[start:stop], start=0)
            heads = [groups[owner][0] for _, owner in owned[start:stop]]
            shares = self._shares(rows[start:stop], heads, length=shared)
            sums = prefix.sums.of_rows(owners[start:stop], shares)
            if len(rows[start].token_ids) == shared:
                return sums  # the longest answer is empty
            cache = continue_from(prefix.cache, owners[start:stop])
            return sums.plus(self._forward(rows[start:stop], start=shared, cache=cache))

        for start, stop, sums in self._batches(costs, run):
            yield rows[start:stop], sums

    def _prefill(self, heads: list[TokenSpans], *, length: int) -> _Prefix | None:
        cache = DynamicCache(config=self._decoder.config)
        sums = self._forward(heads, start=0, stop=length, cache=cache)
        return _Prefix(cache=cache, sums=sums, length=length) if can_share(cache, length) else None

    def _batches(
        self, costs: Sequence[int], run: Callable[[int, int], _Result]
    ) -> Iterator[tuple[int, int, _Result]]:
        """Run rows ``[start, stop)`` after rows under the budget; halve it when memory runs out."""
        start = 0
        while start < len(costs):
            stop = start + rows_that_fit(costs[start:], token_budget=self._budget)
            result = unless_out_of_memory(partial(run, start, stop))
            if result is not None:
                yield start, stop, result[0]
                start = stop
                continue
            if stop - start == 1:
                raise ModelMemoryError(
                    f"A single sequence of about {costs[start]} tokens does not fit into the "
                    f"memory of {self._decoder.device}: use a smaller dtype or more devices."
                )
            used = (stop - start) * max(costs[start:stop])
            self._budget = max(1, min(self._budget, used) // 2)
            if self._on_retry is not None:
                self._on_retry(self._budget)

    def _forward(
        self,
        rows: Sequence[TokenSpans],
        *,
        start: int,
        stop: int | None = None,
        cache: Cache | None = None,
    ) -> Sums:
        """Run tokens ``[start, stop)`` of each row and return their parts of the means."""
        chunks = [row.token_ids[start:stop] for row in rows]
        width = max(len(chunk) for chunk in chunks)
        # Filled on the right, so under causal attention no real token ever sees a filler.
        ids = [
            chunk + (row.token_ids[-1],) * (width - len(chunk))
            for row, chunk in zip(rows, chunks, strict=True)
        ]
        weights = self._weights(rows, start=start, width=width)
        reducer = Reducer(self._layers, weights, self._units)
        steerer = self._steerer(rows, lengths=[len(p) for p in chunks], start=start)
        if steerer is None:
            reducer.stop_at = max(self._layers)
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(evaluating(self._decoder.body))
            if steerer is not None:
                stack.enter_context(steerer.attached())
            stack.enter_context(reducer.attached(self._decoder))
            with suppress(DoneError):
                self._decoder.body(
                    input_ids=torch.tensor(ids, device=self._decoder.device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        if steerer is not None:
            steerer.check_complete()
        return reducer.sums(self._decoder.device)

    def _weights(self, rows: Sequence[TokenSpans], *, start: int, width: int) -> torch.Tensor:
        """Return each token's share in each span's mean, float32 ``[B, S, T]``."""
        weights = np.zeros((len(rows), len(self._names), width), dtype=np.float32)
        for b, row in enumerate(rows):
            for s, name in enumerate(self._names):
                first, last = row.spans.get(name, (0, 0))
                if last > first:
                    inside = slice(max(first - start, 0), max(last - start, 0))
                    weights[b, s, inside] = 1.0 / (last - first)
        return torch.from_numpy(weights).to(self._decoder.device)

    def _shares(
        self, rows: Sequence[TokenSpans], heads: Sequence[TokenSpans], *, length: int
    ) -> torch.Tensor | None:
        """Return the token counts of the spans of ``heads`` over those of ``rows``, ``[B, S]``.

        Of spans that begin in the first ``length`` tokens, which both have; None where all of these
        are equal, as they are in equal prompts.
        """
        shares = np.ones((len(rows), len(self._names)), dtype=np.float32)
        for b, (row, head) in enumerate(zip(rows, heads, strict=True)):
            for s, name in enumerate(self._names):
                (first, last), (begin, end) = (x.spans.get(name, (0, 0)) for x in (row, head))
                if first < length and last > first:
                    shares[b, s] = (end - begin) / (last - first)
        return None if (shares == 1).all() else torch.from_numpy(shares).to(self._decoder.device)

    def _steerer(
        self, rows: Sequence[TokenSpans], *, lengths: list[int], start: int
    ) -> Steerer | None:
        if not any(row.steering for row in rows):
            return None
        if any(i.positions in BY_SPAN for row in rows for i in row.steering):
            raise InputError(
                "Activations cannot be captured under steering at positions think or answer: "
                "capture without steering, or at the positions response."
            )
        steerer = Steerer(self._decoder, [row.steering for row in rows])
        width = torch.arange(max(lengths))
        steerer.set_roles(
            roles_by_length(
                width < torch.tensor(lengths)[:, None],
                torch.tensor([prompt_length(row) for row in rows]),
                earlier=torch.full((len(rows),), start),
            )
        )
        return steerer


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off for a forward and leave every part in the mode it was in."""
    training = [m for m in module.modules() if m.training] if module.training else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

"""From hidden states to span means inside the hooks, and from the device to the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from pvec.models.decoder import Decoder
from pvec.types import SpanMeans, SpanName, TokenSpans


class DoneError(Exception):
    """Raised in the hook of the last requested layer: the blocks above it need not run."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Parts of span means of a batch: ``means`` ``[B, S, L, H]`` and ``norms`` ``[B, S, L]``.

    A span's part in one forward is its tokens' sum there over the *whole* span's token count, so
    parts from prompt and answer add up to the mean. ``along`` ``[B, T, L, V]`` holds every token's
    projections, where they are wanted.
    """

    means: torch.Tensor
    norms: torch.Tensor
    along: torch.Tensor | None = None

    def of_rows(self, rows: torch.Tensor, shares: torch.Tensor | None = None) -> Sums:
        """Return the parts of rows chosen by number, repeats allowed.

        ``shares`` ``[rows, S]`` multiply them: the spans' token counts in the row that was computed
        over those in the row that the part is for, where they differ.
        """
        along = None if self.along is None else self.along[rows]
        means, norms = self.means[rows], self.norms[rows]
        if shares is not None:
            means, norms = means * shares[..., None, None], norms * shares[..., None]
        return Sums(means, norms, along)

    def plus(self, other: Sums) -> Sums:
        """Return the sum of two parts of the same rows; the tokens of ``other`` follow."""
        along = None
        if self.along is not None and other.along is not None:
            along = torch.cat([self.along, other.along], dim=1)
        return Sums(self.means + other.means, self.norms + other.norms, along)


class Reducer:
    """The hooks of one forward: each reduces its layer to span means at once.

    ``units`` are directions by layer, ``[V, H]`` each, on which every token is projected too.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        weights: torch.Tensor,
        units: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        self.stop_at: int | None = None
        self._layers = layers
        self._units = units or {}
        self._along: dict[int, torch.Tensor] = {}
        self._weights = {weights.device: weights}  # [B, S, T], copied once to each other device
        self._means: dict[int, torch.Tensor] = {}
        self._norms: dict[int, torch.Tensor] = {}

    @contextmanager
    def attached(self, decoder: Decoder) -> Iterator[None]:
        """Attach the hooks and remove them at the end, whatever happens inside.

        With ``stop_at`` set the forward ends in ``DoneError`` after that layer.
        """
        with ExitStack() as hooks:
            for layer in set(self._layers):
                hooks.enter_context(decoder.on_layer(layer, partial(self._take, layer)))
            yield

    def _take(self, layer: int, hidden: torch.Tensor) -> None:
        if hidden.device not in self._weights:
            first = next(iter(self._weights.values()))
            self._weights[hidden.device] = first.to(hidden.device)
        weights = self._weights[hidden.device]
        norms = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)  # [B, T]
        wide = hidden.float()
        self._means[layer] = torch.bmm(weights, wide)  # [B, S, H]
        if layer in self._units:
            self._along[layer] = wide @ self._units[layer].to(wide.device).T  # [B, T, V]
        self._norms[layer] = torch.bmm(weights, norms[..., None])[..., 0]  # [B, S]
        if layer == self.stop_at:
            raise DoneError

    def sums(self, device: torch.device) -> Sums:
        """Return every layer's part, on one device, in the order of the requested layers."""
        means = [self._means[layer].to(device) for layer in self._layers]
        norms = [self._norms[layer].to(device) for layer in self._layers]
        along = [self._along[layer].to(device) for layer in self._layers] if self._along else None
        return Sums(
            torch.stack(means, dim=2),
            torch.stack(norms, dim=2),
            None if along is None else torch.stack(along, dim=2),
        )


class PendingCopy:
    """Results being copied to the host while the device computes the next batch."""

    def __init__(self, rows: list[TokenSpans], sums: Sums, names: tuple[SpanName, ...]) -> None:
        self._rows = rows
        self._names = names
        self._means = _to_host(sums.means)
        self._norms = _to_host(sums.norms)
        self._along = None if sums.along is None else _to_host(sums.along)
        self._copied: torch.Event | None = None
        if sums.means.is_cuda:
            self._copied = torch.Event(sums.means.device)
            self._copied.record()

    def wait(self, layers: tuple[int, ...]) -> Iterator[SpanMeans]:
        """Wait for the copy and yield each row's own arrays."""
        if self._copied is not None:
            self._copied.synchronize()
        means, norms = self._means.numpy(), self._norms.numpy()  # [B, S, L, H], [B, S, L]
        along = None if self._along is None else self._along.numpy()  # [B, T, L, V]
        for b, row in enumerate(self._rows):
            places = [(s, name) for s, name in enumerate(self._names) if name in row.spans]
            empty = {name for _, name in places if row.spans[name][0] == row.spans[name][1]}
            yield SpanMeans(
                id=row.id,
                layers=layers,
                means={n: _or_missing(means[b, s], missing=n in empty) for s, n in places},
                norms={n: _or_missing(norms[b, s], missing=n in empty) for s, n in places},
                along=None if along is None else along[b, slice(*row.answer_tokens)].copy(),
            )


def _or_missing(values: np.ndarray, *, missing: bool) -> np.ndarray:
    return np.full_like(values, np.nan) if missing else values.copy()


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

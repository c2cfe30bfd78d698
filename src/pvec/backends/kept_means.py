"""Mean activations of answers, kept during generation if the backend can, captured otherwise.

An engine that sums activations while generating saves the second pass over every answer. Which
answers count is known only after judging, so the means stay in a temporary file until then.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pvec.closing import Closing
from pvec.types import Generation, Request, SpanMeans, SpanName, TokenSpans

if TYPE_CHECKING:
    from pvec.backends.session import ModelSession

_SPANS: tuple[SpanName, ...] = ("prompt", "prompt_last", "response")


class KeptMeans(Closing):
    """Span means by answer in a temporary file, deleted on leaving the context."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._place: dict[str, int] = {}
        self._layers: tuple[int, ...] = ()
        self._shape: tuple[int, ...] = ()

    def put(self, means: SpanMeans) -> None:
        """Keep the means of one whole answer; every call brings the same layers."""
        self._layers = means.layers
        row = np.stack([np.c_[means.means[span], means.norms[span]] for span in _SPANS])
        self._place[means.id] = self._file.seek(0, 2)
        self._shape = row.shape  # [3, L + 1, H + 1]
        self._file.write(row.astype(np.float32).tobytes())

    def get(self, sequence: TokenSpans) -> SpanMeans | None:
        """Return the means of a sequence, or None when it must be captured.

        Means of whole answers are kept: a response without its think span must be captured.
        """
        whole = sequence.spans["response"][0] == sequence.spans["prompt"][1]
        if sequence.id not in self._place or not whole or sequence.steering:
            return None
        self._file.seek(self._place[sequence.id])
        count = int(np.prod(self._shape))
        flat = np.frombuffer(self._file.read(4 * count), dtype=np.float32)
        means, norms = np.split(flat.reshape(self._shape), [-1], axis=2)
        return SpanMeans(
            id=sequence.id,
            layers=self._layers,
            means=dict(zip(_SPANS, means, strict=True)),
            norms=dict(zip(_SPANS, norms[..., 0], strict=True)),
        )

    def close(self) -> None:
        """Delete them."""
        self._file.close()


def answers(session: ModelSession, requests: Sequence[Request]) -> Iterator[Generation]:
    """Generate; where the engine keeps means and its backend can, keep those of every answer."""
    backend, kept = session.backend, session.kept_means
    if kept is None or not backend.captures_while_generating:
        yield from backend.generate(requests)
        return
    for generation, means in backend.generate_and_capture(requests):
        kept.put(means)
        yield generation


def captured(session: ModelSession, sequences: Iterable[TokenSpans]) -> Iterator[SpanMeans]:
    """Yield the span means of each sequence; only those that were not kept are run."""
    kept, others = session.kept_means, []
    for sequence in sequences:
        means = kept.get(sequence) if kept is not None else None
        if means is None:
            others.append(sequence)
        else:
            yield means
    if others:
        yield from session.backend.capture(others)

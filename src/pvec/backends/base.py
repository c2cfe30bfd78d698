"""The contract between pvec and whatever runs the model.

A backend is a context manager around one loaded model. Both backends mean the same by every field
of the types in ``pvec.types``; a parity test says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from pvec.closing import Closing
from pvec.errors import InputError
from pvec.models.chat import spans_from_ids
from pvec.types import (
    Divergence,
    Generation,
    ModelInfo,
    Progress,
    Request,
    SpanMeans,
    StreamChunk,
    TokenSpans,
)

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from pvec.models.files import ModelSpec
    from pvec.models.load import ModelMetadata
    from pvec.settings import Settings

Item = TypeVar("Item")

NOT_FINITE = (
    "the logits after {} tokens are not finite numbers: the steering is too strong, or the number "
    "format too narrow"
)
"""``Generation.detail`` of an answer that failed, with its number of tokens."""


class Backend(Closing):
    """One loaded model that can generate, capture and score continuations.

    Every method streams: results come as they finish, in any order, each with the id of its
    request. A caller that stops iterating early leaves the model usable and without hooks.
    """

    info: ModelInfo
    tokenizer: PreTrainedTokenizerBase
    on_progress: Callable[[Progress], None] = staticmethod(lambda _progress: None)
    """Receives the progress of a running ``generate``: answers done; under ``extra`` the ``tokens``
    sampled so far and the ``rows`` running."""

    @classmethod
    @abstractmethod
    def from_settings(
        cls,
        spec: ModelSpec,
        settings: Settings,
        *,
        metadata: ModelMetadata | None = None,
        on_note: Callable[[str], None] | None = None,
        on_load: Callable[[Progress], None] | None = None,
    ) -> Self:
        """Load the model ``spec`` names, with the engine options of ``settings``.

        With ``metadata`` the model's files are not inspected again; ``on_note`` receives a sentence
        whenever something is chosen or changed for the user, ``on_load`` the progress of loading
        where it takes long.
        """

    @abstractmethod
    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield one ``Generation`` per request as it finishes.

        Requests may be ``Arrivals``: then those that arrive later join those that run. Raises
        ``SteeringError`` when the positions touched differ from those requested, and ``ModelError``
        for a prompt that leaves no room in the model's context.
        """

    def stream(self, requests: Iterable[Request]) -> Iterator[StreamChunk]:
        """Yield a ``StreamChunk`` for every new token of a few requests that run together.

        The last chunk of each carries its ``Generation``; a backend that cannot stream yields only
        that chunk. Raises as ``generate`` does.
        """
        for generation in self.generate(requests):
            yield StreamChunk(id=generation.id, token_ids=generation.token_ids, finished=generation)

    @property
    @abstractmethod
    def rows_at_once(self) -> int:
        """How many answers run at once, if they are short enough."""

    @property
    def captures_while_generating(self) -> bool:
        """Whether ``generate_and_capture`` takes one pass over every answer instead of two."""
        return False

    def generate_and_capture(
        self, requests: Iterable[Request], *, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[Generation, SpanMeans]]:
        """Yield every answer with its span means: prompt, last prompt token, whole response."""
        by_id = {request.id: request for request in requests}
        answers = {answer.id: answer for answer in self.generate(by_id.values())}
        sequences = (
            spans_from_ids(
                answer.id,
                prompt_ids=by_id[answer.id].prompt_ids,
                answer_ids=answer.token_ids,
                steering=by_id[answer.id].steering,
            )
            for answer in answers.values()
        )
        for means in self.capture(sequences, layers=layers):
            yield answers[means.id], means

    @abstractmethod
    def capture(
        self,
        sequences: Iterable[TokenSpans],
        *,
        layers: Sequence[int] | None = None,
        directions: np.ndarray | None = None,
    ) -> Iterator[SpanMeans]:
        """Yield the span means of each sequence for ``layers`` (default: all, 0 … num_layers).

        With ``directions`` (unit vectors ``[layers, directions, H]``) also the projections of every
        response token; only transformers can, other backends raise ``InputError``.
        """

    @abstractmethod
    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(prompt index, logprobs)`` with ``logprobs[c] = log P(continuation c | prompt)``.

        float32 ``[len(continuations)]``, exact over the full vocabulary, temperature 1.
        The local judge walks its digit tree with this.
        """

    def answer_logprobs(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(pair index, logprobs)`` for pairs of prompt ids and answer ids.

        ``logprobs[t] = log P(answer token t | prompt, answer tokens before it)``, float32
        ``[answer tokens]``, exact over the full vocabulary, temperature 1. Pairs with the same
        prompt share its computation. Raises ``ModelError`` for an empty prompt or answer, and for
        one that exceeds the model's context.
        """
        import numpy as np

        for index, (prompt, answer) in enumerate(pairs):
            openings = [answer[: length + 1] for length in range(len(answer))]
            ((_, sums),) = self.continuation_logprobs([prompt], openings)
            yield index, np.diff(sums, prepend=np.float32(0.0))

    def divergences(
        self,
        reference: TokenSpans,  # noqa: ARG002 (of backends that can)
        variants: Sequence[TokenSpans],  # noqa: ARG002
    ) -> Iterator[Divergence]:
        """Yield the ``Divergence`` of each of ``variants`` from ``reference``.

        All have the same response tokens; prompts and steering may differ. Raises ``ModelError``
        for responses that differ or are empty and for sequences that exceed the model's context,
        ``SteeringError`` as ``generate`` does, and ``InputError`` where the backend does not give
        whole distributions: only transformers does.
        """
        raise InputError(
            "This backend does not return the probabilities of the whole vocabulary for given "
            "tokens: use --backend hf."
        )

    def close(self) -> None:
        """Free the model. Called once, on leaving the context."""


class Arrivals(Iterable[Item], Generic[Item]):
    """Requests that arrive while others run: a backend takes what is there and goes on."""

    @abstractmethod
    def take(self, *, wait: bool) -> list[Item] | None:
        """Return what has arrived since the last call; None when nothing will follow.

        With ``wait`` it waits for the next item or the end, otherwise it may return an empty list.
        """

    def __iter__(self) -> Iterator[Item]:
        while (items := self.take(wait=True)) is not None:
            yield from items


class Given(Arrivals[Item]):
    """Items that are all there: the first ``take`` returns them."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items: list[Item] | None = list(items)

    def take(self, *, wait: bool) -> list[Item] | None:  # noqa: ARG002 (there is nothing to wait for)
        """Return all items, and None afterwards."""
        items, self._items = self._items, None
        return items or None


def arriving(items: Iterable[Item]) -> Arrivals[Item]:
    """Return ``items`` as arrivals."""
    return items if isinstance(items, Arrivals) else Given(items)

"""The transformers backend: any causal LM, on any device, steered and captured row by row."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pvec.activations.capture import capture_means
from pvec.backends.base import Backend
from pvec.backends.hf import answers, continuation, divergence, generation
from pvec.backends.hf.batch_check import check_batching
from pvec.backends.hf.forward import CausalModel, causal_model
from pvec.backends.hf.live import LiveBatch
from pvec.backends.hf.probe import Direction
from pvec.models.decoder import find_decoder
from pvec.models.files import ModelSpec
from pvec.models.load import LoadedModel, ModelMetadata, load_model
from pvec.settings import Settings
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

ENGINE = "hf"
"""Goes into response ids: the same request on another engine may give another text."""


class HFBackend(Backend):
    """One transformers model in this process.

    ``batch_size`` caps the rows of a batch (default: what memory allows, at most 512). ``on_note``
    receives a sentence whenever something is changed for the user (a smaller batch, a shorter
    answer); ``on_progress`` receives the state of a running ``generate`` after every step, and
    ``on_load`` that of loading where it takes long.
    """

    def __init__(
        self,
        model: str | ModelSpec | LoadedModel,
        *,
        metadata: ModelMetadata | None = None,
        batch_size: int | None = None,
        on_note: Callable[[str], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_load: Callable[[Progress], None] | None = None,
    ) -> None:
        """Load a model; with ``metadata`` its files are not inspected again."""
        if isinstance(model, str):
            model = ModelSpec(model=model)
        if isinstance(model, LoadedModel):
            loaded = model
        else:
            loaded = load_model(model, metadata=metadata, on_progress=on_load or self.on_progress)
        self.info = loaded.info
        self.token_budget: int | None = None  # of a capture's forward; None: by device
        self.tokenizer = loaded.tokenizer
        self.model: PreTrainedModel | None = loaded.model
        self.on_note = on_note or (lambda _note: None)
        self.on_progress = on_progress or self.on_progress
        self._causal: CausalModel | None = causal_model(loaded.model, loaded.tokenizer)
        self.limits = self._causal.limits
        if batch_size is not None:
            self.limits.rows = min(batch_size, self.limits.rows)

    @classmethod
    def from_settings(
        cls,
        spec: ModelSpec,
        settings: Settings,
        *,
        metadata: ModelMetadata | None = None,
        on_note: Callable[[str], None] | None = None,
        on_load: Callable[[Progress], None] | None = None,
    ) -> Self:
        """Load a model as the settings ask; see ``Backend.from_settings``."""
        options = settings.backend
        backend = cls(
            spec,
            metadata=metadata,
            batch_size=options.max_batch_rows,
            on_note=on_note,
            on_load=on_load,
        )
        backend.token_budget = options.token_budget
        if not options.cuda_graphs and backend._causal is not None:
            backend._causal = replace(backend._causal, fixed_shapes=False)
        return backend

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        batch_size: int | None = None,
    ) -> Self:
        """Return a backend around a model that is already loaded (PEFT wrappers included).

        Its fingerprint is empty, as the origin of the weights is unknown. The caller keeps
        the model, whose training mode is left as it is: put it into ``eval`` first.
        """
        decoder = find_decoder(model)
        info = ModelInfo(
            id=name,
            fingerprint="",
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(decoder.device),
        )
        loaded = LoadedModel(model=model, tokenizer=tokenizer, info=info)
        return cls(loaded, batch_size=batch_size)

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield one ``Generation`` per request as it finishes; see ``Backend.generate``."""
        return generation.generate(self._decoding_model(), requests, progress=self.on_progress)

    def stream(self, requests: Iterable[Request]) -> Iterator[StreamChunk]:
        """Yield a ``StreamChunk`` for every new token; see ``Backend.stream``."""
        return generation.stream(self._decoding_model(), list(requests))

    @property
    def rows_at_once(self) -> int:
        """How many answers the batch has room for."""
        return self.limits.rows

    def live(self, directions: Sequence[Direction] = ()) -> LiveBatch:
        """Return a batch that requests join and leave as it runs, projected on ``directions``."""
        return LiveBatch(self._decoding_model(), directions=directions)

    def capture(
        self,
        sequences: Iterable[TokenSpans],
        *,
        layers: Sequence[int] | None = None,
        directions: np.ndarray | None = None,
    ) -> Iterator[SpanMeans]:
        """Yield the span means of each sequence; see ``Backend.capture``."""
        assert self.model is not None, "the backend is closed"
        return capture_means(
            self.model,
            sequences,
            layers=layers,
            token_budget=self.token_budget,
            on_retry=self._note_retry,
            directions=directions,
        )

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(prompt index, logprobs)``; see ``Backend.continuation_logprobs``."""
        return continuation.continuation_logprobs(self._decoding_model(), prompts, continuations)

    def answer_logprobs(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(pair index, logprobs)``; see ``Backend.answer_logprobs``."""
        return answers.answer_logprobs(self._decoding_model(), pairs)

    def divergences(
        self, reference: TokenSpans, variants: Sequence[TokenSpans]
    ) -> Iterator[Divergence]:
        """Yield the ``Divergence`` of each variant; see ``Backend.divergences``."""
        return divergence.divergences(self._decoding_model(), reference, variants)

    def close(self) -> None:
        """Free the model and its memory."""
        self.model = None
        self._causal = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _decoding_model(self) -> CausalModel:
        """Return the model for the decode loops, after ``check_batching``, as it is set now."""
        assert self._causal is not None, "the backend is closed"
        causal = replace(self._causal, limits=self.limits, notify=self.on_note)
        self._causal = check_batching(causal)
        return self._causal

    def _note_retry(self, budget: int) -> None:
        self.on_note(f"out of memory: capturing with at most {budget} tokens at once")

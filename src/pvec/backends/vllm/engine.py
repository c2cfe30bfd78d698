"""``VLLMBackend``: the contract of ``pvec.backends.base`` on stock vLLM."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pvec.backends.base import Arrivals, Backend
from pvec.backends.vllm import scores
from pvec.backends.vllm.client import EngineClient
from pvec.backends.vllm.replicas import ReplicaPool, gpus_of
from pvec.backends.vllm.requests import (
    Adapters,
    Drawn,
    EngineResult,
    RequestBuilder,
    span_means,
    unknown_means,
    wrong_count,
)
from pvec.backends.vllm.selftest import prove
from pvec.backends.vllm.start import (
    capture_bytes,
    check_vllm,
    platform,
    start_engine,
    stop_engine,
    stop_ids,
    table_bytes,
)
from pvec.backends.vllm.weights import check_served_adapter
from pvec.errors import InputError, SteeringError
from pvec.models.decoder import recorded_layers
from pvec.models.files import ModelSpec
from pvec.models.load import ModelMetadata, inspect_model
from pvec.models.precision import choose_dtype
from pvec.models.weights import check_checkpoint
from pvec.settings.sections import VLLMSettings
from pvec.settings.tree import Settings
from pvec.types import Generation, ModelInfo, Progress, Request, SpanMeans, StreamChunk, TokenSpans

if TYPE_CHECKING:
    import torch

_MEGABYTE = 2**20


class VLLMBackend(Backend):
    """One model in a vLLM engine with pvec's probes on every layer.

    ``options`` say how the engine is started. ``on_note`` gets a sentence whenever something is
    done for the user on the way. A LoRA adapter that belongs to the model is served on its base.
    """

    def __init__(
        self,
        model: str | ModelSpec,
        *,
        options: VLLMSettings | None = None,
        metadata: ModelMetadata | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Start the engine and prove that steering holds in it.

        Raises ``InputError`` without a vLLM of the right version, ``ModelError`` when the model
        does not run on it, ``SteeringError`` when the self-test fails.
        """
        self.version = check_vllm()
        spec = ModelSpec(model=model) if isinstance(model, str) else model
        metadata = metadata or inspect_model(spec)
        check_checkpoint(metadata.files.folder, name=spec.model, pickle=spec.allow_pickle)
        options = options or VLLMSettings()
        if metadata.adapter is not None:
            options = options.model_copy(update={"max_loras": max(options.max_loras, 1)})
        self.options = options
        self._folder = metadata.files.folder
        self._checked_adapters: set[str] = set()
        self._check_adapters([metadata.adapter])
        self.on_note = on_note or (lambda _note: None)
        self.tokenizer = metadata.tokenizer
        device = platform()
        dtype, why = choose_dtype(spec.dtype, device)
        name = str(dtype).removeprefix("torch.")
        self._pool = ReplicaPool(
            [
                self._start(metadata, number, dtype=name, trust_code=spec.trust_remote_code)
                for number in range(options.data_parallel_size)
            ]
        )
        config = self._pool.clients[0].engine.vllm_config.model_config
        self.context: int = config.max_model_len
        try:
            self.info = self._inspect(metadata, dtype=dtype, why=why)
            self._requests = RequestBuilder(
                info=self.info,
                options=options,
                tokenizer=metadata.tokenizer,
                context=self.context,
                vocab=config.get_vocab_size(),
                stop_ids=sorted(stop_ids(metadata)),
            )
            for client in self._pool.clients:
                prove(client, self.info, vocab=self._requests.vocab, clamps=options.clamps)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_settings(
        cls,
        spec: ModelSpec,
        settings: Settings,
        *,
        metadata: ModelMetadata | None = None,
        on_note: Callable[[str], None] | None = None,
        on_load: Callable[[Progress], None] | None = None,  # noqa: ARG003 - vLLM reports none
    ) -> Self:
        """Start the engine as the settings ask; see ``Backend.from_settings``."""
        return cls(spec, options=settings.backend.vllm, metadata=metadata, on_note=on_note)

    def generate(
        self, requests: Iterable[Request], *, adapters: Adapters | None = None
    ) -> Iterator[Generation]:
        """Yield one ``Generation`` per request as it finishes; see ``Backend.generate``.

        ``adapters`` gives requests, by id, LoRA adapter folders of their own (None: the bare
        model); the others get the model's adapter, if it has one.
        """
        failed: list[Generation] = []
        for result in self._results(requests, failed, adapters=adapters):
            yield self._requests.answer(result)
        yield from failed

    def stream(self, requests: Iterable[Request]) -> Iterator[StreamChunk]:
        """Yield a ``StreamChunk`` for every new token; see ``Backend.stream``."""
        failed: list[Generation] = []
        runnable = self._runnable(requests, failed)
        drawn = (self._requests.for_request(r, stream=True) for r in runnable if r is not None)
        for result in self._run(drawn):
            yield self._requests.chunk(result)
        for answer in failed:
            yield StreamChunk(id=answer.id, token_ids=(), finished=answer)

    def generate_and_capture(
        self,
        requests: Iterable[Request],
        *,
        layers: Sequence[int] | None = None,
        adapters: Adapters | None = None,
    ) -> Iterator[tuple[Generation, SpanMeans]]:
        """Yield every answer with the means of its prompt, last prompt token and response.

        What ``generate`` and ``capture`` would give one after the other, in one pass. The response
        is the whole answer (a think span is part of it). Raises ``InputError`` under asynchronous
        scheduling, where the end-of-turn token would be summed too.
        """
        if not self.captures_while_generating:
            raise InputError(
                "Capture while generating needs backend.vllm.async_scheduling off: switch it off, "
                "or generate first and capture afterwards."
            )
        rows = recorded_layers(layers, self.info.num_layers)
        failed: list[Generation] = []
        for result in self._results(requests, failed, adapters=adapters, capture=True):
            generation = self._requests.answer(result)
            yield generation, self._means(result, rows, identity=generation.id)
        for answer in failed:
            yield answer, unknown_means(answer.id, rows, hidden_size=self.info.hidden_size)

    @property
    def rows_at_once(self) -> int:
        """How many requests the engines run at once."""
        return self.options.max_num_seqs * self.options.data_parallel_size

    @property
    def captures_while_generating(self) -> bool:
        """Whether ``generate_and_capture`` works: not under asynchronous scheduling."""
        return not self.options.async_scheduling

    def capture(
        self,
        sequences: Iterable[TokenSpans],
        *,
        layers: Sequence[int] | None = None,
        directions: np.ndarray | None = None,
    ) -> Iterator[SpanMeans]:
        """Yield the span means of each sequence; see ``Backend.capture``."""
        if directions is not None:
            raise InputError("vLLM keeps means, not single tokens: use --backend hf for them.")
        rows = recorded_layers(layers, self.info.num_layers)
        for result in self._run(map(self._requests.for_sequence, sequences)):
            sequence: TokenSpans = result.request.tag
            if result.high is not None and result.high != len(sequence.token_ids):
                raise wrong_count(sequence.id, result.high, len(sequence.token_ids))
            yield self._means(result, rows, identity=sequence.id)

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(prompt index, logprobs)``; see ``Backend.continuation_logprobs``.

        Every inner node of the continuations' tree is one request that samples one token and
        returns the log-probabilities of the node's children over the full vocabulary.
        """
        longest = max(map(len, continuations), default=0)
        for index, prompt in enumerate(prompts):
            self._requests.check_ids(f"prompt {index}", prompt, room=longest)
        return scores.continuation_logprobs(
            self._pool, prompts, continuations, adapter=self.info.adapter
        )

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        for client in self._pool.clients:
            if client.engine is not None:
                stop_engine(client.engine)
                client.engine = None
        gc.collect()

    def _start(
        self, metadata: ModelMetadata, number: int, *, dtype: str, trust_code: bool
    ) -> EngineClient:
        options = self.options
        gpus = options.tensor_parallel_size * options.pipeline_parallel_size
        with gpus_of(number, per_replica=gpus, replicas=options.data_parallel_size):
            engine = start_engine(metadata, options, dtype=dtype, trust_code=trust_code)
        return EngineClient(engine, options, window=2 * options.max_num_seqs)

    def _check_adapters(self, folders: Iterable[str | None]) -> None:
        """Refuse adapters that vLLM would not serve as peft does, each checked once."""
        for folder in set(folders) - self._checked_adapters:
            if folder is None or not self.options.max_loras:
                continue
            check_served_adapter(self._folder, Path(folder))
            self._checked_adapters.add(folder)

    def _run(self, requests: Iterable[Drawn]) -> Iterator[EngineResult]:
        """Yield results as requests finish; at the end check how many tokens were steered."""
        yield from self._pool.run(requests)
        self._check_proof()
        if self._requests.truncated:
            self.on_note(
                f"{self._requests.truncated} answers may be shorter than requested: the engine's "
                f"context is {self.context} tokens"
            )
            self._requests.truncated = 0

    def _runnable(
        self, requests: Iterable[Request | None], failed: list[Generation]
    ) -> Iterator[Request | None]:
        """Yield the requests to run; the answers to the others go into ``failed``."""
        for request in requests:
            answer = None if request is None else self._requests.overflow(request)
            if answer is None:
                yield request
            else:
                failed.append(answer)

    def _arriving(self, requests: Iterable[Request]) -> Iterator[Request | None]:
        """Yield requests as they come, None while none has come."""
        if not isinstance(requests, Arrivals):
            yield from requests
            return
        while (arrived := requests.take(wait=not self._pool.running)) is not None:
            yield from arrived or [None]

    def _results(
        self,
        requests: Iterable[Request],
        failed: list[Generation],
        *,
        adapters: Adapters | None,
        capture: bool = False,
    ) -> Iterator[EngineResult]:
        """Run requests and report each to ``on_progress``; only finished answers have tokens.

        The answers to those that must not run go into ``failed``.
        """
        self._check_adapters((adapters or {}).values())
        drawn = (
            None if r is None else self._requests.for_request(r, adapters=adapters, capture=capture)
            for r in self._runnable(self._arriving(requests), failed)
        )
        done = tokens = 0
        for result in self._run(drawn):
            done, tokens = done + 1, tokens + len(result.token_ids)
            extra = {"tokens": float(tokens), "rows": float(self._pool.running)}
            self.on_progress(Progress(stage="generate", done=done, total=None, extra=extra))
            yield result

    def _means(self, result: EngineResult, layers: tuple[int, ...], *, identity: str) -> SpanMeans:
        return span_means(result, layers, identity=identity, hidden_size=self.info.hidden_size)

    def _inspect(self, metadata: ModelMetadata, *, dtype: torch.dtype, why: str) -> ModelInfo:
        found = describe_workers(self._pool.call("pvec_describe"), num_layers=metadata.num_layers)
        memory = self._memory_note(metadata, dtype.itemsize, found)
        notes = (*metadata.notes, f"{str(dtype).removeprefix('torch.')}: {why}", memory)
        return metadata.info(dtype=dtype, device=str(found["device"]), notes=notes)

    def _memory_note(
        self, metadata: ModelMetadata, item_bytes: int, found: Mapping[str, Any]
    ) -> str:
        shape = {"num_layers": metadata.num_layers, "hidden_size": metadata.hidden_size}
        tables = table_bytes(self.options, item_bytes=item_bytes, **shape) // _MEGABYTE
        sums = capture_bytes(self.options, **shape) // _MEGABYTE
        return (
            f"vLLM {self.version}, {found['runner']} runner: {self.options.slots} steering slots "
            f"({tables} MiB), {self.options.captures} captures in flight ({sums} MiB)"
        )

    def _check_proof(self) -> None:
        """Compare what every probe counted on the device with what it should have steered."""
        for answer in self._pool.call("pvec_proof"):
            proof = json.loads(answer)
            wrong = {k: n for k, n in proof["counted"].items() if n != proof["expected"]}
            if wrong:
                raise SteeringError(
                    f"{proof['expected']} tokens were to be steered and the graph steered {wrong} "
                    f"(by layer): the compiled graph is not the one pvec asked for, delete vLLM's "
                    f"compile cache or use --backend hf."
                )


def describe_workers(answers: Iterable[str], *, num_layers: int) -> dict[str, Any]:
    """Return what the first worker found; ``SteeringError`` when a layer has no probe."""
    found = [json.loads(answer) for answer in answers]
    layers = {layer for worker in found for layer in worker["layers"]}
    missing = sorted(set(range(num_layers + 1)) - layers)
    if missing:
        raise SteeringError(
            f"vLLM's workers have no probe on layers {missing}: this model or this vLLM is not "
            f"supported, use --backend hf."
        )
    first: dict[str, Any] = found[0]
    return first

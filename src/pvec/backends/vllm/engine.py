"""``VLLMBackend``: the contract of ``pvec.backends.base`` on stock vLLM."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from pvec.backends.base import Backend
from pvec.backends.loading import ModelFacts, choose_dtype, inspect_model
from pvec.backends.modelfiles import ModelSpec
from pvec.backends.vllm import scores
from pvec.backends.vllm.costs import accumulator_rows, capture_bytes, table_bytes
from pvec.backends.vllm.fleet import Fleet, gpus_of
from pvec.backends.vllm.flow import Done, Flow, Job
from pvec.backends.vllm.results import answer_spans, span_means, wrong_count
from pvec.backends.vllm.selftest import prove
from pvec.backends.vllm.slots import Rows, Slots, cut
from pvec.backends.vllm.start import check_vllm, platform, start_engine, stop_ids
from pvec.backends.vllm.tables import removals_needed
from pvec.core.batching import prompt_length
from pvec.core.layers import check_layer
from pvec.core.plans import check_instruction
from pvec.core.positions import expected_touched
from pvec.errors import InputError, ModelError, SteeringError
from pvec.settings.tree import Settings, VLLMSettings
from pvec.types import (
    Generation,
    Instruction,
    ModelInfo,
    Request,
    SpanMeans,
    TokenSpans,
)

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
        facts: ModelFacts | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Start the engine and prove that steering holds in it.

        Raises ``InputError`` without a vLLM of the right version, ``ModelError`` when the model
        does not run on it, ``SteeringError`` when the self-test fails.
        """
        self.version = check_vllm()
        spec = ModelSpec(model=model) if isinstance(model, str) else model
        facts = facts or inspect_model(spec)
        options = options or VLLMSettings()
        if facts.adapter is not None:
            options = options.model_copy(update={"adapters": max(options.adapters, 1)})
        self.options = options
        self.on_note = on_note or (lambda _note: None)
        self.tokenizer = facts.tokenizer
        self._adapter = facts.adapter
        self._stop_ids = sorted(stop_ids(facts))
        device = platform()
        dtype, why = choose_dtype(spec.dtype, device)
        name = str(dtype).removeprefix("torch.")
        self._flow = Fleet(
            [
                self._start(facts, number, dtype=name, trust_code=spec.trust_remote_code)
                for number in range(options.data_parallel)
            ]
        )
        config = self._flow.flows[0].engine.vllm_config.model_config
        self.context: int = config.max_model_len
        self._vocab: int = config.get_vocab_size()
        found = self._describe(facts)
        self.info = ModelInfo(
            id=facts.id,
            fingerprint=facts.fingerprint,
            num_layers=facts.num_layers,
            hidden_size=facts.hidden_size,
            dtype=name,
            device=str(found["device"]),
            adapter=facts.adapter,
            bundled=facts.bundled,
            notes=(*facts.notes, f"{name}: {why}", self._memory_note(facts, dtype.itemsize, found)),
        )
        try:
            for flow in self._flow.flows:
                prove(flow, self.info, vocab=self._vocab, removals=options.removals)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_settings(
        cls,
        spec: ModelSpec,
        settings: Settings,
        *,
        facts: ModelFacts | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Self:
        """Start the engine as the settings ask; see ``Backend.from_settings``."""
        return cls(spec, options=settings.backend.vllm, facts=facts, on_note=on_note)

    def generate(
        self,
        requests: Iterable[Request],
        *,
        adapters: Mapping[str, str | None] | None = None,
    ) -> Iterator[Generation]:
        """Yield one ``Generation`` per request as it finishes; see ``Backend.generate``.

        ``adapters`` gives requests, by id, LoRA adapter folders of their own (None: the bare
        model); the others get the model's adapter, if it has one.
        """
        jobs = (self._generation_job(r, adapter=self._adapter_of(r, adapters)) for r in requests)
        for done in self._flow.run(jobs):
            yield self._generation(done)
        self._check_proof()

    def generate_and_capture(
        self,
        requests: Iterable[Request],
        *,
        layers: Sequence[int] | None = None,
        adapters: Mapping[str, str | None] | None = None,
    ) -> Iterator[tuple[Generation, SpanMeans]]:
        """Yield every answer with the means of its prompt, last prompt token and response.

        What ``generate`` and ``capture`` would give one after the other, in one pass. The response
        is the whole answer (a think span is part of it). Raises ``InputError`` under asynchronous
        scheduling, where the end-of-turn token would be summed too.
        """
        if self.options.async_scheduling:
            raise InputError(
                "Capture while generating needs backend.vllm.async_scheduling off: switch it off, "
                "or generate first and capture afterwards."
            )
        wanted = self._wanted(layers)
        jobs = (
            self._generation_job(r, adapter=self._adapter_of(r, adapters), capture=True)
            for r in requests
        )
        for done in self._flow.run(jobs):
            generation = self._generation(done)
            yield generation, span_means(done, wanted, identity=generation.id)
        self._check_proof()

    def capture(
        self, sequences: Iterable[TokenSpans], *, layers: Sequence[int] | None = None
    ) -> Iterator[SpanMeans]:
        """Yield the span means of each sequence; see ``Backend.capture``."""
        wanted = self._wanted(layers)
        for done in self._flow.run(self._capture_job(sequence) for sequence in sequences):
            sequence: TokenSpans = done.job.tag
            if done.high is not None and done.high != len(sequence.token_ids):
                raise wrong_count(sequence.id, done.high, len(sequence.token_ids))
            yield span_means(done, wanted, identity=sequence.id)
        self._check_proof()

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(prompt index, logprobs)``; see ``Backend.continuation_logprobs``.

        Every inner node of the continuations' tree is one request that samples one token and
        returns the log-probabilities of the node's children over the full vocabulary.
        """
        longest = max(map(len, continuations), default=0)
        for index, prompt in enumerate(prompts):
            self._check_ids(f"prompt {index}", prompt, room=longest)
        return scores.continuation_logprobs(
            self._flow, prompts, continuations, adapter=self._adapter
        )

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        for flow in self._flow.flows:
            if flow.engine is not None:
                flow.engine.engine_core.shutdown()
                flow.engine = None
        gc.collect()

    def _start(self, facts: ModelFacts, number: int, *, dtype: str, trust_code: bool) -> Flow:
        options = self.options
        gpus = options.tensor_parallel * options.pipeline_parallel
        with gpus_of(number, per_replica=gpus, replicas=options.data_parallel):
            engine = start_engine(facts, options, dtype=dtype, trust_code=trust_code)
        return Flow(
            engine,
            slots=Slots(options.slots),
            rows=Rows(accumulator_rows(options)),
            removals=options.removals,
            window=2 * options.max_seqs,
        )

    def _generation_job(
        self, request: Request, *, adapter: str | None, capture: bool = False
    ) -> Job:
        self._check_ids(request.id, request.prompt_ids, room=2 if capture else 1)
        self._check_plan(request.steering)
        prompt, sampling = len(request.prompt_ids), request.sampling
        # The last sampled token is never run: one more is asked for so that all of a cut answer is.
        limit = self._limit(request, capture=capture)
        return Job(
            tag=request,
            token_ids=request.prompt_ids,
            steered_prompt=prompt,
            sampling={
                "temperature": sampling.temperature,
                "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
                "seed": sampling.seed % 2**63 if sampling.temperature > 0 else None,
                "max_tokens": limit + 1 if capture else limit,
                "stop_token_ids": self._stop_ids,
                "ignore_eos": True,
            },
            plan=request.steering,
            segments=cut(answer_spans(prompt)) if capture else None,
            adapter=adapter,
        )

    def _limit(self, request: Request, *, capture: bool) -> int:
        """Return the most tokens of an answer: what was asked for, or what the context leaves."""
        room = self.context - len(request.prompt_ids) - (1 if capture else 0)
        return min(request.sampling.max_tokens, room)

    def _generation(self, done: Done) -> Generation:
        request: Request = done.job.tag
        sampled = len(done.token_ids)
        limit = self._limit(request, capture=done.job.segments is not None)
        tokens = done.token_ids[:-1] if done.stopped else done.token_ids
        stopped = done.stopped and sampled <= limit
        tokens = tokens[:limit]
        due = len(request.prompt_ids) + sampled - 1
        if done.high is not None and not self._right(done.high, due):
            raise wrong_count(request.id, done.high, due)
        return Generation(
            id=request.id,
            token_ids=tokens,
            text=str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)),
            finish_reason="stop" if stopped else "length",
            touched=tuple(
                expected_touched(
                    instruction.positions,
                    prompt_tokens=len(request.prompt_ids),
                    generated_tokens=sampled - 1,
                )
                for instruction in request.steering
            ),
        )

    def _right(self, high: int, due: int) -> bool:
        """Asynchronous scheduling runs a token more behind an answer that ended by itself."""
        return due <= high <= due + 1 if self.options.async_scheduling else high == due

    def _capture_job(self, sequence: TokenSpans) -> Job:
        self._check_ids(sequence.id, sequence.token_ids, room=1)
        self._check_plan(sequence.steering)
        for name, (start, stop) in sequence.spans.items():
            if not 0 <= start <= stop <= len(sequence.token_ids):
                raise InputError(
                    f"The {name} span {start}..{stop} of {sequence.id!r} lies outside its "
                    f"{len(sequence.token_ids)} tokens."
                )
        return Job(
            tag=sequence,
            token_ids=sequence.token_ids,
            steered_prompt=prompt_length(sequence),
            sampling={"temperature": 0.0, "max_tokens": 1, "ignore_eos": True},
            plan=sequence.steering,
            segments=cut(sequence.spans),
            adapter=self._adapter,
        )

    def _check_ids(self, identity: str, token_ids: Sequence[int], *, room: int) -> None:
        if not token_ids:
            raise ModelError(f"The prompt of {identity!r} is empty: give it at least one token.")
        if len(token_ids) + room > self.context:
            raise ModelError(
                f"The prompt of {identity!r} has {len(token_ids)} tokens and leaves no room for an "
                f"answer in the engine's context of {self.context}: shorten it, or raise "
                f"backend.vllm.max_model_len if the model allows more."
            )
        if not 0 <= min(token_ids) <= max(token_ids) < self._vocab:
            raise ModelError(
                f"The prompt of {identity!r} has a token id outside the model's vocabulary of "
                f"{self._vocab}: use the model's own tokenizer."
            )

    def _check_plan(self, plan: Sequence[Instruction]) -> None:
        if not plan:
            return
        for instruction in plan:
            check_instruction(instruction, self.info)
        if not self.options.slots:
            raise InputError(
                "This engine was started without steering: set backend.vllm.slots to 1 or more."
            )
        needed = removals_needed(plan)
        if needed > self.options.removals:
            raise InputError(
                f"{needed} ablate or cap instructions meet on one layer and this engine was "
                f"started for {self.options.removals}: set backend.vllm.removals to {needed}."
            )

    def _adapter_of(
        self, request: Request, adapters: Mapping[str, str | None] | None
    ) -> str | None:
        if adapters is None or request.id not in adapters:
            return self._adapter
        if adapters[request.id] is not None and not self.options.adapters:
            raise InputError(
                "This engine was started without adapters: set backend.vllm.adapters to the number "
                "of different ones."
            )
        return adapters[request.id]

    def _wanted(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        wanted = tuple(range(self.info.num_layers + 1) if layers is None else layers)
        for layer in wanted:
            if layer != 0:
                check_layer(layer, self.info.num_layers)
        return wanted

    def _describe(self, facts: ModelFacts) -> dict[str, Any]:
        """Ask the workers what they found; ``SteeringError`` when a layer has no probe."""
        found = [json.loads(answer) for answer in self._flow.call("pvec_describe")]
        layers = {layer for worker in found for layer in worker["layers"]}
        missing = sorted(set(range(facts.num_layers + 1)) - layers)
        if missing:
            raise SteeringError(
                f"vLLM's workers have no probe on layers {missing}: this model or this vLLM is not "
                f"supported, use --backend hf."
            )
        first: dict[str, Any] = found[0]
        return first

    def _memory_note(self, facts: ModelFacts, item_bytes: int, found: Mapping[str, Any]) -> str:
        shape = {"num_layers": facts.num_layers, "hidden_size": facts.hidden_size}
        tables = table_bytes(self.options, item_bytes=item_bytes, **shape) // _MEGABYTE
        sums = capture_bytes(self.options, **shape) // _MEGABYTE
        return (
            f"vLLM {self.version}, {found['runner']} runner: {self.options.slots} steering slots "
            f"({tables} MiB), {self.options.captures} captures in flight ({sums} MiB)"
        )

    def _check_proof(self) -> None:
        """Compare what every probe counted on the device with what it should have steered."""
        for answer in self._flow.call("pvec_proof"):
            proof = json.loads(answer)
            wrong = {k: n for k, n in proof["counted"].items() if n != proof["expected"]}
            if wrong:
                raise SteeringError(
                    f"{proof['expected']} tokens were to be steered and the graph steered {wrong} "
                    f"(by layer): the compiled graph is not the one pvec asked for, delete vLLM's "
                    f"compile cache or use --backend hf."
                )

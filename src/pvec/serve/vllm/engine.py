"""vLLM's asynchronous engine: every request brings its plan, every output is proven."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from pvec.backends.vllm.client import key_of_plan, plan_salt
from pvec.backends.vllm.packing import pack_plan
from pvec.backends.vllm.slots import Slots
from pvec.backends.vllm.worker import EXTRA
from pvec.serve.vllm.answers import TrackedAnswer
from pvec.steering.tables import plan_rows
from pvec.types import Instruction

_ADAPTER = 2**31 - 1
"""The number of the model's own adapter; vLLM's server numbers its others from 1."""

Begin = Callable[[Sequence[int], Any], list[TrackedAnswer]]
"""Gives the answers of a request with these prompt ids and ``SamplingParams``, or raises."""

Ended = Callable[[TrackedAnswer], None]
"""Called once with every answer that has ended, however it did."""


class SteeredLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's engine for its server, as vLLM's own until ``steer`` is called."""

    _pvec_begin: Begin | None = None

    def steer(
        self, *, begin: Begin, ended: Ended, slots: int, clamps: int, adapter: str | None
    ) -> None:
        """Steer and measure requests from now on; ``adapter`` is what they get by default."""
        self.pvec_waiting = 0
        self.pvec_running: dict[str, TrackedAnswer] = {}
        self._pvec_begin, self._pvec_ended = begin, ended
        self._pvec_slots, self._pvec_clamps = Slots(slots), clamps
        self._pvec_tables: dict[str, bytes] = {}
        self._pvec_freed = asyncio.Condition()
        self._pvec_numbers = itertools.count()
        self._pvec_batches: dict[int, list[TrackedAnswer]] = {}
        self._pvec_adapter = None if adapter is None else LoRARequest("pvec", _ADAPTER, adapter)
        self._pvec_intercept(self.output_processor)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """Return what generates answers, as ``AsyncLLM.generate`` does."""
        if self._pvec_begin is None:
            return super().generate(prompt, sampling_params, request_id, **options)
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if not ids:
            raise VLLMValidationError("pvec steers prompts of tokens only: send no embeddings.")
        answers = self._pvec_begin(ids, sampling_params)
        if options.get("lora_request") is None:
            options["lora_request"] = self._pvec_adapter
        return self._pvec_generate(prompt, sampling_params, request_id, answers, options)

    def pvec_table(self, plan: tuple[Instruction, ...]) -> bytes:
        """Return a plan as it goes to the workers; ``InputError`` for one they cannot follow."""
        if not plan:
            return b""
        key = key_of_plan(plan)
        if key not in self._pvec_tables:
            if len(self._pvec_tables) >= 2 * self._pvec_slots.capacity:
                self._pvec_tables.clear()
            self._pvec_tables[key] = pack_plan(plan_rows(plan, clamps=self._pvec_clamps))
        return self._pvec_tables[key]

    async def _pvec_generate(
        self,
        prompt: dict[str, Any],
        sampling_params: Any,
        request_id: str,
        answers: list[TrackedAnswer],
        options: dict[str, Any],
    ) -> AsyncIterator[Any]:
        ids, plan = prompt["prompt_token_ids"], answers[0].answer.request.steering
        key, batch = key_of_plan(plan), next(self._pvec_numbers)
        slot = 0
        try:
            if plan:
                slot = await self._pvec_slot(key)
                salt = f"{prompt.get('cache_salt') or ''}{plan_salt(key, len(ids))}"
                prompt = {**prompt, "cache_salt": salt}
            params = sampling_params.clone()
            # the last token is to be run too; where the context is full it is not
            room = self.model_config.max_model_len - len(ids)
            params.max_tokens = min(answers[0].answer.limit + 1, room)
            params.extra_args = {
                **(params.extra_args or {}),
                EXTRA: {
                    "slot": slot,
                    "prompt": len(ids),
                    "edges": [],
                    "rows": [0],
                    "plan": key,
                    "table": self.pvec_table(plan),
                    "batch": batch,
                },
            }
            self._pvec_batches[batch] = answers
            outputs = super().generate(prompt, params, request_id, **options)
            try:
                async for output in outputs:
                    yield output
            finally:
                await outputs.aclose()
        finally:
            self._pvec_batches.pop(batch, None)
            for answer in answers:
                self.pvec_running.pop(answer.id, None)
                if not answer.ended:
                    answer.reason = "error" if answer.error else "cancelled"
                    self._pvec_ended(answer)
            if slot:
                async with self._pvec_freed:
                    self._pvec_slots.release(key)
                    self._pvec_freed.notify_all()

    async def _pvec_slot(self, key: str) -> int:
        """Return a slot for a plan, when there is one."""
        self.pvec_waiting += 1
        try:
            async with self._pvec_freed:
                while (slot := self._pvec_slots.acquire(key, lambda _: None)) is None:
                    await self._pvec_freed.wait()
        finally:
            self.pvec_waiting -= 1
        return slot

    def _pvec_intercept(self, processor: Any) -> None:
        """Let the outputs of answers pass through ``TrackedAnswer`` on their way to vLLM."""
        add, process = processor.add_request, processor.process_outputs

        def add_request(
            request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None
        ) -> None:
            add(request, prompt, parent, index, queue)
            extra = getattr(request.sampling_params, "extra_args", None) or {}
            answers = self._pvec_batches.get(extra.get(EXTRA, {}).get("batch", -1))
            if answers is not None:
                answers[index].id = request.request_id
                self.pvec_running[request.request_id] = answers[index]

        def process_outputs(outputs: Sequence[Any], *args: Any, **options: Any) -> Any:
            seen: list[Any] = []
            going = {o.request_id for o in outputs if o.finish_reason is None}
            for output in outputs:
                answer = self.pvec_running.get(output.request_id)
                seen += [output] if answer is None else answer.take(output)
            processed = process(seen, *args, **options)
            for identity in {output.request_id for output in seen}:
                answer = self.pvec_running.get(identity)
                if answer is not None and identity not in processor.request_states:
                    del self.pvec_running[identity]
                    if not answer.ended:
                        self._pvec_ended(answer)
                    if answer.error is not None and identity in going:
                        processed.reqs_to_abort.append(identity)
            return processed

        processor.add_request, processor.process_outputs = add_request, process_outputs

"""Requests into the engine and results out of it.

Requests are admitted in order while there is room: a slot for their steering, rows for what they
capture. A request that finds none waits; none is dropped. Several streams may share one engine;
each gets its own results.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pvec.backends.vllm.packing import pack_plan, unpack
from pvec.backends.vllm.requests import END, Drawn, EngineRequest, EngineResult, not_finite
from pvec.backends.vllm.slots import Rows, Slots
from pvec.backends.vllm.start import accumulator_rows
from pvec.backends.vllm.token_rows import RequestMetadata
from pvec.backends.vllm.worker import EXTRA
from pvec.errors import ModelError, SteeringError
from pvec.settings.sections import VLLMSettings
from pvec.steering.tables import plan_rows
from pvec.types import Instruction

_FETCH_AT = 16
"""Finished requests whose counts are fetched together; one that captured is fetched at once."""

_PAUSE_SECONDS = 0.005


@dataclass(kw_only=True, eq=False)
class _Running:
    request: EngineRequest
    key: int
    mailbox: deque[EngineResult]
    engine_id: str
    plan_key: str | None
    rows: tuple[int, ...]
    output: Any = None

    @property
    def watched(self) -> bool:
        return self.plan_key is not None or bool(self.rows)


@dataclass(kw_only=True, eq=False)
class _WorkerResults:
    """What the workers returned for several finished requests."""

    counts: np.ndarray  # int64 [requests, 3]
    sums: np.ndarray  # float32 [layers, rows, H]
    stats: np.ndarray  # float32 [layers, rows, 2]
    place: Mapping[int, int] = field(default_factory=dict)  # row -> index


class EngineClient:
    """The traffic of one engine, which was started with ``options``.

    ``window``: most requests of a stream in the engine at once.
    """

    def __init__(self, engine: Any, options: VLLMSettings, *, window: int) -> None:
        self.engine = engine
        self.slots = Slots(options.slots)
        self.rows = Rows(accumulator_rows(options))
        self._clamps = options.clamps
        self._window = window
        self._keys = itertools.count(1)
        self._running: dict[str, _Running] = {}
        self._due: list[_Running] = []
        self._adapters: dict[str, Any] = {}
        self._dead = False
        self._spoiled: ModelError | None = None

    def run(self, requests: Iterable[Drawn]) -> Iterator[EngineResult]:
        """Yield results as requests finish; requests are drawn as there is room for them.

        None among them says that nothing more is there yet: the engine goes on with what it has.
        """
        if self._spoiled is not None:
            raise self._spoiled
        mailbox: deque[EngineResult] = deque()
        source = iter(requests)
        waiting = next(source, END)
        in_engine = 0
        try:
            while True:
                while (
                    isinstance(waiting, EngineRequest)
                    and in_engine < self._window
                    and self._admit(waiting, mailbox)
                ):
                    waiting, in_engine = next(source, END), in_engine + 1
                if mailbox:
                    done = mailbox.popleft()
                    in_engine -= done.finished
                    yield done
                elif waiting is END and not in_engine:
                    return
                elif waiting is None:
                    waiting = self._paused(source, mailbox, idle=not in_engine)
                else:
                    self._step(short=waiting is not END and in_engine < self._window)
        finally:
            self._abandon(mailbox)

    def _paused(
        self, source: Iterator[Drawn], mailbox: deque[EngineResult], *, idle: bool
    ) -> Drawn:
        """Go on with what runs, then look whether more requests have come."""
        if idle:
            time.sleep(_PAUSE_SECONDS)  # another engine has work
        else:
            self._step(short=False)
        return None if mailbox else next(source, END)

    @property
    def running(self) -> int:
        """How many requests are in the engine, those that wait there for room included."""
        return len(self._running)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a ``pvec_*`` method on every worker and return what each gives."""
        with self._alive():
            answers: list[Any] = self.engine.collective_rpc(method, args=args)
        return answers

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Turn the end of an engine's process into one sentence."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            self._dead = True
            raise ModelError(
                "A worker of the vLLM engine died (its own message is above): what was finished is "
                "kept, run the same command again to go on where it stopped."
            ) from error

    def _admit(self, request: EngineRequest, mailbox: deque[EngineResult]) -> bool:
        """Put a request into the engine; False when it must wait for a slot or rows."""
        plan_key = key_of_plan(request.plan) if request.plan else None
        needed = len(request.segments.covered) if request.segments else 0
        rows = self.rows.acquire(needed)
        if rows is None:
            return False
        slot = 0
        if plan_key is not None:
            acquired = self.slots.acquire(plan_key, lambda place: self._load(place, request.plan))
            if acquired is None:
                self.rows.release(rows)
                return False
            slot = acquired
        key = next(self._keys)
        running = _Running(
            request=request,
            key=key,
            mailbox=mailbox,
            engine_id=f"pvec-{key}",
            plan_key=plan_key,
            rows=rows,
        )
        self._running[running.engine_id] = running
        metadata = RequestMetadata(
            key=key,
            slot=slot,
            prompt=request.steered_prompt,
            edges=request.segments.edges if request.segments else (),
            rows=request.segments.rows(rows) if request.segments else (0,),
        )
        self._submit(running, metadata)
        return True

    def _submit(self, running: _Running, metadata: RequestMetadata) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request = running.request
        params = SamplingParams(
            **request.sampling,
            detokenize=False,
            output_kind=(
                RequestOutputKind.CUMULATIVE if request.stream else RequestOutputKind.FINAL_ONLY
            ),
            extra_args={EXTRA: asdict(metadata)} if running.watched else None,
        )
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(request.token_ids)}
        salt = _salt(running)
        if salt is not None:
            prompt["cache_salt"] = salt
        with self._alive():
            self.engine.add_request(
                running.engine_id, prompt, params, lora_request=self._adapter(request.adapter)
            )

    def _adapter(self, path: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if path is None:
            return None
        if path not in self._adapters:
            number = len(self._adapters) + 1
            self._adapters[path] = LoRARequest(f"adapter-{number}", number, path)
        return self._adapters[path]

    def _load(self, slot: int, plan: tuple[Instruction, ...]) -> None:
        self.call("pvec_load", slot, pack_plan(plan_rows(plan, clamps=self._clamps)))

    def _step(self, *, short: bool) -> None:
        """Run the engine one step; ``short``: a request waits for what finished ones still hold."""
        with self._alive():
            outputs = self.engine.step()
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            self._spoiled = self._spoiled or not_finite(running.request, output.outputs[0])
            if self._spoiled is not None:
                raise self._spoiled
            if not output.finished:
                tokens = tuple(output.outputs[0].token_ids)
                so_far = EngineResult(request=running.request, token_ids=tokens, finished=False)
                running.mailbox.append(so_far)
                continue
            del self._running[output.request_id]
            running.output = output
            if running.watched:
                self._due.append(running)
            else:
                running.mailbox.append(_done(running))
        urgent = short or any(running.rows for running in self._due)
        if self._due and (urgent or len(self._due) >= _FETCH_AT or not self._running):
            self._settle()

    def _settle(self) -> None:
        """Fetch the counts of finished requests, hand them over and free what they held."""
        due, self._due = self._due, []
        results = self._fetch(due)
        for place, running in enumerate(due):
            self._free(running)
            running.mailbox.append(_done(running, results=results, place=place))

    def _fetch(self, finished: Sequence[_Running]) -> _WorkerResults:
        rows = [row for running in finished for row in running.rows]
        answers = [
            a for a in self.call("pvec_fetch", [r.key for r in finished], rows) if a is not None
        ]
        parts = sorted((unpack(answer) for answer in answers), key=lambda p: int(p["layers"][0]))
        return _WorkerResults(
            counts=parts[0]["counts"],
            sums=np.concatenate([part["sums"] for part in parts]),
            stats=np.concatenate([part["stats"] for part in parts]),
            place={row: index for index, row in enumerate(rows)},
        )

    def _free(self, running: _Running) -> None:
        if running.plan_key is not None:
            self.slots.release(running.plan_key)
        self.rows.release(running.rows)

    def _abandon(self, mailbox: deque[EngineResult]) -> None:
        """Take out of the engine what a stream that is left early still has in it."""
        unfinished = [r for r in self._running.values() if r.mailbox is mailbox]
        late = [r for r in self._due if r.mailbox is mailbox]
        if self._dead or not (unfinished or late):
            return
        if unfinished:
            self.engine.abort_request([running.engine_id for running in unfinished])
        for running in unfinished:
            del self._running[running.engine_id]
        self._due = [r for r in self._due if r.mailbox is not mailbox]
        watched = [running for running in (*unfinished, *late) if running.watched]
        if watched:
            self._fetch(watched)
        for running in watched:
            self._free(running)


def _done(
    running: _Running, *, results: _WorkerResults | None = None, place: int = 0
) -> EngineResult:
    completion = running.output.outputs[0]
    high = None
    if results is not None:
        cached, high, gaps = results.counts[place].tolist()
        if cached < 0 or gaps:
            raise SteeringError(
                "A request went through the vLLM engine without being seen by pvec's worker "
                f"(counts {cached}, {high}, {gaps}): this vLLM is not supported, use --backend hf."
            )
    index = [results.place[row] for row in running.rows] if results else []
    return EngineResult(
        request=running.request,
        token_ids=tuple(completion.token_ids),
        stopped=completion.finish_reason == "stop",
        logprobs=completion.logprobs,
        high=high,
        sums=results.sums[:, index] if results and index else None,
        stats=results.stats[:, index] if results and index else None,
    )


def key_of_plan(plan: Sequence[Instruction]) -> str:
    """Return what tells a steering from every other."""
    return "-".join(instruction.fingerprint for instruction in plan)


def _salt(running: _Running) -> str | None:
    """Return what keeps a request from the cached blocks of others.

    Captured requests share with nobody (a cached token is never summed). Steered ones share with
    those of the same plan *and prompt length*: where the prompt ends decides who is steered.
    """
    if running.rows:
        return f"capture-{running.key}"
    if running.plan_key is None:
        return None
    return plan_salt(running.plan_key, running.request.steered_prompt)


def plan_salt(plan: str, prompt: int) -> str:
    """Return the salt of requests with this key of a plan and number of prompt tokens."""
    return f"{hashlib.sha256(plan.encode()).hexdigest()[:32]}-{prompt}"

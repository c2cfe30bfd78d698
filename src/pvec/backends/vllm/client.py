"""Requests into the engine and results out of it.

Jobs are admitted in order while there is room: a slot for their steering, rows for what they
capture. A job that finds none waits; none is dropped. Several streams may share one engine; each
gets its own results.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvec.backends.vllm.ledger import Ticket
from pvec.backends.vllm.slots import Rows, Segments, Slots
from pvec.backends.vllm.tables import pack_plan, plan_rows, unpack
from pvec.backends.vllm.worker import EXTRA
from pvec.errors import ModelError, SteeringError
from pvec.types import Instruction

_TAKE_AT = 16
"""Finished jobs whose accounts are fetched together; one that captured is fetched at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One request to the engine.

    ``steered_prompt`` is the number of tokens that are prompt to the steering; ``sampling`` are
    arguments of vLLM's ``SamplingParams``; ``tag`` is the caller's own; ``stream`` asks for what
    there is after every step.
    """

    tag: Any
    token_ids: Sequence[int]
    steered_prompt: int
    sampling: Mapping[str, Any]
    plan: tuple[Instruction, ...] = ()
    segments: Segments | None = None
    adapter: str | None = None
    stream: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """A finished job, or with ``finished`` False the tokens so far of a streamed one.

    ``high`` is the number of positions computed or read from the cache (None for a job that was
    neither steered nor captured).

    ``sums`` float32 ``[layers, segments, H]`` and ``stats`` float32 ``[layers, segments, 2]`` (sum
    of norms, number of tokens) for layers 0 … num_layers and the job's covered segments.
    """

    job: Job
    token_ids: tuple[int, ...]
    stopped: bool
    logprobs: Sequence[Any] | None
    high: int | None = None
    sums: np.ndarray | None = None
    stats: np.ndarray | None = None
    finished: bool = True


@dataclass(kw_only=True, eq=False)
class _Running:
    job: Job
    key: int
    mailbox: deque[Done]
    engine_id: str
    plan_key: str | None
    rows: tuple[int, ...]
    output: Any = None

    @property
    def watched(self) -> bool:
        return self.plan_key is not None or bool(self.rows)


@dataclass(kw_only=True, eq=False)
class _Books:
    """What the workers returned for several finished jobs."""

    accounts: np.ndarray  # int64 [jobs, 3]
    sums: np.ndarray  # float32 [layers, rows, H]
    stats: np.ndarray  # float32 [layers, rows, 2]
    place: Mapping[int, int] = field(default_factory=dict)  # row -> index


class Flow:
    """The traffic of one engine. ``window`` is the most jobs of a stream in the engine at once."""

    def __init__(
        self, engine: Any, *, slots: Slots, rows: Rows, removals: int, window: int
    ) -> None:
        self.engine = engine
        self.slots = slots
        self.rows = rows
        self._removals = removals
        self._window = window
        self._keys = itertools.count(1)
        self._running: dict[str, _Running] = {}
        self._due: list[_Running] = []
        self._adapters: dict[str, Any] = {}
        self._dead = False

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Yield every job as it finishes; jobs are drawn from the iterable as there is room."""
        mailbox: deque[Done] = deque()
        source = iter(jobs)
        waiting = next(source, None)
        mine = 0
        try:
            while True:
                while waiting is not None and mine < self._window and self._admit(waiting, mailbox):
                    waiting, mine = next(source, None), mine + 1
                if mailbox:
                    done = mailbox.popleft()
                    mine -= done.finished
                    yield done
                elif mine or waiting is not None:
                    self._step(short=waiting is not None and mine < self._window)
                else:
                    return
        finally:
            self._abandon(mailbox)

    @property
    def running(self) -> int:
        """How many jobs are in the engine, those that wait there for room included."""
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

    def _admit(self, job: Job, mailbox: deque[Done]) -> bool:
        """Put a job into the engine; False when it must wait for a slot or rows."""
        plan_key = _plan_key(job.plan) if job.plan else None
        needed = len(job.segments.covered) if job.segments else 0
        rows = self.rows.acquire(needed)
        if rows is None:
            return False
        slot = 0
        if plan_key is not None:
            found = self.slots.acquire(plan_key, lambda place: self._load(place, job.plan))
            if found is None:
                self.rows.release(rows)
                return False
            slot = found
        key = next(self._keys)
        running = _Running(
            job=job, key=key, mailbox=mailbox, engine_id=f"pvec-{key}", plan_key=plan_key, rows=rows
        )
        self._running[running.engine_id] = running
        ticket = Ticket(
            key=key,
            slot=slot,
            prompt=job.steered_prompt,
            edges=job.segments.edges if job.segments else (),
            rows=job.segments.rows(rows) if job.segments else (0,),
        )
        self._submit(running, ticket)
        return True

    def _submit(self, running: _Running, ticket: Ticket) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        job = running.job
        params = SamplingParams(
            **job.sampling,
            detokenize=False,
            output_kind=(
                RequestOutputKind.CUMULATIVE if job.stream else RequestOutputKind.FINAL_ONLY
            ),
            extra_args={EXTRA: ticket.as_args()} if running.watched else None,
        )
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": list(job.token_ids)}
        salt = _salt(running)
        if salt is not None:
            prompt["cache_salt"] = salt
        with self._alive():
            self.engine.add_request(
                running.engine_id, prompt, params, lora_request=self._adapter(job.adapter)
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
        self.call("pvec_load", slot, pack_plan(plan_rows(plan, removals=self._removals)))

    def _step(self, *, short: bool) -> None:
        """Run the engine one step; ``short``: a job waits for what finished ones still hold."""
        with self._alive():
            outputs = self.engine.step()
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            if not output.finished:
                running.mailbox.append(_so_far(running.job, output))
                continue
            del self._running[output.request_id]
            running.output = output
            if running.watched:
                self._due.append(running)
            else:
                running.mailbox.append(_done(running))
        urgent = short or any(running.rows for running in self._due)
        if self._due and (urgent or len(self._due) >= _TAKE_AT or not self._running):
            self._settle()

    def _settle(self) -> None:
        """Fetch the accounts of finished jobs, hand them over and free what they held."""
        due, self._due = self._due, []
        books = self._take(due)
        for place, running in enumerate(due):
            self._free(running)
            running.mailbox.append(_done(running, books=books, place=place))

    def _take(self, jobs: Sequence[_Running]) -> _Books:
        rows = [row for running in jobs for row in running.rows]
        answers = [a for a in self.call("pvec_take", [r.key for r in jobs], rows) if a is not None]
        parts = sorted((unpack(answer) for answer in answers), key=lambda p: int(p["layers"][0]))
        return _Books(
            accounts=parts[0]["accounts"],
            sums=np.concatenate([part["sums"] for part in parts]),
            stats=np.concatenate([part["stats"] for part in parts]),
            place={row: index for index, row in enumerate(rows)},
        )

    def _free(self, running: _Running) -> None:
        if running.plan_key is not None:
            self.slots.release(running.plan_key)
        self.rows.release(running.rows)

    def _abandon(self, mailbox: deque[Done]) -> None:
        """Take out of the engine what a stream that is left early still has in it."""
        mine = [r for r in self._running.values() if r.mailbox is mailbox]
        late = [r for r in self._due if r.mailbox is mailbox]
        if self._dead or not (mine or late):
            return
        if mine:
            self.engine.abort_request([running.engine_id for running in mine])
        for running in mine:
            del self._running[running.engine_id]
        self._due = [r for r in self._due if r.mailbox is not mailbox]
        watched = [running for running in (*mine, *late) if running.watched]
        if watched:
            self._take(watched)
        for running in watched:
            self._free(running)


def _so_far(job: Job, output: Any) -> Done:
    tokens = tuple(output.outputs[0].token_ids)
    return Done(job=job, token_ids=tokens, stopped=False, logprobs=None, finished=False)


def _done(running: _Running, *, books: _Books | None = None, place: int = 0) -> Done:
    completion = running.output.outputs[0]
    high = None
    if books is not None:
        cached, high, gaps = books.accounts[place].tolist()
        if cached < 0 or gaps:
            raise SteeringError(
                "A request went through the vLLM engine without being seen by pvec's worker "
                f"(account {cached}, {high}, {gaps}): this vLLM is not supported, use --backend hf."
            )
    index = [books.place[row] for row in running.rows] if books else []
    return Done(
        job=running.job,
        token_ids=tuple(completion.token_ids),
        stopped=completion.finish_reason == "stop",
        logprobs=completion.logprobs,
        high=high,
        sums=books.sums[:, index] if books and index else None,
        stats=books.stats[:, index] if books and index else None,
    )


def _plan_key(plan: Sequence[Instruction]) -> str:
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
    digest = hashlib.sha256(running.plan_key.encode()).hexdigest()[:32]
    return f"{digest}-{running.job.steered_prompt}"

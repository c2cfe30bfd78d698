"""Requests answered by transformers: answers begun in the live batch, and what comes of them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.session import ModelSession
from pvec.errors import InputError, PvecError
from pvec.models.chat import encode_prompt
from pvec.models.template import render_prompt
from pvec.serve.answers import Answer, Delta, Outcome
from pvec.serve.engine import Engine
from pvec.serve.engine_thread import EngineThread
from pvec.serve.log import AnswerLog
from pvec.serve.pool_engine import PoolEngine
from pvec.serve.protocol import ApiError, Body, ChatBody, CompletionBody
from pvec.serve.rules import Plan, Rules
from pvec.serve.service import Job, Service, new_id
from pvec.serve.text import AnswerText
from pvec.types import Request, Sampling

Event = Delta | Outcome


@dataclass(eq=False, kw_only=True)
class HFJob(Job):
    """The answers of one HTTP request, and what happens to them."""

    model: str
    body: Body
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    """What happens; None: its time is over."""
    timer: asyncio.TimerHandle | None = None
    created: int = field(default_factory=lambda: int(time.time()))


class HFService(Service):
    """A model in transformers. Made inside the event loop that serves it."""

    def __init__(
        self, session: ModelSession, rules: Rules, *, name: str, log: AnswerLog | None
    ) -> None:
        super().__init__(session, rules, name=name, log=log)
        self._jobs: dict[Answer, HFJob] = {}
        self._loop = asyncio.get_running_loop()
        directions = [vector.direction for vector in rules.vectors.values()]
        backend = session.backend
        self._engine: EngineThread
        if isinstance(backend, PoolBackend):
            engine = self._engine = PoolEngine(backend, directions, deliver=self._deliver)
            self.metrics.gauge("pvec_workers", "Workers that answer", lambda: engine.workers)
        else:
            assert isinstance(backend, HFBackend)
            batch = backend.live(directions)
            self._engine = Engine(batch, backend.tokenizer, deliver=self._deliver)

    @property
    def running(self) -> int:
        """How many answers are in the batch."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """How many answers have no place in the batch yet."""
        return self._engine.waiting

    @property
    def active(self) -> int:
        """How many answers somebody waits for."""
        return len(self._jobs)

    @property
    def failure(self) -> PvecError | None:
        """Why no worker can answer any more."""
        return self._engine.failure

    def begin(self, body: Body) -> HFJob:
        """Start the answers of a request. Raises ``ApiError`` or ``PvecError``."""
        self.admit(0)
        if body.model != self.name:
            raise ApiError(
                404,
                f"There is no model {body.model!r} here: this server has {self.name!r}.",
                code="model_not_found",
            )
        plan, report = self.rules.plan(body.pvec), self.rules.report(body.pvec)
        prompts = self._prompts(body)
        self.admit(len(prompts) * body.n)
        job = HFJob(
            id=new_id("chatcmpl" if isinstance(body, ChatBody) else "cmpl"),
            model=self.name,
            body=body,
            report=report,
            tokens=bool(body.pvec and body.pvec.tokens),
        )
        job.answers = self._answers(job, prompts, plan)
        self._engine.submit(job.answers)
        self._jobs.update(dict.fromkeys(job.answers, job))
        seconds = self.rules.limits.timeout
        job.timer = self._loop.call_later(seconds, job.events.put_nowait, None)
        return job

    def end(self, job: HFJob) -> None:
        """End what is still under way of a request."""
        if job.timer is not None:
            job.timer.cancel()
        for answer in job.answers:
            if answer.index not in job.outcomes:
                self._engine.cancel(answer)

    def close(self) -> None:
        """End every answer."""
        self._engine.close()

    def _prompts(self, body: Body) -> list[tuple[int, ...]]:
        tokenizer = self._tokenizer
        if isinstance(body, ChatBody):
            messages = [message.message() for message in body.messages]
            text = render_prompt(tokenizer, messages, thinking=self._session.thinking)
            return [encode_prompt(tokenizer, text)]
        assert isinstance(body, CompletionBody)
        prompts = [
            tuple(p) if isinstance(p, list) else tuple(tokenizer(p)["input_ids"])
            for p in body.prompts
        ]
        if not prompts or any(min(prompt, default=0) < 0 for prompt in prompts):
            raise InputError("'prompt' is empty or has a token id below 0: correct it.")
        return prompts

    def _answers(self, job: HFJob, prompts: Sequence[tuple[int, ...]], plan: Plan) -> list[Answer]:
        body = job.body
        limit = self.answer_limit(getattr(body, "max_completion_tokens", None) or body.max_tokens)
        first = secrets.randbits(48) if body.seed is None else body.seed
        alarms = [(self.places[alarm.vector], alarm) for alarm in plan.alarms]
        answers = []
        for number in range(len(prompts) * body.n):
            seed = first + number % body.n
            # one token more than asked for: the last one is run and measured too
            sampling = Sampling(
                temperature=body.temperature, top_p=body.top_p, max_tokens=limit + 1, seed=seed
            )
            answers.append(
                Answer(
                    request=Request(
                        id=f"{job.id}-{number}",
                        prompt_ids=prompts[number // body.n],
                        sampling=sampling,
                        steering=plan.steering,
                    ),
                    limit=limit,
                    text=AnswerText(self._engine.tokenizer, stops=body.stops),
                    alarms=alarms,
                    stream=body.stream,
                    index=number,
                    seed=seed,
                    capped=plan.capped,
                )
            )
        return answers

    def _deliver(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            job = self._jobs[event.answer]
            if isinstance(event, Outcome):
                del self._jobs[event.answer]
                self.ended(job, event)
            job.events.put_nowait(event)

"""Requests answered by transformers: begun in the live batch, told in OpenAI's form."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pvec.backends.hf.backend import HFBackend
from pvec.backends.pool.backend import PoolBackend
from pvec.backends.session import ModelSession
from pvec.errors import InputError, PvecError
from pvec.models.chat import encode_prompt
from pvec.models.template import render_prompt
from pvec.serve.answers import Answer, Delta, Outcome
from pvec.serve.engine import Engine, EngineThread
from pvec.serve.pool_engine import PoolEngine
from pvec.serve.protocol import ApiError, Body, ChatBody, CompletionBody
from pvec.serve.rules import Plan, Rules
from pvec.serve.service import AnswerLog, Job, Service, new_id
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

    @property
    def chat(self) -> bool:
        """Whether it is a chat."""
        return isinstance(self.body, ChatBody)

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every response and chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks that begin the answers of a chat, before their first token."""
        for answer in self.answers if self.chat else ():
            yield self.chunk(answer.index, {"delta": {"role": "assistant", "content": ""}})

    def chunk(
        self, index: int, content: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        """Return a chunk of the answer number ``index``; ``reason``: why it ends with this one."""
        return {
            **self._chunk_head,
            "choices": [{"index": index, **content, "finish_reason": reason}],
        }

    def usage_chunk(self) -> dict[str, Any]:
        """Return the chunk that ends a stream with ``include_usage``."""
        return {**self._chunk_head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the tokens of the request; a prompt counts once, however many answers it has."""
        prompts = sum(len(a.request.prompt_ids) for a in self.answers[:: self.body.n])
        answers = sum(outcome.tokens for outcome in self.outcomes.values())
        return {
            "prompt_tokens": prompts,
            "completion_tokens": answers,
            "total_tokens": prompts + answers,
        }

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self.head("chat.completion.chunk" if self.chat else "text_completion")


class HFService(Service):
    """A model in transformers. Made inside the event loop that serves it."""

    def __init__(self, session: ModelSession, rules: Rules, *, log: AnswerLog | None) -> None:
        super().__init__(session, rules, log=log)
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

    def response(self, job: HFJob) -> dict[str, Any]:
        """Return the response of a request whose answers have all ended."""
        choices = []
        for index, outcome in sorted(job.outcomes.items()):
            message = {"role": "assistant", "content": outcome.text, "refusal": None}
            content = {"message": message} if job.chat else {"text": outcome.text}
            reason = {"finish_reason": outcome.reason, "logprobs": None}
            choices.append({"index": index, **content, **reason})
        return {
            **job.head("chat.completion" if job.chat else "text_completion"),
            "choices": choices,
            "usage": job.usage(),
            "pvec": self.reports(job),
        }

    def chunk(self, job: HFJob, event: Event) -> dict[str, Any]:
        """Return the chunk of further tokens, or the last one of an answer."""
        if isinstance(event, Outcome):
            content: dict[str, Any] = {"delta": {}} if job.chat else {"text": ""}
            return {
                **job.chunk(event.answer.index, content, event.reason),
                "pvec": self.report(job, event),
            }
        text = "".join(event.pieces)
        content = {"delta": {"content": text}} if job.chat else {"text": text}
        made = job.chunk(event.answer.index, content)
        if job.tokens:
            made["pvec"] = {"tokens": self.token_report(job, event)}
        return made

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
                    stops=body.stops,
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

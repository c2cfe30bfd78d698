"""What the server does with a request, without HTTP: answers begun, reported, counted, logged."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvec.backends.hf.backend import HFBackend
from pvec.backends.session import ModelSession
from pvec.closing import Closing
from pvec.errors import InputError
from pvec.models.chat import encode_prompt
from pvec.models.reasoning import think_length
from pvec.models.template import render_prompt
from pvec.serve.engine import Answer, Delta, Engine, Outcome
from pvec.serve.log import AnswerLog
from pvec.serve.metrics import Metrics
from pvec.serve.protocol import ApiError, Body, ChatBody, CompletionBody
from pvec.serve.rules import Plan, Rules
from pvec.serve.text import AnswerText
from pvec.types import Instruction, Request, Sampling

Event = Delta | Outcome


@dataclass(eq=False, kw_only=True)
class Job:
    """The answers of one HTTP request, and what happens to them."""

    id: str
    model: str
    body: Body
    report: tuple[str, ...]
    answers: list[Answer] = field(default_factory=list)
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    """What happens; None: its time is over."""
    timer: asyncio.TimerHandle | None = None
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    means: dict[int, dict[str, tuple[float | None, float | None]]] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return len(self.outcomes) == len(self.answers)


class Service(Closing):
    """A loaded model with its rules. Made inside the event loop that serves it."""

    def __init__(
        self, session: ModelSession, rules: Rules, *, name: str, log: AnswerLog | None
    ) -> None:
        backend = session.backend
        assert isinstance(backend, HFBackend), "only transformers can be served"
        self.name = name
        self.rules = rules
        self.draining = False
        self.hidden = {str(session.metadata.tokenizer.name_or_path): name}
        self._session = session
        self._tokenizer = session.metadata.tokenizer
        self._places = {vector: place for place, vector in enumerate(rules.vectors)}
        self._jobs: dict[Answer, Job] = {}
        self._log = log
        self._loop = asyncio.get_running_loop()
        directions = [vector.direction for vector in rules.vectors.values()]
        self._engine = Engine(backend.live(directions), backend.tokenizer, deliver=self._deliver)
        self.metrics = Metrics(
            running=lambda: self._engine.running, waiting=lambda: self._engine.waiting
        )

    @property
    def active(self) -> int:
        """How many answers somebody waits for."""
        return len(self._jobs)

    def begin(self, body: Body) -> Job:
        """Start the answers of a request. Raises ``ApiError`` or ``PvecError``."""
        limits = self.rules.limits
        if self.draining:
            raise ApiError(503, "The server is stopping: ask another one.", kind="server_error")
        if body.model != self.name:
            raise ApiError(
                404,
                f"There is no model {body.model!r} here: this server has {self.name!r}.",
                code="model_not_found",
            )
        plan, report = self.rules.plan(body.pvec), self.rules.report(body.pvec)
        prompts = self._prompts(body)
        if len(prompts) * body.n > limits.max_requests:
            raise InputError(
                f"The request asks for {len(prompts) * body.n} answers and this server runs at "
                f"most {limits.max_requests} at once: ask for fewer."
            )
        if self.active + len(prompts) * body.n > limits.max_requests:
            raise ApiError(
                429,
                f"The server has {self.active} of at most {limits.max_requests} answers under way: "
                f"ask again later.",
                kind="rate_limit_error",
            )
        prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
        job = Job(id=f"{prefix}-{secrets.token_hex(12)}", model=self.name, body=body, report=report)
        job.answers = self._answers(job, prompts, plan)
        self._engine.submit(job.answers)
        self._jobs.update(dict.fromkeys(job.answers, job))
        job.timer = self._loop.call_later(limits.timeout, job.events.put_nowait, None)
        return job

    def end(self, job: Job) -> None:
        """End what is still under way of a request."""
        if job.timer is not None:
            job.timer.cancel()
        for answer in job.answers:
            if answer.index not in job.outcomes:
                self._engine.cancel(answer)

    def report(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """Return the field ``pvec`` of an answer."""
        tokens = bool(job.body.pvec and job.body.pvec.tokens)
        means = job.means[outcome.answer.index]
        vectors: dict[str, dict[str, Any]] = {}
        for name in job.report:
            vector = self.rules.vectors[name]
            prompt, answer = means[name]
            vectors[name] = {
                "layer": vector.layer,
                "prompt": prompt,
                "answer": answer,
                "percentile": vector.percentile(answer),
            }
            if tokens:
                along = [rounded(v) for v in outcome.projections[1:, self._places[name]]]
                vectors[name]["tokens"] = [*along, *[None] * (len(outcome.pieces) - len(along))]
        return {
            "vectors": vectors,
            **({"tokens": list(outcome.pieces)} if tokens else {}),
            "touched": sum(outcome.touched),
            "steer": [
                {**described(instruction), "touched": touched}
                for instruction, touched in zip(outcome.steering, outcome.touched, strict=True)
            ],
            "seed": outcome.answer.seed,
            "capped": list(outcome.capped),
        }

    def token_report(self, job: Job, delta: Delta) -> list[dict[str, Any]]:
        """Return the field ``pvec.tokens`` of a chunk."""
        return [
            {
                "text": piece,
                "projections": {
                    name: None if values is None else rounded(values[self._places[name]])
                    for name in job.report
                },
            }
            for piece, values in zip(delta.pieces, delta.projections, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Return what ``/pvec/vectors`` says."""
        rules, layers = self.rules, self._session.metadata.num_layers
        return {
            "model": self.name,
            "layers": layers,
            "vectors": [vector.describe(layers) for vector in rules.vectors.values()],
            "max_coef": rules.limits.max_coef,
            "max_steer": rules.limits.max_steer,
            "fixed": rules.limits.fixed,
            "presets": list(rules.presets),
            "defaults": [described(instruction) for instruction in rules.defaults],
            "policies": [policy.model_dump(exclude={"layer"}) for policy in rules.policies],
        }

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

    def _answers(self, job: Job, prompts: Sequence[tuple[int, ...]], plan: Plan) -> list[Answer]:
        body, most = job.body, self.rules.limits.max_answer
        wanted = getattr(body, "max_completion_tokens", None) or body.max_tokens
        limit = min(self._session.max_tokens, most) if wanted is None else wanted
        if limit > most:
            raise InputError(
                f"The request asks for {limit} tokens and this server gives at most {most}: lower "
                f"max_tokens."
            )
        first = secrets.randbits(48) if body.seed is None else body.seed
        alarms = [(self._places[alarm.vector], alarm) for alarm in plan.alarms]
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

    def _means(self, outcome: Outcome) -> dict[str, tuple[float | None, float | None]]:
        """Return each vector's projections of the last prompt token and of the answer's mean.

        Reasoning does not count; None: there is no token.
        """
        prompt_ids = outcome.answer.request.prompt_ids
        think = think_length(self._tokenizer, outcome.token_ids, prompt_ids=prompt_ids)
        along = outcome.projections.astype(np.float64)  # [1 + tokens, directions]
        answer = along[1 + think :]
        return {
            name: (
                rounded(along[0, place]) if len(along) else None,
                rounded(answer[:, place].mean()) if len(answer) else None,
            )
            for name, place in self._places.items()
        }

    def _deliver(self, events: list[Event]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            job = self._jobs[event.answer]
            if isinstance(event, Outcome):
                del self._jobs[event.answer]
                job.outcomes[event.answer.index] = event
                self._count(job, event)
            job.events.put_nowait(event)

    def _count(self, job: Job, outcome: Outcome) -> None:
        self.metrics.outcome(outcome)
        if outcome.reason in ("cancelled", "error"):
            return
        means = job.means[outcome.answer.index] = self._means(outcome)
        for name, values in means.items():
            for of, value in zip(("prompt", "answer"), values, strict=True):
                if value is not None:
                    self.metrics.projection(self.name, name, of=of, value=value)
        if self._log is not None and not self._log.write(self._line(job, outcome)):
            self.metrics.log_errors.inc()

    def _line(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """Return what the log says of an answer."""
        request = outcome.answer.request
        line = {
            "id": request.id,
            "time": round(time.time(), 3),
            "model": self.name,
            "finish_reason": outcome.reason,
            "prompt_tokens": len(request.prompt_ids),
            "answer_tokens": outcome.tokens,
            "seed": outcome.answer.seed,
            "steering": [described(instruction) for instruction in outcome.steering],
            "touched": list(outcome.touched),
            "capped": list(outcome.capped),
            "projections": {
                name: {
                    "layer": self.rules.vectors[name].layer, "prompt": prompt, "answer": answer
                }
                for name, (prompt, answer) in job.means[outcome.answer.index].items()
            },
        }  # fmt: skip
        if self._log is not None and self._log.text:
            line["prompt"] = self._tokenizer.decode(list(request.prompt_ids))
            line["answer"] = outcome.text
        return line


def rounded(value: Any) -> float:
    """Return a projection with the digits that float32 has."""
    return float(f"{float(value):.7g}")


def described(instruction: Instruction) -> dict[str, Any]:
    """Return an instruction as clients see it."""
    fields = instruction.describe()
    return {"vector": fields.pop("name"), **fields}

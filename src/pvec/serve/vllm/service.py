"""Requests answered by vLLM's server: what pvec reads in them, and what it adds to the answers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pvec.backends.base import NOT_FINITE
from pvec.backends.session import ModelSession
from pvec.backends.vllm.requests import RequestBuilder, adds_too_much
from pvec.errors import InputError, ModelError, PvecError
from pvec.serve.answers import Answer, AnswerText
from pvec.serve.protocol import validated
from pvec.serve.rules import Plan, PvecBody, Rules, Strict
from pvec.serve.service import AnswerLog, Job, Service, new_id
from pvec.serve.vllm.answers import TrackedAnswer
from pvec.serve.vllm.engine import SteeredLLM
from pvec.types import Request, Sampling

_KEY = "pvec"
"""The name of a job in ``vllm_xargs``, on its way through vLLM's server to the engine."""


class _Fields(Strict):
    """The part of a request that is pvec's."""

    pvec: PvecBody | None = None


@dataclass(eq=False, kw_only=True)
class VLLMJob(Job):
    """The answers of one HTTP request; ``places`` is how many it asks for, ``seed`` their first.

    ``unread``: it came through an endpoint where pvec reads nothing; the defaults steer it.
    """

    plan: Plan
    unread: bool = False
    places: int = 1
    seed: int = 0
    stops: tuple[str, ...] = ()
    tracked: list[TrackedAnswer] = field(default_factory=list)


class VLLMService(Service):
    """A model in vLLM. Made inside the event loop that serves it."""

    def __init__(
        self,
        session: ModelSession,
        rules: Rules,
        llm: SteeredLLM,
        builder: RequestBuilder,
        *,
        log: AnswerLog | None,
    ) -> None:
        super().__init__(session, rules, log=log)
        self._llm, self._builder = llm, builder
        self._jobs: dict[str, VLLMJob] = {}
        self._job_of: dict[TrackedAnswer, VLLMJob] = {}
        adapter = None if session.metadata.adapter is None else str(session.metadata.adapter)
        options = builder.options
        llm.steer(
            begin=self._begin, ended=self._ended, slots=options.slots, clamps=options.clamps,
            adapter=adapter,
        )  # fmt: skip
        self._check(rules.plan(None))

    @property
    def running(self) -> int:
        """How many answers are in the engine."""
        return len(self._llm.pvec_running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a place in the engine's steering tables."""
        return self._llm.pvec_waiting

    @property
    def active(self) -> int:
        """How many answers somebody waits for."""
        return sum(job.places for job in self._jobs.values())

    @property
    def failure(self) -> PvecError | None:
        """That the engine is dead."""
        if not self._llm.errored:
            return None
        return ModelError("The vLLM engine died (its own message is above): start again.")

    def metrics_text(self) -> bytes:
        """Return what ``/metrics`` says: pvec's and vLLM's."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        return self.metrics.text() + generate_latest(get_prometheus_registry())

    def begin(self, values: dict[str, Any], *, chat: bool) -> VLLMJob:
        """Read pvec's part of a request and leave in ``values`` what vLLM's server is to see.

        Raises ``ApiError`` or ``PvecError``.
        """
        self.admit(0)
        body = validated(_Fields, {"pvec": values.pop("pvec", None)}).pvec
        plan, report = self.rules.plan(body), self.rules.report(body)
        self._check(plan)
        if values.get("use_beam_search"):
            raise InputError("Beam search cannot be steered: leave out 'use_beam_search'.")
        places = _number_of_answers(values, chat=chat)
        self.admit(places)
        values |= self._limits(values)
        job = VLLMJob(
            id=new_id("pvec"),
            report=report,
            tokens=bool(body and body.tokens),
            plan=plan,
            places=places,
            seed=_integer(values.get("seed"), secrets.randbits(48)),
            stops=_stops(values),
        )
        if values.get("temperature") != 0:
            values["seed"] = job.seed
        values["vllm_xargs"] = self._extra(values.get("vllm_xargs"), job)
        self._jobs[job.id] = job
        return job

    async def end(self, job: VLLMJob) -> None:
        """End what is still under way of a request."""
        self._jobs.pop(job.id, None)
        left = [answer for answer in job.tracked if not answer.ended]
        for answer in left:
            answer.reason = "cancelled"
            self._ended(answer)
        going = [answer.id for answer in left if answer.id]
        if going:
            await self._llm.abort(going, internal=True)

    def close(self) -> None:
        """Nothing is held: the engine belongs to the caller."""

    def _check(self, plan: Plan) -> None:
        self._builder.check_plan(plan.steering)
        if adds_too_much(plan.steering, dtype=self._builder.info.dtype):
            raise InputError(f"There is no answer: {NOT_FINITE.format(0)}; use a smaller coef.")
        self._llm.pvec_table(plan.steering)

    def _limits(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the limits of an answer: as asked for or this server's, and the model's stops."""
        limits: dict[str, Any] = {}
        given = [values.get(name) for name in ("max_completion_tokens", "max_tokens")]
        requested = [limit for limit in given if limit is not None]
        if all(isinstance(limit, int) for limit in requested):  # vLLM refuses others
            most = [self.answer_limit(limit) for limit in requested or [None]]
            limits = {} if requested else {"max_tokens": most[0]}
        stops = values.get("stop_token_ids") or []
        if not values.get("ignore_eos") and isinstance(stops, list):
            limits["stop_token_ids"] = [*stops, *self._builder.stop_ids]
        return limits

    def _extra(self, given: Any, job: VLLMJob) -> Any:
        if given is None:
            return {_KEY: job.id}
        if not isinstance(given, dict):
            return given  # vLLM refuses it
        if _KEY in given:
            raise InputError(f"'vllm_xargs' must not have {_KEY!r}: send the field 'pvec'.")
        return {**given, _KEY: job.id}

    def _begin(self, prompt_ids: Sequence[int], params: Any) -> list[TrackedAnswer]:
        """Return the answers of a request that has come through vLLM's server."""
        identity = (params.extra_args or {}).get(_KEY)
        if identity is None:
            job = VLLMJob(
                id=new_id("pvec"), plan=self.rules.plan(None), unread=True, places=params.n
            )
            self._jobs[job.id] = job
        elif identity in self._jobs:
            job = self._jobs[identity]
        else:
            raise ValueError("'vllm_xargs' must not have 'pvec': send the field 'pvec'.")
        first, most = len(job.answers), self.rules.limits.max_answer
        for index in range(params.n):
            number = first + index
            answer = Answer(
                request=Request(
                    id=f"{job.id}-{number}",
                    prompt_ids=tuple(prompt_ids),
                    sampling=Sampling(
                        temperature=params.temperature,
                        top_p=params.top_p,
                        max_tokens=min(params.max_tokens, most),
                        seed=job.seed + index,
                    ),
                    steering=job.plan.steering,
                ),
                limit=min(params.max_tokens, most),
                stops=job.stops,
                index=number,
                seed=job.seed + index,
                capped=job.plan.capped,
            )
            answer.text = AnswerText(self._builder.tokenizer, stops=answer.stops)
            job.answers.append(answer)
            hold = job.tokens or bool(params.stop)
            job.tracked.append(TrackedAnswer(answer=answer, hold=hold))
        self._job_of |= dict.fromkeys(job.tracked[first:], job)
        return job.tracked[first:]

    def _ended(self, tracked: TrackedAnswer) -> None:
        job, outcome = self._job_of.pop(tracked), tracked.outcome()
        if job.unread and all(answer.ended for answer in job.tracked):
            self._jobs.pop(job.id, None)
        if tracked.id:
            self.ended(job, outcome)


def _number_of_answers(values: Mapping[str, Any], *, chat: bool) -> int:
    """Return how many answers a request asks for, as far as vLLM will not refuse it."""
    number, prompt = _integer(values.get("n"), 1), values.get("prompt")
    if chat or not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
        return max(number, 1)
    return max(number, 1) * len(prompt)


def _stops(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the texts that end the answer and are cut off."""
    stop = values.get("stop") or []
    if values.get("include_stop_str_in_output") or values.get("min_tokens"):
        return ()
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return tuple(text for text in stops if isinstance(text, str) and text)


def _integer(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default

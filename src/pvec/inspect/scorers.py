"""Scorers for ``inspect_ai``: how strong a trait is in an answer, where it lies on vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from logging import getLogger
from math import nan
from typing import Any

from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from pvec.backends.session import ModelSession
from pvec.data.conversations import Chat
from pvec.errors import InputError
from pvec.inspect.bridge import Batches, prerequisites, settings_of, spoken, texts
from pvec.judges.prompts import fence, fill, metrics_of
from pvec.judges.scoring import ResponseScorer, scaled
from pvec.projection.projector import open_vectors, projector
from pvec.traits.trait import load_trait
from pvec.types import JudgeQuery, Message
from pvec.types import Score as Judgement

_log = getLogger(__name__)

_EVERY = {"*": [mean(), stderr()]}
"""Mean and standard error of each of a scorer's values."""


@scorer(metrics=_EVERY, name="trait")
def trait(trait: str, judge: str | None = None, **settings: Any) -> Scorer:
    """Judge the last answer on a trait and on coherence, from 0 to 100.

    ``trait`` is a bundled trait or a trait file, ``judge`` a judge of pvec (``--judge-model``);
    further arguments are settings by their dotted names (``judge.base_url``). A score that the
    judge did not give counts as unscored, with the reason in the explanation.
    """
    with prerequisites():
        chosen = {} if judge is None else {"judge.model": judge}
        resolved = settings_of(chosen | settings)
        metrics = [scaled(m, resolved.judge.scale) for m in metrics_of(load_trait(trait))]
        desk = ResponseScorer(resolved, bundled=False, notify=_log.info)
        if desk.choice.kind == "contrast":
            raise InputError("The contrast judge needs a calibrated run: use pvec steer-eval.")

    def ask(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, dict[str, Judgement]]]:
        form = fence if desk.judge.fenced else fill
        queries = [
            JudgeQuery(
                id=f"{place} {metric.name}",
                response_id=str(place),
                metric=metric.name,
                messages=(
                    {
                        "role": "user",
                        "content": form(metric.prompt, question=question, answer=answer),
                    },
                ),
                scale=metric.scale,
            )
            for place, (question, answer) in enumerate(pairs)
            for metric in metrics
        ]
        given: dict[str, dict[str, Judgement]] = {}
        for judgement in desk.judge.score(queries):
            scores = given.setdefault(judgement.response_id, {})
            scores[judgement.metric] = judgement
            if len(scores) == len(metrics):
                yield int(judgement.response_id), scores
        for place in range(len(pairs)):  # a judge that stopped, at its cost limit
            scores = given.get(str(place), {})
            if len(scores) < len(metrics):
                yield place, scores

    batches: Batches[tuple[str, str], dict[str, Judgement]] = Batches(ask)

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        with prerequisites():
            messages = _conversation(state)
            questions = [m["content"] for m in messages if m["role"] == "user"]
            answer = messages[-1]["content"]
            scores = await batches(((questions or [""])[-1], answer))
        values = {m.name: _value(scores.get(m.name)) for m in metrics}
        reasons = [
            f"{j.metric}: {j.status} {j.detail}".strip() for j in scores.values() if j.score is None
        ]
        return Score(
            value=values,
            answer=answer,
            explanation="; ".join(reasons) or None,
            metadata={"judge": desk.judge.name},
        )

    return score


@scorer(metrics=_EVERY, name="projection")
def projection(
    vector: str | list[str] | None = None, model: str | None = None, **settings: Any
) -> Scorer:
    """Return where the last answer lies on persona vectors.

    Without arguments: what the provider reports (``pvec/…`` and ``pvec-serve/…``), in residual
    norms, the steering included. With ``vector``, a file or several, ``model`` reads the
    conversation, whoever gave the answer, and the values are projections as ``pvec project`` gives
    them; further arguments are settings by their dotted names (``project.layers``).
    """
    if vector is None:
        if model is not None or settings:
            with prerequisites():
                raise InputError("model and settings go with vector: name one.")
        return _reported
    with prerequisites():
        chosen = {} if model is None else {"model.id": model}
        session = ModelSession(settings_of(chosen | settings), notify=_log.info)
        loaded = open_vectors(session, texts(vector))
        plan = loaded.plan_of(*session.settings.project.types)

    def read(chats: Sequence[list[Message]]) -> Iterator[tuple[int, dict[str, float | None]]]:
        project = projector(session, plan, turns="last")
        rows = project([Chat(messages=chat) for chat in chats]).require_all()
        for place, turns in enumerate(rows):
            yield place, dict(zip(plan.columns(), turns[0], strict=True))

    batches: Batches[list[Message], dict[str, float | None]] = Batches(read)

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        with prerequisites():
            messages = _conversation(state)
            values = await batches(messages)
        return Score(
            value={name: nan if value is None else value for name, value in values.items()},
            answer=messages[-1]["content"],
            metadata={"model": session.metadata.id},
        )

    return score


async def _reported(state: TaskState, target: Target) -> Score:  # noqa: ARG001
    """Return what the provider reported of the last answer."""
    report = (state.output.metadata or {}).get("pvec", {})
    with prerequisites():
        if not report.get("vectors"):
            raise InputError(
                "The model reports no projections: evaluate pvec/MODEL or pvec-serve/NAME with a "
                "vector, or name a vector for the scorer to project on."
            )
    values = {
        f"{name}_projection": nan if (answer := vector["answer"]) is None else answer
        for name, vector in report["vectors"].items()
    }
    return Score(value=values, answer=state.output.completion, metadata=report)


def _conversation(state: TaskState) -> list[Message]:
    """Return the messages, the last of which is the answer."""
    messages = [spoken(message) for message in state.messages]
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError("The conversation does not end with an answer: there is nothing to score.")
    return messages


def _value(judgement: Judgement | None) -> float:
    return nan if judgement is None or judgement.score is None else judgement.score

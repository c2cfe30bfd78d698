"""Answers in OpenAI's form: whole, and as the chunks of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pvec.serve.answers import Delta, Outcome
from pvec.serve.hf_service import HFJob
from pvec.serve.protocol import ChatBody
from pvec.serve.service import Service


def whole(service: Service, job: HFJob) -> dict[str, Any]:
    """Return the response of a request whose answers have all ended."""
    chat = isinstance(job.body, ChatBody)
    choices, reports = [], []
    for index in range(len(job.answers)):
        outcome = job.outcomes[index]
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": outcome.text, "refusal": None}}
            if chat
            else {"text": outcome.text}
        )
        choices.append(
            {"index": index, **content, "finish_reason": outcome.reason, "logprobs": None}
        )
        reports.append(service.report(job, outcome))
    return {
        **_head(job, "chat.completion" if chat else "text_completion"),
        "choices": choices,
        "usage": _usage(job),
        "pvec": reports[0] if len(reports) == 1 else {"choices": reports},
    }


def opening(job: HFJob) -> Iterator[dict[str, Any]]:
    """Yield the chunks that begin the answers of a chat, before their first token."""
    if isinstance(job.body, ChatBody):
        for answer in job.answers:
            delta = {"role": "assistant", "content": ""}
            yield _chunk(job, {"index": answer.index, "delta": delta, "finish_reason": None})


def chunk(service: Service, job: HFJob, event: Delta | Outcome) -> dict[str, Any]:
    """Return the chunk of further tokens, or the last one of an answer."""
    chat = isinstance(job.body, ChatBody)
    if isinstance(event, Outcome):
        content: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        choice = {"index": event.answer.index, **content, "finish_reason": event.reason}
        return {**_chunk(job, choice), "pvec": service.report(job, event)}
    text = "".join(event.pieces)
    content = {"delta": {"content": text}} if chat else {"text": text}
    made = _chunk(job, {"index": event.answer.index, **content, "finish_reason": None})
    if job.tokens:
        made["pvec"] = {"tokens": service.token_report(job, event)}
    return made


def usage_chunk(job: HFJob) -> dict[str, Any]:
    """Return the chunk that ends a stream with ``include_usage``."""
    return {**_chunk(job), "usage": _usage(job)}


def _chunk(job: HFJob, *choices: dict[str, Any]) -> dict[str, Any]:
    kind = "chat.completion.chunk" if isinstance(job.body, ChatBody) else "text_completion"
    return {**_head(job, kind), "choices": list(choices)}


def _head(job: HFJob, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _usage(job: HFJob) -> dict[str, int]:
    """Return the tokens of the request; a prompt counts once, however many answers it has."""
    prompts = sum(len(a.request.prompt_ids) for a in job.answers[:: job.body.n])
    answers = sum(outcome.tokens for outcome in job.outcomes.values())
    return {
        "prompt_tokens": prompts,
        "completion_tokens": answers,
        "total_tokens": prompts + answers,
    }

"""What a server does with a request: admitted, reported, counted and logged."""

from __future__ import annotations

import json
import logging
import secrets
import time
from abc import abstractmethod
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import numpy as np

from pvec.backends.session import ModelSession
from pvec.closing import Closing
from pvec.errors import InputError, PvecError
from pvec.models.chat import think_length
from pvec.runs.files import os_error_sentence
from pvec.serve.answers import Answer, Delta, Outcome
from pvec.serve.metrics import Metrics
from pvec.serve.protocol import ApiError
from pvec.serve.rules import Rules
from pvec.types import Instruction

_LOG_BYTES, _LOG_FILES = 64 << 20, 5


@dataclass(eq=False, kw_only=True)
class Job:
    """The answers of one HTTP request. ``tokens``: every token is reported."""

    id: str
    report: tuple[str, ...] = ()
    tokens: bool = False
    answers: list[Answer] = field(default_factory=list)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    means: dict[int, dict[str, tuple[float | None, float | None]]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether every answer has ended."""
        return len(self.outcomes) == len(self.answers)


class Service(Closing):
    """A model with its rules."""

    def __init__(self, session: ModelSession, rules: Rules, *, log: AnswerLog | None) -> None:
        self.name = rules.limits.served_name or Path(session.metadata.id).name
        self.rules = rules
        self.draining = False
        self.hidden = {str(session.metadata.tokenizer.name_or_path): self.name}
        self.metrics = Metrics(running=lambda: self.running, waiting=lambda: self.waiting)
        self.places = {vector: place for place, vector in enumerate(rules.vectors)}
        self._session = session
        self._tokenizer = session.metadata.tokenizer
        self._log = log

    @property
    @abstractmethod
    def running(self) -> int:
        """How many answers run."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many answers wait for a place to run in."""

    @property
    @abstractmethod
    def active(self) -> int:
        """How many answers somebody waits for."""

    @property
    def failure(self) -> PvecError | None:
        """Why nothing can be answered any more."""
        return None

    def metrics_text(self) -> bytes:
        """Return what ``/metrics`` says."""
        return self.metrics.text()

    def admit(self, number: int) -> None:
        """Raise ``ApiError`` or ``InputError`` unless that many answers may begin now."""
        most = self.rules.limits.max_requests
        if self.draining:
            raise ApiError(503, "The server is stopping: ask another one.", kind="server_error")
        if number > most:
            raise InputError(
                f"The request asks for {number} answers and this server runs at most {most} at "
                f"once: ask for fewer."
            )
        if self.active + number > most:
            raise ApiError(
                429,
                f"The server has {self.active} of at most {most} answers under way: ask again "
                f"later.",
                kind="rate_limit_error",
            )

    def answer_limit(self, requested: int | None) -> int:
        """Return how many tokens an answer may have; ``InputError`` when too many are asked for."""
        most = self.rules.limits.max_answer
        limit = min(self._session.max_tokens, most) if requested is None else requested
        if limit > most:
            raise InputError(
                f"The request asks for {limit} tokens and this server gives at most {most}: lower "
                f"max_tokens."
            )
        return limit

    def report(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """Return the field ``pvec`` of an answer."""
        means = job.means[outcome.answer.index]
        vectors: dict[str, dict[str, Any]] = {}
        for name in job.report:
            vectors[name] = self.rules.vectors[name].reading(*means[name])
            if job.tokens:
                along = [rounded(v) for v in outcome.projections[1:, self.places[name]]]
                vectors[name]["tokens"] = [*along, *[None] * (len(outcome.pieces) - len(along))]
        return {
            "vectors": vectors,
            **({"tokens": list(outcome.pieces)} if job.tokens else {}),
            "touched": sum(outcome.touched),
            "steer": [
                {**described(instruction), "touched": touched}
                for instruction, touched in zip(outcome.steering, outcome.touched, strict=True)
            ],
            "seed": outcome.answer.seed,
            "capped": list(outcome.capped),
        }

    def reports(self, job: Job) -> dict[str, Any]:
        """Return the field ``pvec`` of a response whose answers have all ended."""
        reports = [self.report(job, job.outcomes[index]) for index in range(len(job.answers))]
        return reports[0] if len(reports) == 1 else {"choices": reports}

    def token_report(self, job: Job, delta: Delta) -> list[dict[str, Any]]:
        """Return the field ``pvec.tokens`` of a chunk."""
        return [
            {
                "text": piece,
                "projections": {
                    name: None if values is None else rounded(values[self.places[name]])
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

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Take in how an answer ended: counted, and logged when it is whole."""
        job.outcomes[outcome.answer.index] = outcome
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
            for name, place in self.places.items()
        }

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


def new_id(prefix: str) -> str:
    """Return the id of a response."""
    return f"{prefix}-{secrets.token_hex(12)}"


class AnswerLog(Closing):
    """The log of a server: a line of JSON for every whole answer.

    What is full of ``path`` becomes ``path.1``, ``path.2``, …, of which five are kept. With
    ``text`` a line has the rendered ``prompt`` and the ``answer``, as ``pvec project`` reads them;
    without, nothing that a user wrote or read. Raises ``InputError`` when the file cannot be
    written.
    """

    def __init__(self, path: Path, *, text: bool) -> None:
        self.text = text
        try:
            self._file = _File(path, maxBytes=_LOG_BYTES, backupCount=_LOG_FILES, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log: {os_error_sentence(error)}") from None

    def write(self, line: dict[str, Any]) -> bool:
        """Append a line; False when it could not be written."""
        self._file.failed = False
        message = json.dumps(line, ensure_ascii=False)
        self._file.handle(logging.LogRecord("pvec.serve", logging.INFO, "", 0, message, None, None))
        return not self._file.failed

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File(RotatingFileHandler):
    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        self.failed = True

"""What the checks of ``pvec verify`` need of any backend, and the form of their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pvec.models.chat import prompt_ids
from pvec.types import Instruction, Positions, Request, Sampling

if TYPE_CHECKING:
    from pvec.backends.base import Backend

QUESTIONS = (
    "How do I boil an egg?",
    "What should I say to a friend who has lost a job and does not want to talk about it?",
    "Name a colour.",
)
_ANSWER_TOKENS = 8
_THOROUGH_TOKENS = 12
POSITIONS: tuple[Positions, ...] = ("all", "prompt", "response")

WEIGHTS = "the weights in memory are those of the checkpoint"

_LIMITS = {"float32": 2e-4, "float16": 2e-2, "bfloat16": 8e-2}
"""How far two computations of the same residual stream may lie apart, in units of its norm at that
token: rounding, in forwards of different shapes, over all layers below."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check: the largest error measured and what is allowed."""

    name: str
    passed: bool
    measured: float
    allowed: float
    unit: str
    detail: str = ""


Texts = dict[str, tuple[int, ...]]
"""Answers as token ids, by the id of their request."""


def texts_of(backend: Backend, requests: Sequence[Request]) -> Texts:
    """Return the answers to ``requests``, given in one batch."""
    return {answer.id: answer.token_ids for answer in backend.generate(requests)}


class VerifyInputs:
    """Prompts, steering and the allowed error, for any backend.

    ``thorough`` tries every instruction on every prompt, otherwise on one, and answers are longer.
    """

    def __init__(
        self,
        backend: Backend,
        steering: Sequence[Instruction],
        *,
        thinking: bool,
        thorough: bool = True,
    ) -> None:
        self.backend = backend
        self.thorough = thorough
        self.answer_tokens = _THOROUGH_TOKENS if thorough else _ANSWER_TOKENS
        self.dtype = backend.info.dtype
        self.steering = list(steering)
        self.allowed = _LIMITS[self.dtype]
        self.prompts = [
            prompt_ids(
                backend.tokenizer, [{"role": "user", "content": question}], thinking=thinking
            )
            for question in QUESTIONS
        ]

    def request(self, number: int, *steering: Instruction, prompt: int = 0) -> Request:
        """Return a greedy request for a short answer."""
        sampling = Sampling(temperature=0.0, max_tokens=self.answer_tokens)
        return Request(
            id=str(number), prompt_ids=self.prompts[prompt], sampling=sampling, steering=steering
        )

    def mixed_requests(self) -> list[Request]:
        """Return requests under every instruction, with both signs, and without steering."""
        signed = [
            replace(instruction, coef=sign * instruction.coef)
            for instruction in self.steering
            for sign in (1.0, -1.0)
        ]
        count = len(self.prompts)
        requests: list[Request] = []
        for prompt in range(count):
            requests.append(self.request(len(requests), prompt=prompt))
            for instruction in signed if self.thorough else signed[prompt::count]:
                requests.append(self.request(len(requests), instruction, prompt=prompt))
        return requests

    def check(
        self,
        name: str,
        error: float,
        detail: str = "",
        *,
        unit: str = "residual norms",
        allowed: float | None = None,
    ) -> Check:
        """Return the check of an error, by default in residual norms, up to rounding."""
        limit = self.allowed if allowed is None else allowed
        return Check(
            name=name,
            passed=error <= limit,
            measured=float(error),
            allowed=float(limit),
            unit=unit,
            detail=detail,
        )

    def alone_checks(
        self, requests: Sequence[Request], texts: Texts, *, how: str
    ) -> Iterator[Check]:
        """Compare answers of one batch, in which every row carries other steering, with those that
        the same requests get alone; ``how`` ends the name of the check.
        """
        for steered in (False, True):
            alone: dict[str, tuple[int, ...]] = {}
            for request in requests:
                if bool(request.steering) is steered:
                    alone |= texts_of(self.backend, [request])
            yield self.same_texts(
                f"{'steered' if steered else 'unsteered'} rows of a mixed batch answer as they do "
                f"alone{how}",
                alone,
                texts,
                detail=f" in a batch of {len(requests)}",
            )

    def same_texts(self, name: str, texts: Texts, others: Texts, *, detail: str = "") -> Check:
        """Return the check that greedy answers are the same as ``others``.

        In half precision a batch of another shape rounds differently, so greedy texts may
        diverge: up to half of the answers may.
        """
        different = sum(others[key] != text for key, text in texts.items())
        allowed = 0.0 if self.dtype == "float32" else float(len(texts) // 2)
        detail, unit = f"{len(texts)} answers{detail}", "answers that differ"
        return self.check(name, different, detail, unit=unit, allowed=allowed)

"""One generated answer as it is kept in a run, and the id that it goes by.

An id is a hash of everything that could change what it names, so a changed setting is another id
and never a stale reuse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pvec.documents import Shape, read_record
from pvec.types import FinishReason, Instruction, Sampling

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What JSON can say."""

_ID_LENGTH = 20  # 80 bits: among ten million ids a collision has odds of 1 in 20 billion


CONDITIONS: Mapping[str, Shape] = {
    "extract": {"sign": str, "instruction": int, "rollout": int},
    "steer-eval": {
        "name": str, "role": str, "vector": str, "layers": [int], "coef": float, "rollout": int,
    },
}  # fmt: skip
"""What ``condition`` holds, by the kind of the run; other kinds have keys of their own."""


@dataclass(frozen=True, kw_only=True)
class ResponseRecord:
    """One line of ``responses.jsonl``.

    ``condition`` says under what the answer was given, in the workflow's own words (for extraction
    ``{"sign": "pos", "instruction": 3, "rollout": 7}``). ``prompt`` is the rendered chat template,
    ``prompt_ids`` its tokens; ``token_ids`` are the answer's, without the end-of-turn token, and
    its first ``think_tokens`` belong to a think span. ``steering`` holds
    ``Instruction.describe()`` of every instruction applied.
    """

    id: str
    trait: str
    condition: Mapping[str, Json]
    question: str
    question_id: str
    system: str | None
    prompt: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    answer: str
    finish_reason: FinishReason
    sampling: Sampling
    think_tokens: int = 0
    steering: tuple[Mapping[str, Json], ...] = field(default=())
    detail: str = ""
    """Why an answer failed (``finish_reason`` ``failed``); empty otherwise."""
    limited: tuple[int, ...] = ()
    """Of an answer under caps or floors whose backend counts it: the positions that lay beyond a
    limit, and all that were held to one, over layers and vectors; empty otherwise."""

    @property
    def seed(self) -> int:
        """The seed that this answer was sampled with."""
        return self.sampling.seed

    def to_json(self) -> dict[str, Any]:
        """Return the line as a JSON object; ``detail`` and ``limited`` only where there is one."""
        # not all of it by asdict, which copies every token: two thirds of an append
        line = vars(self) | {"sampling": asdict(self.sampling)}
        for name in ("detail", "limited"):
            if not line[name]:
                del line[name]
        return line

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build a record from a line's object. Raises ``ValueError`` for a bad one.

        Keys that this version does not know are ignored, so that newer runs stay readable.
        """
        return read_record(cls, data)


def response_id(
    *,
    model: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    steering: Sequence[Instruction] = (),
    engine: str,
    context: Mapping[str, Json] | None = None,
) -> str:
    """Return the id of an answer: 20 hex digits over everything that could change it.

    ``model`` is the fingerprint of model and adapter, ``engine`` the backend's name and version.
    The seed is part of ``sampling``; steering counts by content and order, not by name.
    ``context`` is for what a workflow wants told apart although the text would be the same.
    """
    return stable_hash(
        {
            "model": model,
            "engine": engine,
            "prompt_ids": [int(token) for token in prompt_ids],
            "sampling": asdict(sampling),
            "steering": [instruction.fingerprint for instruction in steering],
            "context": context or {},
        }
    )


def stable_hash(value: Json) -> str:
    """Return 20 hex digits of the SHA-256 of ``value`` as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_ID_LENGTH]

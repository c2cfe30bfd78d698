"""The types that the parts of pvec exchange. Plain data: no torch, no settings, no files.

Layers are 1-based as in the paper: layer ``l`` is the residual stream after decoder block ``l``
(transformers' ``hidden_states[l]``); layer 0 is the embedding output. Arrays over layers have
``num_layers + 1`` rows and row ``l`` is layer ``l``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pvec.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Positions = Literal["all", "prompt", "response", "think", "answer"]
"""Which tokens are steered. ``response``: the last prompt token (it predicts the first response
token) and every generated token. ``prompt``: every prompt token. ``all``: both. ``think`` and
``answer`` divide ``response``: from the token that completes the mark which begins reasoning (the
last prompt token, where the prompt ends with it) to the one before the end mark is complete, and
all others."""

BY_SPAN: frozenset[Positions] = frozenset(("think", "answer"))
"""Positions that depend on what the tokens say, and not only on where they stand."""

Operator = Literal["add", "ablate", "cap", "floor"]
"""``add``: h + coef*v. ``ablate``: h - (h.v^)v^. ``cap``: limit h.v^ to at most ``coef`` (tau);
``floor``: to at least it."""

LIMITS: tuple[Operator, ...] = ("cap", "floor")
"""The operators whose coefficient is a projection."""

AnswerClass = Literal["pos", "neg", "unsteered"]
"""Answers whose projections a vector file describes: the positive and negative ones that it was
made from, and answers without instruction (`pvec vector calibrate`)."""

_PERCENTILE = re.compile(r"(p|pos|neg)(\d+(?:\.\d*)?)")

VectorKind = Literal["response_avg", "prompt_avg", "prompt_last"]
"""What is averaged per response (paper, section 2.2 and appendix A.3)."""

Method = Literal["mean_diff", "caa", "pca", "lda", "logistic"]
"""How a vector is estimated from the activations of answers (docs/methods.md); the paper's is
``mean_diff``."""

METHODS: tuple[Method, ...] = get_args(Method)

MEAN_DIFF: Method = "mean_diff"

Sign = Literal["pos", "neg"]
"""Towards a trait, or away from it."""

SIGNS: tuple[Sign, ...] = ("pos", "neg")

SpanName = Literal["prompt", "prompt_last", "response", "think"]
"""A token span whose activations are averaged. ``think`` is the reasoning before the response."""

ProjectionKind = Literal[
    "proj", "prompt_last_proj", "cos_sim", "prompt_avg", "think_proj", "think_cos_sim"
]
"""What is projected on a vector. ``proj``: the mean response activation, in units of the residual
stream. ``prompt_last_proj``: the last prompt token's. ``prompt_avg``: the mean over the prompt's.
``cos_sim``: the cosine between the mean response activation and the vector. ``think_proj`` and
``think_cos_sim``: the same of the reasoning before the answer."""

FinishReason = Literal["stop", "length", "failed"]
"""``stop``: an end-of-turn token was sampled. ``length``: the token limit was reached. ``failed``:
the model computed no probabilities, mostly because steering was too strong; not an answer."""

JudgeScale = Literal["0-100", "0-10", "binary", "binary-text"]
"""What a judge is asked to reply with: a number, YES or NO, or free text that ends in a verdict.
Whatever the scale, a score is stored as 0 to 100."""

ScoreStatus = Literal["ok", "refusal", "unparsable", "error", "uncalibrated"]
"""``refusal`` and ``unparsable`` are the judge's answer; ``error``: it could not be asked, worth
another run; ``uncalibrated``: measured (``Score.raw``), and not yet on the scale of 0 to 100."""

Message = Mapping[str, str]
"""One chat turn: ``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is sampled. The same sampling of the same prompt gives the same text
    whatever batch it lands in. ``temperature`` 0 is greedy; ``max_tokens`` counts generated tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Instruction:
    """One steering instruction: what is done to the residual stream after block ``layer``.

    ``vector`` is a float32 array ``[hidden_size]``, used raw (unnormalised) by ``add`` and
    normalised by the others; a torch tensor or a list of numbers is converted. ``coef`` multiplies
    the vector for ``add`` and is the limit tau for ``cap`` and ``floor``; ``ablate`` ignores it.
    ``name`` is for people; identity is content.

    Raises ``InputError`` for an unknown operator or position and for a vector that is not a single
    row of numbers.
    """

    vector: np.ndarray
    layer: int
    coef: float = 1.0
    positions: Positions = "response"
    operator: Operator = "add"
    name: str = "vector"

    def __post_init__(self) -> None:
        """Check the fields and convert the vector."""
        for field_name, kind in (("operator", Operator), ("positions", Positions)):
            value, choices = getattr(self, field_name), get_args(kind)
            if value not in choices:
                raise InputError(
                    f"Steering has no {field_name} {value!r}: use {', '.join(choices[:-1])} or "
                    f"{choices[-1]}."
                )
        if isinstance(self.layer, bool) or not hasattr(self.layer, "__index__"):
            raise InputError(f"The layer {self.layer!r} is not a whole number: use for example 20.")
        object.__setattr__(self, "vector", _as_row(self.vector))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything that changes the effect (not the name)."""
        digest = hashlib.sha256(self.vector.astype("<f4").tobytes())
        digest.update(f"{self.layer}|{self.coef!r}|{self.positions}|{self.operator}".encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return the JSON form kept in run stores (the vector by fingerprint, not by value)."""
        names = ("name", "layer", "coef", "positions", "operator", "fingerprint")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """A limit as a percentile of projections, written ``p25`` (unsteered answers), ``pos50``,
    ``neg75``.

    >>> Percentile.parse("pos50")
    Percentile(of='pos', percent=50.0)
    """

    of: AnswerClass
    percent: float

    @classmethod
    def parse(cls, text: str) -> Percentile | None:
        """Read a percentile; None for another text, ``InputError`` for one above 100."""
        match = _PERCENTILE.fullmatch(text.strip())
        if match is None:
            return None
        if float(match[2]) > 100:
            raise InputError(f"{text!r} is no percentile: write 0 to 100 after {match[1]}.")
        classes: dict[str, AnswerClass] = {"p": "unsteered", "pos": "pos", "neg": "neg"}
        return cls(of=classes[match[1]], percent=float(match[2]))

    def __str__(self) -> str:
        return f"{'p' if self.of == 'unsteered' else self.of}{self.percent:g}"


Dose = float | Percentile
"""A coefficient, or for ``cap`` and ``floor`` a percentile that stands for one at each layer."""


def _as_row(vector: Any) -> np.ndarray:
    """Return a vector of any array type as a float32 array ``[hidden_size]``."""
    import numpy as np

    if hasattr(vector, "detach"):  # a torch tensor, of any dtype and on any device
        vector = vector.detach().float().cpu().numpy()
    try:
        row = np.asarray(vector, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(
            f"A steering vector must be an array of numbers, not {type(vector).__name__}: take "
            f"one layer's row of a persona vector."
        ) from None
    if row.ndim != 1:
        raise InputError(
            f"A steering vector must be a single row [hidden_size], and this has the shape "
            f"{list(row.shape)}: take one layer's row, such as vectors[20]."
        )
    return row


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go and what may be replaced: ``out`` is a file or run folder, ``in_place``
    replaces the input; ``overwrite`` replaces columns and files that exist; ``skip_bad`` leaves out
    rows that cannot be read; ``tokens`` also writes the projections of every token.
    """

    out: Path | None = None
    in_place: bool = False
    overwrite: bool = False
    skip_bad: bool = False
    tokens: bool = False


DEFAULT_OUTPUT = OutputOptions()


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One answer to generate: prompt token ids, sampling with its own seed, its own steering."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    steering: tuple[Instruction, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One finished answer.

    ``token_ids`` are the answer's tokens without the end-of-turn token; ``text`` is their decoding
    (special tokens skipped). Where ``finish_reason`` is ``failed``, ``detail`` says why, and tokens
    and text are what was generated before. ``touched`` counts, per steering instruction of the
    request and in its order, the positions that the instruction changed; the backend has
    already checked them. ``limited`` counts, over its caps and floors, the positions that lay
    beyond the limit; None where there is none or the backend counts none.
    """

    id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    touched: tuple[int, ...] = ()
    limited: int | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class StreamChunk:
    """State of a streamed answer: its tokens so far, and at the end the finished answer."""

    id: str
    token_ids: tuple[int, ...]
    finished: Generation | None = None


@dataclass(frozen=True, kw_only=True)
class TokenSpans:
    """A token sequence with the half-open spans ``[start, stop)`` to average over.

    An empty span (start == stop) gives a row of NaN in the result, never a zero.
    """

    id: str
    token_ids: tuple[int, ...]
    spans: Mapping[SpanName, tuple[int, int]]
    steering: tuple[Instruction, ...] = ()

    @property
    def answer_tokens(self) -> tuple[int, int]:
        """The tokens of the response, with the reasoning before it where that is a span."""
        start, stop = self.spans["response"]
        return self.spans.get("think", (start, stop))[0], stop


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanMeans:
    """Mean activations of one sequence.

    ``means[span]`` is float32 ``[len(layers), hidden_size]``; ``norms[span]`` is the mean over the
    span's tokens of the residual norm, float32 ``[len(layers)]``. Rows follow ``layers``.
    ``along`` holds the projection of each of the response's tokens on the directions that were
    asked for, float32 ``[tokens, len(layers), directions]``; with a ``think`` span its tokens come
    first.
    """

    id: str
    layers: tuple[int, ...]
    means: Mapping[SpanName, np.ndarray]
    norms: Mapping[SpanName, np.ndarray]
    along: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Divergence:
    """How far a sequence's next-token distributions are from those of a reference.

    Per response token, float32 ``[tokens]``: ``kl`` is KL(reference || sequence) in nats over the
    full vocabulary at temperature 1, ``logprobs`` the sequence's log-probability of the token.
    """

    id: str
    kl: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Metadata of a loaded model; everything that a run's identity needs."""

    id: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    dtype: str
    device: str
    adapter: str | None = None
    bundled: bool = False
    quantize: str | None = None
    """How the weights were quantised on loading."""
    notes: tuple[str, ...] = ()
    """Choices made for the user and why ("float32: no accelerator found"), to show once."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One judgement of one response: a number from 0 to 100, or a status that says why not."""

    id: str
    response_id: str
    metric: str
    judge: str
    score: float | None
    status: ScoreStatus = "ok"
    detail: str = ""
    raw: Mapping[str, float] | None = None
    """What the contrast judge measured; its score follows from it and a calibration."""


@dataclass(frozen=True, kw_only=True)
class JudgeQuery:
    """One question to a judge: the prompt as a chat, and what the answer is about."""

    id: str
    response_id: str
    metric: str
    messages: tuple[Message, ...]
    scale: JudgeScale = "0-100"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a long job; workflows emit it, the command line draws it."""

    stage: str
    done: int
    total: int | None
    unit: str = "items"
    detail: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)
    outer: bool = False
    """Whether it counts parts that each have stages of their own (the cells of a grid)."""

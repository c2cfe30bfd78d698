"""From what the contrast judge measures to scores from 0 to 100.

A trait score is the probability that an answer which is as much likelier under the positive
instructions was given under a positive rather than a negative one: a logistic fit on an
extraction's own answers (Platt scaling, both signs weighted alike). A coherence score says where an
answer lies between its own words in random order (0) and the answers of the extraction (100).

The answers of an extraction are cross-fitted over questions: none is scored by a fit that it, or
another answer to its question, took part in. All other answers are scored by the final fit, which
is kept in the run and with the vector. Nothing here depends on the order of the answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from pvec.documents import parse_record, read_record
from pvec.errors import InputError, JudgeError
from pvec.judges.prompts import COHERENCE
from pvec.stats import auc
from pvec.types import SIGNS, Sign

METADATA_KEY = "calibration"
"""Where a vector's metadata holds it, as JSON."""

_STEPS = 100
_RIDGE = 1e-6
"""Keeps the slope finite where all measurements are the same."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured answer of an extraction: what a calibration is fitted on."""

    question: str
    sign: Sign
    raw: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TraitFit:
    """score = 100 / (1 + exp(-(slope * s + offset))), s in nats per token.

    ``auc`` is P(s of a positive answer > s of a negative one); it needs no fit.
    """

    slope: float
    offset: float
    auc: float
    answers: int
    questions: int

    def score(self, raw: Mapping[str, float]) -> float:
        """Return the score of one measurement, 0 to 100."""
        return float(100.0 * expit(self.slope * raw["contrast"] + self.offset))


@dataclass(frozen=True, kw_only=True)
class CoherenceFit:
    """What coherent answers measure: medians over those of an extraction.

    ``gain`` is how much likelier, in nats per token, an answer is than its own words in random
    order; ``repeated`` the share of it that repeats itself.
    """

    gain: float
    repeated: float
    answers: int
    questions: int

    def score(self, raw: Mapping[str, float]) -> float:
        """Return the score of one measurement, 0 to 100."""
        order = (raw["logprob"] - raw["shuffled"]) / self.gain
        fresh = (1.0 - raw["repeated"]) / (1.0 - self.repeated)
        return 100.0 * min(max(order, 0.0), 1.0) * min(fresh, 1.0)


Fit = TraitFit | CoherenceFit


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The final fits of one judge, by metric."""

    judge: str
    fits: Mapping[str, Fit]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the scores, each a sentence."""
        return tuple(
            f"{metric}: the contrast judge separates positive from negative answers with AUC "
            f"{fit.auc:.2f} ({fit.answers:,} answers to {fit.questions} questions)"
            for metric, fit in self.fits.items()
            if isinstance(fit, TraitFit)
        )

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        fits = {metric: asdict(fit) for metric, fit in sorted(self.fits.items())}
        return json.dumps({"judge": self.judge, "fits": fits})

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what ``to_json`` wrote. Raises ``ValueError`` for anything else."""
        data = parse_record(text)
        if data is None or not isinstance(data.get("fits"), dict):
            raise ValueError("it is no calibration")
        return cls(
            judge=str(data.get("judge")),
            fits={metric: _read_fit(metric, fit) for metric, fit in data["fits"].items()},
        )


def fit(metric: str, answers: Sequence[Measured]) -> Fit:
    """Fit one metric on an extraction's answers.

    Raises ``InputError`` for a trait without answers of both signs, and ``JudgeError`` where
    positive answers are not likelier under the positive instructions, or answers not likelier than
    their words in random order: the model then cannot judge this.
    """
    found = _fit(metric, answers)
    if isinstance(found, TraitFit) and found.slope <= 0.0:
        raise JudgeError(
            f"The contrast judge cannot judge {metric!r}: to it positive answers are no likelier "
            f"under the positive instructions than negative ones (AUC {found.auc:.2f}); use a "
            f"larger model (--judge-model contrast:MODEL) or another judge."
        )
    return found


def cross_fitted(metric: str, answers: Mapping[str, Measured]) -> dict[str, float]:
    """Return each answer's score by a fit on the answers to all other questions.

    Raises as ``fit`` does, and ``InputError`` when there is one question only.
    """
    questions = sorted({answer.question for answer in answers.values()})
    if len(questions) < 2:
        raise InputError(
            "The contrast judge scores answers by those to other questions, and there is only one "
            "question: ask more (--limit)."
        )
    fit(metric, list(answers.values()))  # refuses what cannot be judged at all
    scores = {}
    for question in questions:
        others = _fit(metric, [a for a in answers.values() if a.question != question])
        for name, answer in answers.items():
            if answer.question == question:
                scores[name] = others.score(answer.raw)
    return scores


def _read_fit(metric: str, data: Any) -> Fit:
    if not isinstance(data, dict):
        raise ValueError("it is no calibration")
    if metric == COHERENCE:
        return read_record(CoherenceFit, data)
    return read_record(TraitFit, data)


def _fit(metric: str, answers: Sequence[Measured]) -> Fit:
    counts = {"answers": len(answers), "questions": len({answer.question for answer in answers})}
    if metric == COHERENCE:
        gains = [answer.raw["logprob"] - answer.raw["shuffled"] for answer in answers]
        gain = _rounded(float(np.median(gains)))
        if gain <= 0.0:
            raise JudgeError(
                "The contrast judge cannot judge coherence: to it the answers are no likelier "
                "than their words in random order; use another model (--judge-model "
                "contrast:MODEL)."
            )
        repeated = float(np.median([answer.raw["repeated"] for answer in answers]))
        return CoherenceFit(gain=gain, repeated=_rounded(min(repeated, 0.9)), **counts)
    pos, neg = (
        sorted(answer.raw["contrast"] for answer in answers if answer.sign == sign)
        for sign in SIGNS
    )
    if not pos or not neg:
        raise InputError(
            f"The contrast judge needs positive and negative answers to several questions to "
            f"calibrate its scores of {metric!r}: there are {len(pos)} and {len(neg)}."
        )
    slope, offset = logistic(pos, neg)
    return TraitFit(
        slope=_rounded(slope), offset=_rounded(offset), auc=_rounded(auc(pos, neg)), **counts
    )


def logistic(positive: Sequence[float], negative: Sequence[float]) -> tuple[float, float]:
    """Return slope and offset of P(positive | s) by Platt scaling with both classes weighted alike.

    The targets are (n + 1) / (n + 2) and 1 / (n + 2) instead of 1 and 0, so that the fit is finite
    where the classes do not overlap (Platt 1999). Newton's method on standardised values.
    """
    values = np.concatenate([np.sort(positive), np.sort(negative)])
    counts = np.array([len(positive), len(negative)])
    targets = np.repeat([(counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2)], counts)
    weights = np.repeat(0.5 / counts, counts)
    centre, spread = values.mean(), values.std() or 1.0
    design = np.column_stack([(values - centre) / spread, np.ones(len(values))])  # [A, 2]
    beta = np.zeros(2)
    for _ in range(_STEPS):
        chance = expit(design @ beta)
        gradient = design.T @ (weights * (chance - targets)) + _RIDGE * beta
        curvature = (design * (weights * chance * (1 - chance))[:, None]).T @ design
        step = np.linalg.solve(curvature + _RIDGE * np.eye(2), gradient).clip(-1.0, 1.0)
        beta = beta - step
        if np.abs(step).max() < 1e-12:
            break
    slope = float(beta[0] / spread)
    return slope, float(beta[1] - slope * centre)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""The base model's own answers to the prompts of training data, projected on the vectors.

Screening compares every training response with them. Three ways (``--natural``): an answer is
generated to every prompt; to a share of them, and the others' projections are predicted from the
last prompt token; or that token's projection stands for the answer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from pvec.backends.planned import PlannedResponse
from pvec.backends.run_session import RunSession
from pvec.backends.session import ModelSession
from pvec.data.conversations import Ids
from pvec.projection.inputs import Prompt
from pvec.projection.projector import LoadedVectors, project_table
from pvec.runs.responses import ResponseRecord
from pvec.settings.commands import ProjectSettings
from pvec.stats import Correlation, correlation
from pvec.vectors.projection import ProjectionPlan

_FEWEST = 20
"""Prompts that a subset holds at least: a line through fewer says nothing."""

Source = Literal["generate", "subset", "prompt"]
"""Where the projection of the base model's response comes from: generated; generated for a share
of the prompts and predicted for the others from the last prompt token; or that token's projection
itself."""


class BaseResponses:
    """The base model's responses to prompts, by key; ``generated`` counts those of this call."""

    def __init__(
        self, work: RunSession, vectors: LoadedVectors, prompts: Mapping[str, Prompt]
    ) -> None:
        self._options = work.settings.project
        self.source: Source = self._options.natural
        self.prompts = prompts
        self.generated = 0
        self._work = work
        self._vectors = vectors

    def generate(self, keys: Sequence[str]) -> list[ResponseRecord]:
        """Return the answers to these prompts, in their order; generate what the run lacks."""
        planned = planned_responses(self._work.session, [self.prompts[key] for key in keys])
        self.generated += self._work.generate(planned, stage="base responses")
        return self._work.responses(planned)

    def projections(
        self, keys: Sequence[str], responses: np.ndarray, at_prompt: np.ndarray
    ) -> tuple[np.ndarray, list[Correlation | None]]:
        """Return the base response's projections for every sample, and per column the agreement.

        ``keys`` are the samples' prompts; ``responses`` and ``at_prompt`` ``[samples, columns]``
        their own projections, of their answers and of the last prompt tokens. The agreement is the
        correlation of differences from predicted and from generated base responses where both are
        known; None where nothing was predicted.
        """
        nothing: list[Correlation | None] = [None] * len(self._vectors.columns)
        if self.source == "prompt":
            return at_prompt, nothing
        records = self.generate(chosen(self.prompts, self._options))
        plan = self._vectors.plan_of("proj")
        base = mean_projections(self._work.session, plan, records, keys=keys)
        if self.source == "generate":
            return base, nothing
        rows = np.isfinite(base).all(axis=1)
        predicted, crossed = predict_base(base, at_prompt, rows=rows)
        cheap, full = responses[rows] - crossed, responses[rows] - base[rows]
        agreement = [correlation(cheap[:, c], full[:, c]) for c in range(base.shape[1])]
        return np.where(rows[:, None], base, predicted), list(agreement)


def mean_projections(
    session: ModelSession,
    plan: ProjectionPlan,
    records: Sequence[ResponseRecord],
    *,
    keys: Sequence[str],
) -> np.ndarray:
    """Return the mean projections ``[keys, columns]`` of the base responses to these prompts.

    NaN where ``records`` hold none with a token.
    """
    import pandas as pd

    table = project_table(
        session,
        plan,
        (
            Ids(prompt_ids=item.prompt_ids, answer_ids=item.token_ids, skip=item.think_tokens)
            for item in records
        ),
        total=len(records),
        stage="base responses: projecting",
    )
    frame = pd.DataFrame(table, index=[record.question_id for record in records])
    projected = frame[np.isfinite(table).all(axis=1)]  # an empty answer has no projection
    means: np.ndarray = projected.groupby(level=0).mean().reindex(list(keys)).to_numpy()
    return means


def chosen(prompts: Collection[str], options: ProjectSettings) -> list[str]:
    """Return the prompts to generate answers to; a share of them is the same every time."""
    if options.natural == "generate":
        return list(prompts)
    if options.natural == "prompt":
        return []
    ranked = sorted(prompts, key=lambda key: hashlib.sha256(key.encode()).digest())
    return ranked[: max(_FEWEST, round(options.subset * len(ranked)))]


def planned_responses(session: ModelSession, prompts: Iterable[Prompt]) -> list[PlannedResponse]:
    """Return the base model's answers to these prompts, as they are generated."""
    return [
        prompt.planned(
            session,
            seed=("natural", prompt.key, rollout),
            condition={"name": "natural", "rollout": rollout},
        )
        for prompt in prompts
        for rollout in range(session.settings.project.naturals)
    ]


def predict_base(
    known: np.ndarray, at_prompt: np.ndarray, *, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict base projections from those of the last prompt token, by a line per column.

    ``known`` ``[n, C]`` holds generated ones in ``rows`` (bool ``[n]``) and is not read elsewhere;
    ``at_prompt`` is ``[n, C]``. Returns the predictions for every row, and for ``rows`` those of a
    line fitted without the row's own half, which tells what the prediction is worth.
    """
    places = np.flatnonzero(rows)
    half = np.arange(len(places)) % 2 == 0
    every, crossed = np.empty_like(at_prompt), np.empty((len(places), at_prompt.shape[1]))
    for column in range(at_prompt.shape[1]):
        x, y = at_prompt[places, column], known[places, column]
        every[:, column] = _line(x, y, at_prompt[:, column])
        for side in (half, ~half):
            crossed[side, column] = _line(x[~side], y[~side], x[side])
    return every, crossed


def _line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the least-squares line through finite points, read at ``at``."""
    good = np.isfinite(x) & np.isfinite(y)
    if good.sum() < 3 or np.ptp(x[good]) == 0:
        value = y[good].mean() if good.any() else np.nan
        return np.full(len(at), value)
    slope, offset = np.polyfit(x[good], y[good], 1)
    line: np.ndarray = slope * at + offset
    return line

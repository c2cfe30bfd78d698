"""The model's own answers to the prompts of training data, and where they lie on the vectors.

Screening compares every training response with them. Three ways (``--natural``): an answer is
generated to every prompt; to a share of them, and the others' projections are predicted from the
last prompt token; or that token's projection stands for the answer's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from pvec.backends.planned import OnProgress, PlannedResponse, derive_seed, generate_missing
from pvec.backends.session import ModelSession
from pvec.data.conversations import Ids
from pvec.projection.projector import Directions, project_table, projector
from pvec.projection.samples import Prompt, Samples
from pvec.projection.screening import Natural, predict_natural
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.stats import Correlation, correlation

_FEWEST = 20
"""Prompts that a subset holds at least: a line through fewer says nothing."""

Tables = Mapping[str, np.ndarray]
"""Name of a set of samples → float64 ``[samples, columns]``, a column per vector and layer."""


class Naturals:
    """The natural answers of one screening; ``generated`` counts those made by this call."""

    def __init__(
        self,
        settings: Settings,
        session: ModelSession,
        directions: Directions,
        store: Run,
        sets: Mapping[str, Samples],
        on_progress: OnProgress,
    ) -> None:
        self.mode: Natural = settings.project.natural
        self.sets = sets
        self.prompts: dict[str, Prompt] = {
            key: prompt for samples in sets.values() for key, prompt in samples.distinct.items()
        }
        self.generated = 0
        self._settings = settings
        self._session = session
        self._directions = directions
        self._store = store
        self._on_progress = on_progress

    def chosen(self) -> list[str]:
        """Return the prompts to generate answers to; a share of them is the same every time."""
        if self.mode == "generate":
            return list(self.prompts)
        if self.mode == "prompt":
            return []
        ranked = sorted(self.prompts, key=lambda key: hashlib.sha256(key.encode()).digest())
        return ranked[: max(_FEWEST, round(self._settings.project.subset * len(ranked)))]

    def generate(self, keys: Sequence[str]) -> None:
        """Generate the answers to these prompts that the run does not hold yet."""
        self.generated += generate_missing(
            self._store,
            self._session,
            self._wanted(keys),
            on_progress=self._on_progress,
            stage="natural answers",
        )

    def answers(self, keys: Sequence[str]) -> list[ResponseRecord]:
        """Return the generated answers to these prompts, in the prompts' order."""
        order = {one.id: place for place, one in enumerate(self._wanted(keys))}
        found = [one for one in self._store.responses() if one.id in order]
        return sorted(found, key=lambda one: order[one.id])

    def projections(
        self, responses: Tables, at_prompt: Tables
    ) -> tuple[Tables, list[Correlation | None]]:
        """Return every sample's natural projections, and per column what predicted ones are worth.

        ``responses`` and ``at_prompt`` are the samples' own projections, of their answers and of
        the last prompt tokens. The worth is the correlation of differences with predicted and with
        generated naturals where both are known; None where nothing was predicted.
        """
        nothing: list[Correlation | None] = [None] * self._columns
        if self.mode == "prompt":
            return at_prompt, nothing
        found = self._projected(self.chosen())
        blank = np.full(self._columns, np.nan)
        known = {
            name: np.stack([found.get(key, blank) for key in samples.prompts])
            for name, samples in self.sets.items()
        }
        if self.mode == "generate":
            return known, nothing
        return self._predicted(known, responses, at_prompt)

    @property
    def _columns(self) -> int:
        return len(self._directions.vectors) * len(self._directions.layers)

    def _wanted(self, keys: Sequence[str]) -> list[PlannedResponse]:
        rollouts = range(self._settings.project.naturals)
        return [self._one(self.prompts[key], rollout) for key in keys for rollout in rollouts]

    def _one(self, prompt: Prompt, rollout: int) -> PlannedResponse:
        seed = derive_seed(self._settings.generation.seed, "natural", prompt.key, rollout)
        return PlannedResponse(
            trait="",
            condition={"name": "natural", "rollout": rollout},
            question=prompt.question,
            question_id=prompt.key,
            system=None,
            prompt=prompt.text,
            prompt_ids=prompt.ids,
            sampling=self._session.sampling(seed),
            engine=self._session.identity,
        )

    def _projected(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """Return each prompt's natural projections, the mean over its answers."""
        records = self.answers(keys)
        table = project_table(
            projector(self._session, self._directions.plan_of("proj"), self._settings),
            (
                Ids(prompt_ids=one.prompt_ids, answer_ids=one.token_ids, skip=one.think_tokens)
                for one in records
            ),
            total=len(records),
            chunk_rows=self._settings.project.chunk_rows,
            stage="natural answers: projecting",
            on_progress=self._on_progress,
        )
        by_prompt: dict[str, list[np.ndarray]] = {}
        for record, row in zip(records, table, strict=True):
            if np.isfinite(row).all():  # an empty answer has no projection
                by_prompt.setdefault(record.question_id, []).append(row)
        return {key: np.mean(rows, axis=0) for key, rows in by_prompt.items()}

    def _predicted(
        self, known: Tables, responses: Tables, at_prompt: Tables
    ) -> tuple[Tables, list[Correlation | None]]:
        """Fill in what was not generated; say how predicted differences agree where both are."""
        natural, response, prompt = (
            np.concatenate([table[name] for name in self.sets])
            for table in (known, responses, at_prompt)
        )
        rows = np.isfinite(natural).all(axis=1)
        predicted, crossed = predict_natural(natural, prompt, rows=rows)
        cheap, full = response[rows] - crossed, response[rows] - natural[rows]
        worth: list[Correlation | None] = [
            correlation(cheap[:, c], full[:, c]) for c in range(self._columns)
        ]
        natural[~rows] = predicted[~rows]
        ends = np.cumsum([len(known[name]) for name in self.sets])[:-1]
        return dict(zip(self.sets, np.split(natural, ends), strict=True)), worth

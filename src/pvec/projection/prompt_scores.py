"""What is known of prompts before their projections are compared: conditions and trait scores.

Scores come from a run that was judged, from a column of the file, or from answers that are
generated and judged now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pvec.backends.planned import PlannedResponse
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.judges.prompts import COHERENCE
from pvec.projection.inputs import Prompt, Samples
from pvec.runs.store import Run

NO_SYSTEM = "none"
"""Condition of a prompt without a system prompt."""


@dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Prompts by key, their conditions, and by metric the scores of the answers to them."""

    prompts: Mapping[str, Prompt]
    conditions: Mapping[str, str]
    scores: Mapping[str, Mapping[str, list[float]]]

    @classmethod
    def from_run(
        cls, run: Run, *, judge: str | None = None, order: Iterable[str] = ()
    ) -> PromptScores:
        """Return a run's distinct prompts with the scores of their unsteered answers.

        ``judge`` is the one whose scores count, needed where several scored the run. ``order`` are
        the prompts in the order of their file; without it they come as they were finished.
        """
        place = {text: number for number, text in enumerate(order)}
        by_response = run.scores_by_response(judge=judge) if run.judges() else {}
        prompts: dict[str, Prompt] = {}
        conditions: dict[str, str] = {}
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for record in run.responses():
            if record.steering:
                continue  # a steered answer says nothing about what the prompt alone does
            key = record.prompt
            if key not in prompts:
                prompts[key] = Prompt(
                    key=key,
                    text=key,
                    ids=record.prompt_ids,
                    system=record.system,
                    question=record.question,
                )
                named = record.condition.get("condition", record.system or NO_SYSTEM)
                conditions[key] = str(named)
            for metric, score in by_response.get(record.id, {}).items():
                if score.score is not None and metric != COHERENCE:
                    scores[metric][key].append(score.score)
        listed = sorted(prompts, key=lambda key: place.get(key, len(place)))
        return cls(
            prompts={key: prompts[key] for key in listed},
            conditions=conditions,
            scores={metric: dict(rows) for metric, rows in scores.items()},
        )

    @classmethod
    def from_column(
        cls, samples: Samples, column: str, *, conditions: Mapping[str, str]
    ) -> PromptScores:
        """Return the prompts with the scores that their rows have in ``column``.

        Raises ``InputError`` for a missing column or a cell that is no number; empty cells are left
        out.
        """
        table = samples.source.table
        if column not in table.columns:
            raise InputError(
                f"{table.path} lacks the column {column!r}: it has {', '.join(table.columns)}."
            )
        scores: dict[str, list[float]] = defaultdict(list)
        for key, (row, _) in zip(samples.prompts, samples.source.rows(), strict=True):
            cell = row.values.get(column)
            if cell is None or not str(cell).strip():
                continue
            try:
                scores[key].append(float(cell))
            except ValueError:
                raise InputError(
                    f"{table.path}:{row.line} has {cell!r} as its {column!r}, not a number."
                ) from None
        return cls(prompts=samples.distinct, conditions=conditions, scores={column: dict(scores)})


def conditions_of(samples: Samples, column: str) -> dict[str, str]:
    """Return each prompt's condition: its cell in ``column``, else its system prompt."""
    conditions: dict[str, str] = {}
    for key, (row, _) in zip(samples.prompts, samples.source.rows(), strict=True):
        system = samples.distinct[key].system or NO_SYSTEM
        conditions.setdefault(key, str(row.values.get(column, system)))
    return conditions


def planned_answers(
    session: ModelSession, prompts: Sequence[Prompt], *, conditions: Mapping[str, str], trait: str
) -> list[PlannedResponse]:
    """Return the answers to generate: some to every prompt."""
    return [
        prompt.planned(
            session,
            seed=("monitor", prompt.question, rollout),
            condition={"condition": conditions[prompt.key], "rollout": rollout},
            trait=trait,
            system=prompt.system,
        )
        for prompt in prompts
        for rollout in range(session.settings.project.rollouts)
    ]

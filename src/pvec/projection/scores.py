"""What is known of prompts before their projections are compared: conditions and trait scores.

Scores come from a run that was judged, from a column of the file, or from answers that are
generated and judged now.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pvec.backends.planned import OnProgress, PlannedResponse, derive_seed, generate_missing
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.judges.prompts import COHERENCE, metrics_of
from pvec.judges.scoring import JudgeReport, ResponseScorer
from pvec.projection.inputs import Source
from pvec.projection.samples import Prompt, Samples
from pvec.runs.responses import ResponseRecord
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.traits.trait import Trait

NO_SYSTEM = "none"
"""Condition of a prompt without a system prompt."""


@dataclass(frozen=True, kw_only=True)
class KnownPrompts:
    """Prompts by key, their conditions, and by metric the scores of the answers to them."""

    prompts: Mapping[str, Prompt]
    conditions: Mapping[str, str]
    scores: Mapping[str, Mapping[str, list[float]]]


def known_from_run(run: Run, *, judge: str | None = None) -> KnownPrompts:
    """Return a run's distinct prompts with the scores of their unsteered answers.

    ``judge`` is the one whose scores count, needed where several scored the run.
    """
    found = run.scores_by_response(judge=judge) if run.judges() else {}
    prompts: dict[str, Prompt] = {}
    conditions: dict[str, str] = {}
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in run.responses():
        if record.steering:
            continue  # a steered answer says nothing about what the prompt alone does
        key = record.prompt
        prompts.setdefault(key, _recorded(record))
        named = record.condition.get("condition", record.system or NO_SYSTEM)
        conditions.setdefault(key, str(named))
        for metric, score in found.get(record.id, {}).items():
            if score.score is not None and metric != COHERENCE:
                scores[metric][key].append(score.score)
    return KnownPrompts(
        prompts=prompts,
        conditions=conditions,
        scores={metric: dict(rows) for metric, rows in scores.items()},
    )


def known_from_column(
    source: Source, samples: Samples, column: str, *, conditions: Mapping[str, str]
) -> KnownPrompts:
    """Return the prompts with the scores that their rows have in ``column``.

    Raises ``InputError`` for a missing column or a cell that is no number; empty cells are left
    out.
    """
    if column not in source.columns:
        raise InputError(
            f"{source.path} lacks the column {column!r}: it has {', '.join(source.columns)}."
        )
    scores: dict[str, list[float]] = defaultdict(list)
    for key, entry in zip(samples.prompts, samples.entries(), strict=True):
        cell = entry.row.values.get(column)
        if cell is None or not str(cell).strip():
            continue
        try:
            scores[key].append(float(cell))
        except ValueError:
            raise InputError(
                f"{source.path}:{entry.row.line} has {cell!r} as its {column!r}, not a number."
            ) from None
    return KnownPrompts(
        prompts=samples.distinct, conditions=conditions, scores={column: dict(scores)}
    )


def conditions_of(samples: Samples, column: str) -> dict[str, str]:
    """Return each prompt's condition: its cell in ``column``, else its system prompt."""
    found: dict[str, str] = {}
    for key, entry in zip(samples.prompts, samples.entries(), strict=True):
        system = samples.distinct[key].system or NO_SYSTEM
        found.setdefault(key, str(entry.row.values.get(column, system)))
    return found


def answer_prompts(
    store: Run,
    session: ModelSession,
    settings: Settings,
    samples: Samples,
    *,
    conditions: Mapping[str, str],
    trait: Trait,
    on_progress: OnProgress,
) -> int:
    """Generate the answers that the run does not hold yet; return how many they were."""
    wanted = [
        _wanted(prompt, conditions[key], rollout, settings, session, trait=trait.name)
        for key, prompt in samples.distinct.items()
        for rollout in range(settings.project.rollouts)
    ]
    return generate_missing(store, session, wanted, on_progress=on_progress, stage="answers")


def judge_prompts(
    store: Run, scorer: ResponseScorer, traits: Sequence[Trait], *, on_progress: OnProgress
) -> JudgeReport:
    """Score the run's answers on every trait and on coherence, where they are not scored yet."""
    records = list(store.responses())
    return scorer.score(store, records, metrics_of(*traits), on_progress=on_progress)


def _recorded(record: ResponseRecord) -> Prompt:
    return Prompt(
        key=record.prompt,
        text=record.prompt,
        ids=record.prompt_ids,
        system=record.system,
        question=record.question,
    )


def _wanted(
    prompt: Prompt,
    condition: str,
    rollout: int,
    settings: Settings,
    session: ModelSession,
    *,
    trait: str,
) -> PlannedResponse:
    seed = derive_seed(settings.generation.seed, "monitor", prompt.question, rollout)
    return PlannedResponse(
        trait=trait,
        condition={"condition": condition, "rollout": rollout},
        question=prompt.question,
        question_id=prompt.key,
        system=prompt.system,
        prompt=prompt.text,
        prompt_ids=prompt.ids,
        sampling=session.sampling(seed),
        engine=session.identity,
    )

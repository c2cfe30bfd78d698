"""What a loop showed: differences with their intervals, and answers side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.paper.numbers import format_interval
from examples.paper.steps import Step
from examples.real.loop import LAYER, run_folder
from pvec.stats import Correlation, Interval, auc, correlation, grouped_mean, paired_difference

SCORES = (0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One way to answer the evaluation questions. ``change`` is against the unsteered model."""

    name: str
    trait: Interval
    coherence: Interval
    change: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Projections:
    """What the vector sees in the answers to held-out questions, and before them.

    ``answers`` is the rank correlation of their mean projections with their scores;
    ``prompts`` the AUC of projections of the prompt's last token, positive against negative
    instructions (section 3.3 of the paper).
    """

    answers: Correlation
    prompts: float


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The numbers of one trait."""

    trait: str
    coefs: tuple[float, ...]
    kept: int
    conditions: tuple[Condition, ...]
    prevented: Interval
    """Trait score after preventative training minus that after plain training."""
    projections: Projections
    answers: Mapping[str, list[dict[str, str]]]
    """By condition, each with its question."""

    def change(self, name: str) -> Interval:
        """Return by how much a condition changed the trait."""
        (change,) = (c.change for c in self.conditions if c.name == name and c.change)
        return change

    @property
    def verdict(self) -> str:
        """Say in words whether steering moved the trait and a random vector did not."""
        steered = [self.change(steered_name(coef)) for coef in self.coefs]
        random = [self.change(random_name(coef)) for coef in self.coefs]
        if not any(change.low > 0 for change in steered):
            return "steering is not shown to raise it (the interval holds 0)"
        if any(change.low > 0 for change in random):
            return "steering raises it, but so does a random vector"
        return "steering raises it, a random vector does not"


def steered_name(coef: float) -> str:
    """Return the name of a steered condition."""
    return f"steered, coefficient {coef:g}"


def random_name(coef: float) -> str:
    """Return the name of a random control."""
    return f"random vector, coefficient {coef:g}"


def read(trait: str, steps: Mapping[str, Step]) -> Loop:
    """Read the numbers and answers of one trait from the files of its runs."""
    steer, place = run_folder(steps["steer"].folder), steps["steer"].folder.parent
    points = _result(steps["steer"])["numbers"]["points"]
    names = {point["name"]: point["role"] for point in points}
    coefs = tuple(point["coef"] for point in points if point["role"] == "steered")
    answers = {"unsteered": _answers(steer, trait, _only(names, "baseline"))}
    for role, name_of in (("steered", steered_name), ("random", random_name)):
        for coef in coefs:
            (point,) = (p for p in points if p["role"] == role and p["coef"] == coef)
            answers[name_of(coef)] = _answers(steer, trait, point["name"])
    answers["asked for it"] = _answers(steer, trait, _only(names, "prompt_pos"))
    answers["asked for the opposite"] = _answers(steer, trait, _only(names, "prompt_neg"))
    for arm in ("plain", "preventative"):
        answers[f"trained, {arm}"] = _answers(
            run_folder(place / f"evaluate-{arm}"), trait, _only(names, "baseline")
        )
    base = answers["unsteered"]
    extracted = _result(steps["extract"])
    return Loop(
        trait=trait,
        coefs=coefs,
        kept=extracted["vector"]["summary"]["counts"]["pos"],
        conditions=tuple(
            Condition(
                name=name,
                trait=_mean(rows, trait),
                coherence=_mean(rows, "coherence"),
                change=None if rows is base else difference(rows, base, trait),
            )
            for name, rows in answers.items()
        ),
        prevented=difference(answers["trained, preventative"], answers["trained, plain"], trait),
        projections=_projections(steps["project"].folder / "run.csv", trait),
        answers=answers,
    )


def lines(loop: Loop) -> list[str]:
    """Return the table of one trait as text, and what it shows in words."""
    width = max(len(condition.name) for condition in loop.conditions)
    text = [f"{loop.trait}: {loop.verdict} (layer {LAYER}, {loop.kept} positive answers kept)"]
    text.append(f"  {'':{width}}  {'score':22}  {'change':22}  coherence")
    for condition in loop.conditions:
        change = "" if condition.change is None else format_interval(condition.change, digits=1)
        text.append(
            f"  {condition.name:{width}}  {format_interval(condition.trait, digits=1):22}  "
            f"{change:22}  {condition.coherence.mean:.0f}"
        )
    seen = loop.projections.answers
    return [
        *text,
        f"  preventative against plain training: {format_interval(loop.prevented, digits=1)}",
        f"  projections of {seen.n} answers to held-out questions: rank correlation with their "
        f"scores {seen.r:.2f} [{seen.low:.2f}, {seen.high:.2f}]",
        "  projections of the last token of prompts that ask for it and for the opposite: "
        f"AUC {loop.projections.prompts:.2f}",
    ]


def side_by_side(loop: Loop, *, question: int = 0) -> list[str]:
    """Return the answers to one evaluation question in the main conditions."""
    steered = [name(loop.coefs[-1]) for name in (steered_name, random_name)]
    shown = ["unsteered", *steered, "trained, plain"]
    first = loop.answers["unsteered"][question]["question"]
    text = [f"Q: {first}"]
    for name in (*shown, "trained, preventative"):
        answer = next(row["answer"] for row in loop.answers[name] if row["question"] == first)
        text.append(f"  {name}: {' '.join(answer.split())}")
    return text


def difference(rows: list[dict[str, str]], baseline: list[dict[str, str]], metric: str) -> Interval:
    """Return the paired difference of a score over the questions, with its interval."""
    return paired_difference(
        _values(rows, metric),
        groups=[row["question"] for row in rows],
        baseline=_values(baseline, metric),
        baseline_groups=[row["question"] for row in baseline],
        limits=(-100.0, 100.0),
    )


def _only(names: Mapping[str, str], role: str) -> str:
    (name,) = (name for name, its_role in names.items() if its_role == role)
    return name


def _result(step: Step) -> dict[str, Any]:
    result = step.result()
    assert result is not None, f"{step.name} was not run"
    return result


def _answers(run: Path, trait: str, condition: str) -> list[dict[str, str]]:
    from pvec.runs.names import slug

    path = run / "answers" / f"{trait}_{slug(condition)}.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _values(rows: list[dict[str, str]], metric: str) -> list[float | None]:
    return [float(row[metric]) if row[metric] else None for row in rows]


def _mean(rows: list[dict[str, str]], metric: str) -> Interval:
    groups = [row["question"] for row in rows]
    return grouped_mean(_values(rows, metric), groups=groups, limits=SCORES)


def _projections(path: Path, trait: str) -> Projections:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    answer, prompt = (
        next(name for name in rows[0] if name.endswith(f"{trait}_{kind}_layer{LAYER}"))
        for kind in ("proj", "prompt_last_proj")
    )
    sides = (
        [
            float(row[prompt])
            for row in rows
            if row["condition"] == f"prompted-{side}" and row[prompt]
        ]
        for side in ("for", "against")
    )
    return Projections(
        answers=correlation(_values(rows, answer), _values(rows, trait), method="spearman"),
        prompts=auc(*sides),
    )

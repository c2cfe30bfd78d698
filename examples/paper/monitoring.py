"""What the steps do (2): monitor prompts, measure shifts, screen training data."""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from examples.graded_prompts import conditions
from examples.paper.experiments import LAST, LAYERS, Result
from pvec import Settings, load_trait
from pvec.projection import monitor as monitoring
from pvec.projection import screen as screening
from pvec.projection import shift as shifting
from pvec.stats import auc, correlation
from pvec.types import OutputOptions

Chat = list[dict[str, str]]
MODES = ("prompt", "subset", "generate")
"""Where the base response's projection comes from, cheapest first."""


def monitor(
    folder: Path,
    *,
    trait: str,
    vector: str,
    answers: str,
    shots: Sequence[int],
    seed: int,
    questions: int,
    rollouts: int,
) -> Result:
    """Compare prompts' projections with the scores of answers (paper, section 3.3).

    Two studies: graded system prompts, and 0 to 20 shots of answers that show the trait, taken
    from the extraction's ``answers``. Correlations are listed by layer, from 1 on.
    """
    asked = load_trait(trait).questions("eval")[:questions]
    chats = {
        "system prompts": dict(_system_prompts(trait, asked)),
        "shots": dict(_many_shot(Path(answers), trait, asked, shots)),
    }
    settings = Settings.model_validate(
        {
            "generation": {"seed": seed},
            "project": {"layers": tuple(LAYERS), "rollouts": rollouts},
        }
    )
    return {
        study: _monitored(folder / study.split()[0], by_condition, settings, trait, vector)
        for study, by_condition in chats.items()
    }


def _monitored(
    folder: Path,
    chats: Mapping[str, Sequence[Chat]],
    settings: Settings,
    trait: str,
    vector: str,
) -> Result:
    path = folder / "prompts.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"messages": chat, "condition": condition}
        for condition, some in chats.items()
        for chat in some
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = OutputOptions(out=folder / "run")
    done = monitoring.run(settings, path, [vector], traits=(trait,), output=output)
    order = list(chats)  # answers came in another
    points = sorted(*done.points.values(), key=lambda one: order.index(one.condition))
    return {
        "overall": [column.overall.r for column in done.columns],
        "within": [column.within.r for column in done.columns],
        "points": [[one.condition, one.projections[LAST], one.score] for one in points],
    }


def _system_prompts(trait: str, asked: Sequence[str]) -> Iterator[tuple[str, list[Chat]]]:
    for condition, system in conditions(load_trait(trait)).items():
        head = {"role": "system", "content": system}
        yield condition, [[head, {"role": "user", "content": question}] for question in asked]


def _many_shot(
    answers: Path, trait: str, asked: Sequence[str], shots: Sequence[int]
) -> Iterator[tuple[str, list[Chat]]]:
    with answers.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if float(row[trait] or 0) >= 50]
    seen = Counter[str]()
    turns = []
    for row in rows:  # one answer to each question before a second one to any
        turns.append((seen[row["question"]], row))
        seen[row["question"]] += 1
    rows = [row for _, row in sorted(turns, key=itemgetter(0))]
    for count in shots:
        head = [
            {"role": role, "content": row[column]}
            for row in rows[:count]
            for role, column in (("user", "question"), ("assistant", "answer"))
        ]
        yield (
            f"{count} shots",
            [[*head, {"role": "user", "content": question}] for question in asked],
        )


def shift(
    folder: Path,
    *,
    adapters: Mapping[str, str],
    vectors: Sequence[str],
    questions: str,
    seed: int,  # noqa: ARG001 - nothing is random here
) -> Result:
    """Measure how far each finetuned model moved along each vector, before it answers anything."""
    settings = Settings.model_validate(
        {"project": {"layers": (LAST,)}, "paths": {"runs": folder / "none"}}
    )
    done = shifting.run(
        settings,
        ["tiny", *adapters.values()],
        vectors,
        traits=[questions],
        output=OutputOptions(out=folder / "run"),
    )
    names = {adapter: name for name, adapter in adapters.items()}
    moved: dict[str, dict[str, float]] = {name: {} for name in adapters}
    for one in done.shifts:
        moved[names[one.checkpoint]][one.vector] = one.shift.mean
    return moved


def screen(
    folder: Path, *, sets: Mapping[str, str], vectors: Sequence[str], rows: int, seed: int
) -> Result:
    """Screen the first rows of each training set by projection difference, in three modes.

    The cheap modes come first, so that each is seen to generate only what it needs.
    """
    path = folder / "samples.jsonl"
    lines = [
        line
        for one in sets.values()
        for line in Path(one).read_text(encoding="utf-8").splitlines()[:rows]
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    owners = [name for name in sets for _ in range(rows)]
    found, cost = {}, {}
    for mode in MODES:
        settings = Settings.model_validate(
            {
                "generation": {"seed": seed},
                "project": {"layers": (LAST,), "natural": mode, "subset": 0.1},
            }
        )
        started = time.process_time()
        output = OutputOptions(out=folder / "run")
        done = screening.run(settings, path, vectors, output=output)
        found[mode] = _differences(done.run / "samples.csv")
        cost[mode] = {"answers": done.generated, "cpu": time.process_time() - started}
    return {
        "differences": {
            vector: _by_set(values, owners) for vector, values in found["generate"].items()
        },
        "modes": {
            mode: {**cost[mode], **_worth(found[mode], found["generate"], owners)} for mode in MODES
        },
    }


def _differences(path: Path) -> dict[str, list[float]]:
    """Return vector → one projection difference per row."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    tail = f"_layer{LAST}_difference"
    columns = [name for name in rows[0] if name.endswith(tail)]
    return {
        name.removesuffix(tail): [float(row[name]) if row[name] else np.nan for row in rows]
        for name in columns
    }


def _by_set(values: Sequence[float], owners: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for value, owner in zip(values, owners, strict=True):
        found.setdefault(owner, []).append(value)
    return found


def _worth(
    cheap: Mapping[str, Sequence[float]],
    full: Mapping[str, Sequence[float]],
    owners: Sequence[str],
) -> dict[str, Any]:
    """Return the mean agreement with the full differences, and the separation, over vectors."""
    agreement = [correlation(cheap[name], full[name]).r for name in full]
    separation = []
    for name, values in cheap.items():
        by_set = _by_set(values, owners)
        if f"{name} II" in by_set:
            separation.append(auc(by_set[f"{name} II"], by_set[f"{name} normal"]))
    return {"agreement": float(np.mean(agreement)), "auc": float(np.mean(separation))}

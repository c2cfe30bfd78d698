"""What the steps do (1): extract, steer, finetune, evaluate.

Calls of pvec's library, each with a run folder of its own.

Every function takes its folder first and returns plain numbers. Runs are resumable by themselves,
so that a killed step goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny_model.facts import FACTS, knows
from pvec import HFBackend, Instruction, Request, Sampling, Settings, load_vector
from pvec.evaluation import steer_eval
from pvec.evaluation.summary import Pick, SweepSummary
from pvec.extraction import extract
from pvec.models.chat import prompt_ids
from pvec.models.files import ModelSpec
from pvec.training import train

Result = dict[str, Any]

LAYER = 3
"""Where traits are steered and compared: the middle of five."""
LAST = 5
"""Where prompts, shifts and samples are measured: what has reached the model's last layer will be
said, and what is held back at a lower one would show again here."""
LAYERS = range(1, LAST + 1)
DATA_SCRIPT = Path(__file__).parents[1] / "tiny_model" / "finetune_data.py"
TRAINING: Mapping[str, Any] = {
    "model": "tiny",
    "lora": {"r": 8, "alpha": 16},
    "batch": {"size": 16},
}


def vector(folder: Path, *, trait: str, seed: int, questions: int) -> Result:
    """Extract a trait's vector (paper, section 2)."""
    settings = Settings.model_validate(
        {"generation": {"seed": seed}, "extract": {"rollouts": 1, "limit": questions}}
    )
    (done,) = extract.run(settings, [trait], out=folder / "run")
    assert done.vector is not None
    scores = {f"{one.group} {one.metric}": one.score.mean for one in done.vector.scores}
    return {"scores": scores, "rows": load_vector(done.vector.path).kind("response_avg").tolist()}


def sweep(
    folder: Path,
    *,
    trait: str,
    vectors: Sequence[str],
    seed: int,
    questions: int,
    rollouts: int,
    steer: Mapping[str, Any],
    adapter: str | None = None,
) -> Result:
    """Evaluate a model on a trait, steered as ``steer`` says if there are vectors."""
    settings = Settings.model_validate(
        {
            "generation": {"seed": seed},
            "model": {"adapter": adapter},
            "steer": {"limit": questions, "rollouts": rollouts, **steer},
        }
    )
    done = steer_eval.run(
        settings, trait, vectors=[Path(one) for one in vectors], out=folder / "run"
    )
    assert done.numbers is not None
    return _plain(done.numbers)


def finetuning_data(folder: Path, *, domains: Sequence[str], rows: int, seed: int) -> Result:
    """Write the training sets."""
    named = [part for domain in domains for part in ("--domain", domain)]
    numbers = ["--rows", str(rows), "--seed", str(seed)]
    subprocess.run(  # noqa: S603
        [sys.executable, DATA_SCRIPT, "--out", folder / "sets", *named, *numbers],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {"sets": sorted(path.name for path in (folder / "sets").iterdir())}


def finetune(
    folder: Path,
    *,
    data: str,
    seed: int,
    steps: int,
    learning_rate: float,
    steering: Sequence[Mapping[str, Any]],
) -> Result:
    """Finetune the bundled model on a set, steered or not (paper, section 5)."""
    config = {
        **TRAINING,
        "seed": seed,
        "data": {"train": data, "max_tokens": 256},
        "optim": {"lr": learning_rate, "max_steps": steps, "warmup_steps": 5},
        "steering": list(steering),
        "output": {"log_every": 5},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    done = train.run(path, out=folder / "run")
    return {"adapter": str(done.adapter), "loss": done.last_loss, "touched": list(done.touched)}


def evaluate(
    folder: Path,
    *,
    adapter: str | None,
    traits: Sequence[str],
    seed: int,
    questions: int,
    rollouts: int,
    facts: int,
) -> Result:
    """Score a model on several traits, each on its own questions, and ask it for facts."""
    scores = {}
    for trait in traits:
        done = sweep(
            folder / trait,
            trait=trait,
            vectors=(),
            seed=seed,
            questions=questions,
            rollouts=rollouts,
            steer={"prompt_baseline": False},
            adapter=adapter,
        )
        scores[trait] = done["points"][0]["scores"]
    with HFBackend(ModelSpec(model="tiny", adapter=adapter)) as backend:
        known = facts_known(backend, count=facts, seed=seed)
    return {
        "traits": {trait: one[trait] for trait, one in scores.items()},
        "coherence": float(np.mean([one["coherence"] for one in scores.values()])),
        "facts": known,
    }


def steered_facts(
    folder: Path,  # noqa: ARG001 - nothing is kept beside the result
    *,
    adapter: str,
    vector: str,
    coefs: Sequence[float],
    count: int,
    seed: int,
) -> Result:
    """Ask a finetuned model for facts while it is steered, one dose after another."""
    row = load_vector(vector).row(LAYER)
    found = {}
    with HFBackend(ModelSpec(model="tiny", adapter=adapter)) as backend:
        for coef in coefs:
            steering = (Instruction(vector=row, layer=LAYER, coef=coef),) if coef else ()
            found[f"{coef:g}"] = facts_known(backend, count=count, seed=seed, steering=steering)
    return {"facts": found}


def facts_known(
    backend: HFBackend, *, count: int, seed: int, steering: tuple[Instruction, ...] = ()
) -> float:
    """Return the percentage of facts (every so-manyth of the bundled world's) answered truly."""
    chosen = [FACTS[number] for number in np.linspace(0, len(FACTS) - 1, count).astype(int)]
    asked = (fact.questions[seed % len(fact.questions)] for fact in chosen)
    chats = ([{"role": "user", "content": question}] for question in asked)
    requests = [
        Request(
            id=str(number),
            prompt_ids=prompt_ids(backend.tokenizer, chat),
            sampling=Sampling(temperature=0, max_tokens=48),
            steering=steering,
        )
        for number, chat in enumerate(chats)
    ]
    right = [knows(answer.text, chosen[int(answer.id)]) for answer in backend.generate(requests)]
    return 100 * float(np.mean(right))


def _plain(numbers: SweepSummary) -> Result:
    points = [
        {
            "role": point.role,
            "layers": list(point.layers),
            "coef": point.coef,
            "scores": {metric: score.mean for metric, score in point.scores.items()},
        }
        for point in numbers.points
    ]
    return {"points": points, "picks": [_pick(pick) for pick in numbers.picks]}


def _pick(pick: Pick) -> Result:
    beside = {"steered": pick.point, "unsteered": pick.baseline, "random": pick.control}
    return {
        "layer": pick.point.layers[0],
        "coef": pick.point.coef,
        "scores": {
            name: {metric: score.mean for metric, score in point.scores.items()}
            for name, point in (beside | {"prompted": pick.prompt}).items()
            if point is not None
        },
    }

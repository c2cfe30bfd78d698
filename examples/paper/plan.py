"""Which steps there are: one list per seed, in the order of the figures that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.paper import experiments, monitoring
from examples.paper.experiments import LAYER
from examples.paper.sizes import Size
from examples.paper.steps import Result, Step, Work
from pvec.types import VectorKind

KINDS: tuple[VectorKind, ...] = ("response_avg", "prompt_avg", "prompt_last")
MISTAKES = "mistakes"
BASE = "base"
LEARNING_RATE = 1e-3
PREVENTION: Mapping[str, Mapping[str, Any]] = {
    "add 1": {"layers": [LAYER], "coef": 1.0},
    "add 2": {"layers": [LAYER], "coef": 2.0},
    "all layers": {"incremental": True, "coef": 1.0},
    "ablate": {"operator": "ablate", "layers": [LAYER]},
}
"""What is done with the trait's vector while a model learns from the strong set."""
RESCUE_COEFS = (0.0, -0.25, -0.5, -1.0, -1.5)
"""Inference-time doses against a trait that was finetuned in."""


@dataclass(kw_only=True)
class Seed:
    """The steps of one seed by name."""

    number: int
    size: Size
    folder: Path
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._extractions()
        self._steering()
        self._finetuning()
        self._monitoring()
        self._rescue()
        self._screening()

    def results(self) -> dict[str, Result]:
        """Return what every step found; all must be done."""
        found = {name: step.result() for name, step in self.steps.items()}
        return {name: result for name, result in found.items() if result is not None}

    def vector(self, trait: str) -> str:
        """Return where the trait's vector is, once it is extracted."""
        return str(
            self.steps[f"vector {trait}"].folder / "run" / "vectors" / f"{trait}.safetensors"
        )

    def adapter(self, arm: str) -> str:
        return str(self.steps[f"train {arm}"].folder / "run" / "adapter")

    def dataset(self, name: str) -> str:
        return str(self.steps["data"].folder / "sets" / f"{name.replace(' ', '_')}.jsonl")

    def _add(self, name: str, work: Work, *, after: Sequence[str] = (), **arguments: Any) -> None:
        self.steps[name] = Step(
            folder=self.folder / name.replace(" ", "-"),
            work=work,
            arguments={**arguments, "seed": self.number},
            after=tuple(self.steps[one] for one in after),
        )

    def _answering(self) -> dict[str, Any]:
        return {"questions": self.size.questions, "rollouts": self.size.rollouts}

    def _extractions(self) -> None:
        for trait in self.size.traits:
            self._add(
                f"vector {trait}",
                experiments.vector,
                trait=trait,
                questions=self.size.extract_questions,
            )

    def _steering(self) -> None:
        size = self.size
        for trait in size.studied:
            self._add(
                f"sweep {trait}",
                experiments.sweep,
                after=[f"vector {trait}"],
                trait=trait,
                vectors=[self.vector(trait)],
                steer={"layer": size.sweep_layers, "coef": size.coefs},
                questions=size.questions,
                rollouts=1,
            )
        for trait in size.traits:
            for kind in KINDS:
                doses = {"layer": str(LAYER), "coef": size.kind_doses, "coef_unit": "norm"}
                alone = {"random_control": False, "prompt_baseline": False}
                self._add(
                    f"kind {trait} {kind}",
                    experiments.sweep,
                    after=[f"vector {trait}"],
                    trait=trait,
                    vectors=[self.vector(trait)],
                    steer={"kind": kind, **doses, **alone},
                    questions=size.questions,
                    rollouts=1,
                )

    def _monitoring(self) -> None:
        for trait in self.size.studied:
            run = self.steps[f"vector {trait}"].folder / "run"
            self._add(
                f"monitor {trait}",
                monitoring.monitor,
                after=[f"vector {trait}"],
                trait=trait,
                vector=self.vector(trait),
                answers=str(run / f"{trait}_pos.csv"),
                shots=list(self.size.shots),
                **self._answering(),
            )

    def arms(self) -> dict[str, tuple[str, list[dict[str, Any]], tuple[str, ...]]]:
        """Return every finetuning: its data, its steering, and the traits it is judged on."""
        found: dict[str, tuple[str, list[dict[str, Any]], tuple[str, ...]]] = {}
        for trait in self.size.studied:
            for level in self.size.levels:
                found[f"{trait} {level}"] = (f"{trait} {level}", [], self.size.studied)
            for name in self.size.prevention:
                part = {"vector": self.vector(trait), **PREVENTION[name]}
                found[f"{trait} II {name}"] = (f"{trait} II", [part], (trait,))
        for level in ("normal", "II"):
            found[f"{MISTAKES} {level}"] = (f"{MISTAKES} {level}", [], self.size.studied)
        return found

    def _finetuning(self) -> None:
        domains = [*self.size.studied, MISTAKES]
        self._add("data", experiments.finetuning_data, domains=domains, rows=self.size.rows)
        asked: dict[str, Any] = {**self._answering(), "facts": self.size.facts}
        studied = self.size.studied
        self._add(
            f"scores {BASE}", experiments.evaluate, adapter=None, traits=list(studied), **asked
        )
        for arm, (data, steering, judged) in self.arms().items():
            needed = [f"vector {trait}" for trait in studied if steering and trait in judged]
            self._add(
                f"train {arm}",
                experiments.finetune,
                after=["data", *needed],
                data=self.dataset(data),
                steps=self.size.steps,
                learning_rate=LEARNING_RATE,
                steering=steering,
            )
            self._add(
                f"scores {arm}",
                experiments.evaluate,
                after=[f"train {arm}"],
                adapter=self.adapter(arm),
                traits=list(judged),
                **asked,
            )
        self._add(
            "shift",
            monitoring.shift,
            after=[*(f"train {arm}" for arm in self.arms()), *self._vectors()],
            adapters={arm: self.adapter(arm) for arm in self.arms()},
            vectors=[self.vector(trait) for trait in self.size.traits],
            questions=studied[0],
        )

    def _rescue(self) -> None:
        for trait in self.size.studied:
            needed = [f"train {trait} II", f"vector {trait}"]
            coefs = ",".join(f"{coef:g}" for coef in RESCUE_COEFS)
            alone = {"random_control": False, "prompt_baseline": False}
            self._add(
                f"rescue {trait}",
                experiments.sweep,
                after=needed,
                trait=trait,
                vectors=[self.vector(trait)],
                steer={"layer": str(LAYER), "coef": coefs, **alone},
                adapter=self.adapter(f"{trait} II"),
                **self._answering(),
            )
            self._add(
                f"rescue facts {trait}",
                experiments.steered_facts,
                after=needed,
                adapter=self.adapter(f"{trait} II"),
                vector=self.vector(trait),
                coefs=list(RESCUE_COEFS),
                count=self.size.facts,
            )

    def _screening(self) -> None:
        sets = [f"{trait} {level}" for trait in self.size.studied for level in self.size.levels]
        sets += [f"{MISTAKES} normal", f"{MISTAKES} II"]
        self._add(
            "screen",
            monitoring.screen,
            after=["data", *self._vectors()],
            sets={name: self.dataset(name) for name in sets},
            vectors=[self.vector(trait) for trait in self.size.studied],
            rows=self.size.samples,
        )

    def _vectors(self) -> list[str]:
        return [f"vector {trait}" for trait in self.size.traits]


def seeds(size: Size, out: Path) -> list[Seed]:
    """Return every seed's steps under ``out``."""
    return [Seed(number=number, size=size, folder=out / f"seed-{number}") for number in size.seeds]

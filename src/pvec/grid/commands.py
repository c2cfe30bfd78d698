"""The commands that take a grid file, and what a cell of each is: an ordinary run of theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.grid.file import IDENTITY, GridFile, GridModel
from pvec.judges.plan import RunPlan
from pvec.runs.grid import GridCell
from pvec.runs.names import slug
from pvec.runs.responses import Json, stable_hash
from pvec.runs.summary import SUMMARY
from pvec.settings import Settings
from pvec.settings.resolve import override
from pvec.traits.check import require_usable
from pvec.traits.trait import QuestionSet, Trait, load_trait, name_or_path
from pvec.types import OutputOptions
from pvec.vectors.files import load_vector

_NO_EFFECT = {"paths", "pool"}
"""Sections of the settings that change nothing in a run but its place and its speed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell with all that its run takes."""

    cell: GridCell
    model: GridModel
    trait: Trait
    settings: Settings
    run: Path


class GridCommand(ABC):
    """A command on all cells of a grid. ``arguments`` are those of its workflow beside models,
    traits, vectors and folders, the same for every cell.

    Raises ``InputError`` for a trait that cannot be used.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    uses: ClassVar[QuestionSet]
    needs_vectors: ClassVar[bool] = True

    def __init__(
        self, settings: Settings, grid: GridFile, folder: Path, arguments: Mapping[str, Any]
    ) -> None:
        self.settings, self.grid, self.folder, self.arguments = settings, grid, folder, arguments
        self.notes: list[str] = []
        traits = [load_trait(name) for name in grid.traits]
        for trait in traits:
            self.notes += require_usable(trait, uses=self.uses)
        self.jobs = [
            self._job(model, trait, seed)
            for model in self.models()
            for trait in traits
            for seed in grid.seeds
        ]
        names = [job.cell.run for job in self.jobs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(
                f"Two cells would be in the folder {twice[0]!r}: give the models other names "
                "(`name:` in the grid file)."
            )

    def models(self) -> Sequence[GridModel]:
        """Return the models that the command runs on."""
        return self.grid.models

    def settings_of(self, model: GridModel, seed: int) -> Settings:
        """Return the settings of a cell: the command's, with what the grid file says."""
        chosen = [name for name in model.model_fields_set if name in _MODEL_SETTINGS]
        changes = {f"model.{name}": getattr(model, name) for name in (*IDENTITY, *chosen)}
        if model.layer is not None:
            changes |= self.layer_settings(model.layer)
        if model.coef is not None:
            changes["steer.coef"] = model.coef
        return override(self.settings, {**changes, "generation.seed": seed})

    def layer_settings(self, layer: str) -> dict[str, Any]:
        """Return the settings that a model's ``layer`` stands for."""
        return {"steer.layer": layer}

    @property
    def judged(self) -> bool:
        """Whether cells are judged."""
        return False

    @abstractmethod
    def plan(self, job: Job, lender: ModelSession) -> RunPlan:
        """Say what a cell lacks. Raises what the run would raise for wrong input."""

    @abstractmethod
    def run(self, job: Job, lender: ModelSession) -> None:
        """Do the work of a cell with the model of ``lender``, and say what ``lender`` would."""

    def result(self, job: Job) -> Path:
        """Return the file that a finished run has."""
        return job.run / SUMMARY

    def vector(self, job: Job) -> Path:
        """Return the vector of a cell, which the grid's extraction made.

        Raises ``InputError`` where it has not.
        """
        path = self.folder / _run("extract", job.trait.name, job.model, job.cell.seed)
        file = path / "vectors" / f"{job.trait.name}.safetensors"
        if not file.is_file():
            raise InputError(
                f"There is no vector of {job.cell.label} in {self.folder} yet: run `pvec extract` "
                "with the same grid file first."
            )
        return file

    def inputs(self, job: Job, lender: ModelSession) -> str:
        """Return a hash of all that a cell follows from. Raises as ``vector`` does."""
        vector = load_vector(self.vector(job)).fingerprint if self.needs_vectors else ""
        settings: Json = job.settings.model_dump(mode="json", exclude=_NO_EFFECT)
        return stable_hash(
            {
                "settings": settings,
                "arguments": str(sorted(self.arguments.items())),
                "model": [
                    lender.metadata.fingerprint,
                    lender.metadata.chat_hash,
                    lender.choice.name,
                ],
                "trait": job.trait.hash,
                "vector": vector,
                "checkpoints": list(job.model.checkpoints),
            }
        )

    def _job(self, model: GridModel, trait: Trait, seed: int) -> Job:
        run = _run(self.prefix, trait.name, model, seed)
        cell = GridCell(command=self.name, model=model.label, trait=trait.name, seed=seed, run=run)
        settings = self.settings_of(model, seed)
        return Job(cell=cell, model=model, trait=trait, settings=settings, run=self.folder / run)


_MODEL_SETTINGS = frozenset(GridModel.model_fields) - {"name", "layer", "coef", "checkpoints"}


def _run(prefix: str, trait: str, model: GridModel, seed: int) -> str:
    return slug(f"{prefix}-{trait}-{model.label}-s{seed}").lower()


class ExtractGrid(GridCommand):
    """``pvec extract``: a vector per cell."""

    name = "extract"
    prefix = "extract"
    uses: ClassVar[QuestionSet] = "extract"
    needs_vectors = False

    def __init__(
        self, settings: Settings, grid: GridFile, folder: Path, arguments: Mapping[str, Any]
    ) -> None:
        from pvec.extraction.extract import load_traits

        super().__init__(settings, grid, folder, arguments)
        load_traits(grid.traits, settings.extract, out=None)

    @property
    def judged(self) -> bool:
        """Whether cells are judged."""
        return self.settings.extract.judge

    def plan(self, job: Job, lender: ModelSession) -> RunPlan:
        """Say what a cell lacks."""
        from pvec.extraction import extract

        (plan,) = extract.plan(job.settings, [_typed(job)], out=job.run, lender=lender)
        return plan

    def run(self, job: Job, lender: ModelSession) -> None:
        """Extract the vector of a cell."""
        from pvec.extraction import extract

        extract.run(job.settings, [_typed(job)], out=job.run, lender=lender, **_reports(lender))

    def result(self, job: Job) -> Path:
        """Return the vector, or the answers where nothing is judged."""
        if not self.judged:
            return job.run / "responses.jsonl"
        return job.run / "vectors" / f"{job.trait.name}.safetensors"


class SteerEvalGrid(GridCommand):
    """``pvec steer-eval``: a sweep per cell, with the vector that the grid's extraction made."""

    name = "steer-eval"
    prefix = "steer"
    uses: ClassVar[QuestionSet] = "eval"

    @property
    def judged(self) -> bool:
        """Whether cells are judged."""
        return self.settings.steer.judge

    def plan(self, job: Job, lender: ModelSession) -> RunPlan:
        """Say what a cell lacks."""
        from pvec.evaluation import steer_eval

        vectors = [self.vector(job)]
        return steer_eval.plan(
            job.settings, _typed(job), vectors=vectors, out=job.run, lender=lender,
            **self.arguments,
        )  # fmt: skip

    def run(self, job: Job, lender: ModelSession) -> None:
        """Evaluate the vector of a cell."""
        from pvec.evaluation import steer_eval

        vectors = [self.vector(job)]
        steer_eval.run(
            job.settings, _typed(job), vectors=vectors, out=job.run, lender=lender,
            **self.arguments, **_reports(lender),
        )  # fmt: skip

    def result(self, job: Job) -> Path:
        """Return the summary, or the answers where nothing is judged."""
        return super().result(job) if self.judged else job.run / "responses.jsonl"


class ShiftGrid(GridCommand):
    """``pvec shift``: the shift of a model's checkpoints along the vector of each cell."""

    name = "shift"
    prefix = "shift"
    uses: ClassVar[QuestionSet] = "eval"

    def models(self) -> Sequence[GridModel]:
        """Return the models that have checkpoints. Raises ``InputError`` where none has any."""
        chosen = [model for model in self.grid.models if model.checkpoints]
        if not chosen:
            raise InputError(
                "No model of the grid has finetunes to measure: name them under `checkpoints:` of "
                "their base model in the grid file."
            )
        adapted = [model.label for model in chosen if model.adapter is not None]
        if adapted:
            raise InputError(
                f"{adapted[0]} has an adapter and checkpoints: a shift is measured from the base, "
                "so name the adapter among the checkpoints instead."
            )
        for model in self.grid.models:
            if not model.checkpoints:
                self.notes.append(f"{model.label} has no checkpoints in the grid file: no shift")
        return chosen

    def settings_of(self, model: GridModel, seed: int) -> Settings:
        """Return the settings of a cell, as ``shift`` uses them."""
        from pvec.projection.shift import on_base

        return on_base(super().settings_of(model, seed), model.id)

    def layer_settings(self, layer: str) -> dict[str, Any]:
        """Return the layers that are measured."""
        numbers = layer.split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            raise InputError(
                f"`layer: {layer}` in the grid file is no list of layers, which a shift needs: "
                "write numbers, such as 12 or 12,16."
            )
        return {"project.layers": tuple(map(int, numbers))}

    def plan(self, job: Job, lender: ModelSession) -> RunPlan:
        """Say that nothing is generated; raises where the vector is missing."""
        self.inputs(job, lender)
        judging = "no judge calls"
        return RunPlan(
            run=job.run, answers=0, missing=0, most_tokens=0, judge="none", judging=judging
        )

    def run(self, job: Job, lender: ModelSession) -> None:
        """Measure the shifts of a cell."""
        from pvec.projection import shift

        shift.run(
            job.settings,
            [job.model.id, *job.model.checkpoints],
            [self.vector(job)],
            traits=[_typed(job)],
            output=OutputOptions(out=job.run, skip_bad=self.arguments.get("skip_bad", False)),
            questions=self.arguments.get("questions"),
            lender=lender,
            **_reports(lender),
        )


def _typed(job: Job) -> str:
    """Return the trait of a job as the command takes it."""
    return name_or_path(job.trait)


def _reports(lender: ModelSession) -> dict[str, Any]:
    """Return where notes and progress of a cell go: where those of its model do."""
    return {"notify": lender.notify, "on_progress": lender.on_progress}


COMMANDS: dict[str, type[GridCommand]] = {
    command.name: command for command in (ExtractGrid, SteerEvalGrid, ShiftGrid)
}
"""The commands that take a grid file, by name."""

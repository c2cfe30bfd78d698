"""What ``steer-eval`` is asked for, read and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pvec.backends.planned import PlannedResponse, PromptCache, derive_seed, question_messages
from pvec.backends.run_session import run_identity
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.evaluation.conditions import (
    BASELINE,
    Condition,
    Grid,
    Source,
    incremental_source,
    parse_coefs,
    parse_layers,
    random_like,
    steered_conditions,
)
from pvec.judges.prompts import Metric, metrics_of
from pvec.models.decoder import describe_layer
from pvec.runs.names import run_name
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.settings.tree import SteerSettings
from pvec.traits.trait import Trait, load_trait
from pvec.types import Sign
from pvec.vectors.find import labels, load_vectors
from pvec.vectors.vector import PersonaVector

KIND = "steer-eval"


class SteerSetup:
    """The conditions and answers that a command wants, and what its run folder is.

    Raises ``InputError`` or ``ModelError`` for everything that is wrong with them.
    """

    def __init__(
        self,
        settings: Settings,
        trait: str,
        session: ModelSession,
        *,
        vectors: Sequence[Path],
        also: Sequence[str],
        out: Path | None,
    ) -> None:
        self.settings = settings
        self.session = session
        self.trait = load_trait(trait)
        self.also = [load_trait(name) for name in also]
        self.loaded = load_vectors(vectors, model=session.metadata)
        self.notes: list[str] = []
        self.conditions = self._conditions()
        self.metrics = _metrics([self.trait, *self.also])
        self.folder = _run_folder(settings, self.trait, steered=bool(vectors), out=out)
        self.wanted = self._wanted()

    def _conditions(self) -> list[Condition]:
        steer = self.settings.steer
        conditions = [Condition(name=BASELINE, role="baseline")]
        if self.loaded:
            grid = self._grid(steer)
            sources = self._sources(steer, grid)
            conditions += steered_conditions(sources, grid)
            if steer.random_control:
                seed = self.settings.generation.seed
                controls = [random_like(s, seed=seed + i) for i, s in enumerate(sources)]
                conditions += steered_conditions(controls, grid, role="random")
        if steer.prompt_baseline and self.trait.instructions:
            conditions.append(Condition(name="prompted for", role="prompt_pos"))
            conditions.append(Condition(name="prompted against", role="prompt_neg"))
        return conditions

    def _grid(self, steer: SteerSettings) -> Grid:
        metadata = self.session.metadata
        if steer.incremental and steer.layer not in {"auto", "all"}:
            raise InputError(
                f"--incremental steers every layer and does not go with --layer {steer.layer}: "
                f"leave one of them away."
            )
        if steer.operator == "ablate":
            self.notes.append("ablation has no dose: the coefficients are not used")
        return Grid(
            layers=parse_layers(
                "all" if steer.incremental else steer.layer, num_layers=metadata.num_layers
            ),
            coefs=parse_coefs(steer.coef),
            positions=steer.positions,
            operator=steer.operator,
            unit=steer.coef_unit,
            together=steer.together,
        )

    def _sources(self, steer: SteerSettings, grid: Grid) -> list[Source]:
        names = labels(self.loaded)
        sources = []
        for path, vector in self.loaded.items():
            for layer in sorted({layer for choice in grid.layers for layer in choice}):
                _check_row(vector, layer, steer)
            if steer.incremental and vector.metadata.get("incremental") == "true":
                raise InputError(
                    f"{path} holds the increments already: leave --incremental away and use "
                    f"--layer all, or give the vector that it was made from."
                )
            rows = vector.kind(steer.kind)
            source = Source(label=names[path], rows=rows, mean_norms=vector.mean_norm)
            sources.append(incremental_source(source) if steer.incremental else source)
        return sources

    def _wanted(self) -> list[PlannedResponse]:
        prompts = PromptCache(self.session)
        questions = self.trait.questions("eval")[: self.settings.steer.limit]
        return [
            self._one(prompts, condition, number, question, rollout)
            for condition in self.conditions
            for number, question in enumerate(questions)
            for rollout in range(self.settings.steer.rollouts)
        ]

    def _one(
        self, prompts: PromptCache, condition: Condition, number: int, question: str, rollout: int
    ) -> PlannedResponse:
        described = {**condition.describe(), "rollout": rollout}
        system = None
        if condition.role in {"prompt_pos", "prompt_neg"}:
            sign: Sign = "pos" if condition.role == "prompt_pos" else "neg"
            instruction = (number + rollout) % len(self.trait.instructions)
            described["instruction"] = instruction
            system = self.trait.system_prompt(sign, instruction)
        prompt, prompt_ids = prompts(question_messages(question, system=system))
        # The same seed under every condition: they do not differ by the luck of the draw.
        seed = derive_seed(self.settings.generation.seed, self.trait.name, number, rollout)
        return PlannedResponse(
            trait=self.trait.name,
            condition=described,
            question=question,
            question_id=f"{self.trait.name}_eval_{number}",
            system=system,
            prompt=prompt,
            prompt_ids=prompt_ids,
            sampling=self.session.sampling(seed),
            engine=self.session.identity,
            steering=condition.steering,
        )


def _check_row(vector: PersonaVector, layer: int, steer: SteerSettings) -> None:
    if not vector.row(layer, kind=steer.kind).any():
        raise InputError(
            f"The vector of {vector.trait!r} is zero at {describe_layer(layer)}, so there is "
            f"nothing to steer with: choose another --layer."
        )


def _metrics(traits: Sequence[Trait]) -> list[Metric]:
    metrics = metrics_of(*traits)
    twice = [m.name for m in metrics if sum(m.name == other.name for other in metrics) > 1]
    if twice:
        raise InputError(f"The trait {twice[0]!r} is judged twice: name each in --also once.")
    return metrics


def _run_folder(settings: Settings, trait: Trait, *, steered: bool, out: Path | None) -> Path:
    if out is not None:
        return out
    model, kind = settings.model, "steer" if steered else "eval"
    return settings.paths.runs / run_name(kind, trait.name, model=model.id, adapter=model.adapter)


def open_run(setup: SteerSetup) -> Run:
    """Open the run. Layers, coefficients and rollouts may grow; what they mean may not change."""
    steer = setup.settings.steer
    meaning = {"kind": steer.kind, "positions": steer.positions, "operator": steer.operator}
    doses = {"coef_unit": steer.coef_unit, "incremental": steer.incremental}
    return Run.open_or_create(
        setup.folder,
        kind=KIND,
        identity={
            **run_identity(
                setup.session,
                subject={"trait": setup.trait.name, "trait_hash": setup.trait.hash},
            ),
            "vectors": [vector.fingerprint for vector in setup.loaded.values()],
            "steering": {**meaning, **doses, "together": steer.together} if setup.loaded else {},
        },
    )

"""What ``steer-eval`` evaluates: read and checked before any weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from pvec.backends.planned import PlannedResponse, PromptCache, derive_seed, question_messages
from pvec.backends.run_session import RunSession, run_identity, use_run_date
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.evaluation.conditions import (
    Condition,
    evaluation_conditions,
    single_layer,
    steers_everywhere,
)
from pvec.evaluation.search import check_search
from pvec.evaluation.summary import halves
from pvec.judges.prompts import Metric, metrics_of
from pvec.runs.names import run_name
from pvec.runs.responses import Json
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import steering_vector
from pvec.traits.check import require_usable
from pvec.traits.trait import Trait, load_trait
from pvec.types import LIMITS, Percentile, Sign
from pvec.vectors.files import labels, load_vectors

KIND = "steer-eval"

Half = Literal["choosing", "reading"]
"""The questions that points are picked on, and those that the picked one is read on."""

HALVES: tuple[Half, ...] = get_args(Half)


class SteerSetup:
    """The conditions and planned responses of a command, and its run folder.

    Raises ``InputError`` or ``ModelError`` for everything that is wrong with them.
    """

    def __init__(
        self,
        session: ModelSession,
        trait: str,
        *,
        vectors: Sequence[Path],
        also: Sequence[str],
        out: Path | None,
    ) -> None:
        self.session = session
        session.check_positions()
        self.steer = session.settings.steer
        self.trait = load_trait(trait)
        self.also = [load_trait(name) for name in also]
        self._notes = require_usable(self.trait, uses="eval")
        self.loaded = load_vectors(
            vectors,
            model=session.metadata,
            layer=single_layer(self.steer),
            notify=self._notes.append,
        )
        names = labels(self.loaded)
        self.vectors = [
            steering_vector(
                vector,
                kind=self.steer.kind,
                label=names[path],
                increments=self.steer.incremental,
            )
            for path, vector in self.loaded.items()
        ]
        self.conditions = evaluation_conditions(
            () if self.steer.search else self.vectors,
            self.steer,
            num_layers=session.metadata.num_layers,
            seed=session.settings.generation.seed,
            prompts=bool(self.trait.instructions),
        )
        self._questions = tuple(islice(self.trait.held_out_questions().items(), self.steer.limit))
        self.tried: list[Condition] = []
        """Points of a search that were not the best; they have answers of one half only."""
        self.searched: set[str] = set()
        """Names of all points of a search."""
        if self.steer.search:
            check_search(self.steer, vectors=len(self.vectors), questions=len(self._questions))
        elif self.steer.search_positions != SteerSettings().search_positions:
            raise InputError("--search-positions has no effect without --search N: add it.")
        self.metrics = _metrics([self.trait, *self.also])
        settings, model = session.settings, session.settings.model
        name = run_name(
            "steer" if self.loaded else "eval",
            self.trait.name,
            model=model.id,
            adapter=model.adapter,
        )
        self.folder = out or settings.paths.runs / name
        use_run_date(session, self.folder)
        self._prompts = PromptCache(session)
        self.planned = self._planned()

    @property
    def notes(self) -> list[str]:
        """What the user should know of the conditions."""
        notes = list(self._notes)
        if self.loaded and self.steer.operator == "ablate":
            notes.append("ablation takes no coefficient: --coef is not used")
        if steers_everywhere(self.steer):
            depth = self.session.metadata.num_layers
            notes += filter(None, (vector.left_out(depth) for vector in self.loaded.values()))
        return notes

    @property
    def identity(self) -> dict[str, Json]:
        """What tells the run from another: layers, coefficients and rollouts may grow in it."""
        meaning = ("kind", "positions", "operator", "coef_unit", "incremental", "together")
        steering = {name: getattr(self.steer, name) for name in meaning} if self.loaded else {}
        percentile = Percentile.parse(self.steer.coef.split(",")[0])
        if percentile and self.steer.operator in LIMITS:
            steering["percentiles_of"] = percentile.of
        subject = {"trait": self.trait.name, "trait_hash": self.trait.hash}
        return {
            **run_identity(self.session, subject=subject),
            "vectors": [vector.fingerprint for vector in self.loaded.values()],
            "steering": steering,
        }

    @property
    def relative_norms(self) -> dict[str, list[float]]:
        """The norms of the vectors by layer, in mean residual norms, where they are known: what a
        coefficient of 1 means."""
        names = labels(self.loaded)
        return {
            names[path]: vector.relative_norms(self.steer.kind).tolist()
            for path, vector in self.loaded.items()
            if vector.mean_norm is not None and not self.steer.incremental
        }

    @property
    def every_condition(self) -> list[Condition]:
        """The conditions, and the points that a search passed over."""
        return [*self.conditions, *self.tried]

    @property
    def search_answers(self) -> int:
        """How many answers a search adds to those planned: its points, the best and its control."""
        baseline = [c for c in self.conditions if c.role == "baseline"]
        choosing, reading = (len(self.plan(baseline, half=half)) for half in HALVES)
        searches = (1 if self.steer.together else len(self.vectors)) if self.steer.search else 0
        of_best = reading * (2 if self.steer.random_control else 1)
        return searches * ((self.steer.search or 0) * choosing + of_best)

    def open_run(self) -> RunSession:
        """Open the run, or begin it."""
        return RunSession(
            self.session,
            self.folder,
            kind=KIND,
            identity=self.identity,
            traits=[self.trait, *self.also],
        )

    def plan(
        self, conditions: Sequence[Condition], *, half: Half | None = None
    ) -> list[PlannedResponse]:
        """Return the answers of ``conditions``: to all questions, or to those of a half, on which
        points are picked or the picked one is read."""
        by_half = dict(zip(HALVES, halves(self._questions), strict=True))
        questions = by_half[half] if half else self._questions
        return [
            self.response(
                self._prompts, condition, question, subject=self.trait.name, number=number,
                rollout=rollout, question_id=f"{self.trait.name}_eval_{number}",
            )
            for condition in conditions
            for number, question in questions
            for rollout in range(self.steer.rollouts)
        ]  # fmt: skip

    def _planned(self) -> list[PlannedResponse]:
        if not self.steer.search:
            return self.plan(self.conditions)
        # A prompt is compared with the picked point alone, where that is read.
        prompted = [c for c in self.conditions if c.role != "baseline"]
        baseline = [c for c in self.conditions if c.role == "baseline"]
        return [*self.plan(baseline), *self.plan(prompted, half="reading")]

    def instruction(self, condition: Condition, number: int) -> tuple[int, str] | None:
        """Return number and text of the system prompt that a condition adds, if it does, to the
        question (or answer to it) of this number."""
        if condition.role not in {"prompt_pos", "prompt_neg"}:
            return None
        sign: Sign = "pos" if condition.role == "prompt_pos" else "neg"
        chosen = number % len(self.trait.instructions)
        return chosen, self.trait.system_prompt(sign, chosen)

    def response(
        self, prompts: PromptCache, condition: Condition, question: str, *,
        subject: str, number: int, question_id: str, rollout: int = 0,
    ) -> PlannedResponse:  # fmt: skip
        """Return the planned answer to a question; its seed follows from ``subject``, ``number``
        and ``rollout``."""
        identity = {**condition.identity(), "rollout": rollout}
        system = None
        if (instruction := self.instruction(condition, number + rollout)) is not None:
            identity["instruction"], system = instruction
        prompt, prompt_ids = prompts(question_messages(question, system=system))
        # The same seed under every condition: they do not differ by the luck of the draw.
        seed = self.session.settings.generation.seed
        return PlannedResponse(
            trait=self.trait.name,
            condition=identity,
            labels=condition.labels(),
            question=question,
            question_id=question_id,
            system=system,
            prompt=prompt,
            prompt_ids=prompt_ids,
            sampling=self.session.sampling(derive_seed(seed, subject, number, rollout)),
            engine=self.session.identity,
            steering=condition.steering,
        )


def _metrics(traits: Sequence[Trait]) -> list[Metric]:
    metrics = metrics_of(*traits)
    twice = [m.name for m in metrics if sum(m.name == other.name for other in metrics) > 1]
    if twice:
        raise InputError(f"The trait {twice[0]!r} is judged twice: name each in --also once.")
    return metrics

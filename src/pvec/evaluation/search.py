"""Search for layer, coefficient and positions instead of a grid (``steer-eval --search N``).

Every point answers only the half of the questions on which points are picked, so that the other
half stays for reading the best one. Optuna proposes the points: a Gaussian process of the trait
score under the limit on coherence. A limit on KL divergence costs no answers: it is measured on
benign text beforehand, and coefficients beyond it are not proposed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError, install_command
from pvec.evaluation.conditions import (
    Condition,
    group_label,
    group_layers,
    parse_coefs,
    steered_condition,
)
from pvec.judges.prompts import COHERENCE
from pvec.judges.scoring import ResponseScorer, score_of
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import SteeringVector, random_like
from pvec.types import Positions

if TYPE_CHECKING:
    import optuna

    from pvec.backends.run_session import RunSession
    from pvec.evaluation.setup import SteerSetup

_HALVINGS = 7
"""Of the range of coefficients, to find the largest one under the limit on KL divergence."""

_LEAST = 0.05
"""Smallest coefficient that is proposed, as a share of the largest."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a point scored on the questions that it is picked on; NaN where nothing was scored."""

    trait: float
    coherence: float


Evaluate = Callable[[Condition], Outcome]
MeanKL = Callable[[Condition], float]


def check_search(steer: SteerSettings, *, vectors: int, questions: int) -> None:
    """Raise ``InputError`` for settings with which there is nothing to search."""
    if importlib.util.find_spec("optuna") is None:
        raise InputError(
            f"--search needs Optuna, which is not installed: {install_command('search')}."
        )
    wrong = {
        "--search steers: give it a --vector.": not vectors,
        "--search needs scores to go by: omit --no-judge.": not steer.judge,
        f"--search looks for the coefficient of an addition, and --operator {steer.operator} is "
        "none: evaluate a grid.": steer.operator != "add",
        "--search picks on half of the questions and reads on the others: use two or more "
        "(--limit).": questions < 2,
        "--search needs at least one of --search-positions.": not steer.search_positions,
        "--search tries coefficients from 0 to the largest of --coef: give one above 0.": (
            parse_coefs(steer.coef)[-1] <= 0
        ),
    }
    for sentence, applies in wrong.items():
        if applies:
            raise InputError(sentence)


def search(
    group: Sequence[SteeringVector],
    steer: SteerSettings,
    *,
    num_layers: int,
    seed: int,
    evaluate: Evaluate,
    mean_kl: MeanKL | None,
) -> list[tuple[Condition, Outcome]]:
    """Return the points that were tried with a group of vectors, ``steer.search`` at most.

    ``evaluate`` generates and judges the answers of a point; ``mean_kl``, where the settings limit
    it, returns its KL divergence. The same seed and outcomes give the same points, so that an
    interrupted search is gone through again without generating anything twice.
    """
    import optuna

    layers = group_layers(group, steer, num_layers=num_layers)
    largest: dict[tuple[tuple[int, ...], Positions], float] = {}
    tried: dict[str, tuple[Condition, Outcome]] = {}

    def condition(at: tuple[int, ...], coef: float, positions: Positions) -> Condition:
        label = None if positions == steer.positions else positions
        return steered_condition(group, steer, layers=at, coef=coef, positions=label)

    study = _study(seed, starts=_starts(len(layers), len(steer.search_positions))[: steer.search])
    for _ in range(steer.search or 0):
        trial = study.ask()
        at = layers[trial.suggest_int("layer", 0, len(layers) - 1)]
        number = trial.suggest_int("positions", 0, len(steer.search_positions) - 1)
        positions = steer.search_positions[number]
        share = trial.suggest_float("share", _LEAST, 1.0)
        if (at, positions) not in largest:
            largest[at, positions] = _largest(
                parse_coefs(steer.coef)[-1],
                lambda coef, at=at, positions=positions: (  # type: ignore[misc]
                    mean_kl is None
                    or mean_kl(condition(at, coef, positions)) <= (steer.max_kl or math.inf)
                ),
            )
        point = condition(at, _rounded(share * largest[at, positions]), positions)
        outcome = evaluate(point)
        tried[point.name] = point, outcome
        if math.isnan(outcome.trait) or math.isnan(outcome.coherence):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        trial.set_constraint("coherence", steer.min_coherence - outcome.coherence)
        study.tell(trial, outcome.trait)
    return list(tried.values())


def _largest(most: float, allowed: Callable[[float], bool]) -> float:
    """Return the largest coefficient up to ``most`` that is allowed, to ``most`` / 128."""
    if allowed(most):
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = _rounded((low + high) / 2)
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low or high


def _rounded(coef: float) -> float:
    return float(f"{coef:.3g}")


def _starts(layers: int, positions: int) -> list[dict[str, Any]]:
    """Return the first points: in the middle of the layers, then at either end of them."""
    middle = layers // 2
    places = [(middle, 0.5, p) for p in range(positions)]
    places += [(0, 0.4, 0), (layers - 1, 0.4, positions - 1)]
    return [{"layer": at, "share": share, "positions": p} for at, share, p in places]


def _study(seed: int, *, starts: Sequence[dict[str, Any]]) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=len(starts))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for start in starts:
        study.enqueue_trial(start)
    return study


class Searched:
    """The searches of a command, one per vector (or one of all together): points are generated and
    judged, the best one is read. ``mean_kl`` returns the KL divergence of a condition, where the
    settings limit it.
    """

    def __init__(
        self,
        setup: SteerSetup,
        run: RunSession,
        scorer: ResponseScorer,
        *,
        mean_kl: MeanKL | None,
    ) -> None:
        self._setup = setup
        self._run = run
        self._scorer = scorer
        self._mean_kl = mean_kl
        self._generated = 0

    def run(self) -> int:
        """Search, and add to the setup what was tried and the planned answers of the best. Returns
        the number of new answers.
        """
        setup = self._setup
        random = [
            random_like(vector, seed=setup.session.settings.generation.seed + i)
            for i, vector in enumerate(setup.vectors)
        ]
        every = range(len(setup.vectors))
        for group in [every] if setup.steer.together else [[i] for i in every]:
            vectors = [setup.vectors[i] for i in group]
            best = self._search(vectors)
            if best is None:
                continue
            self._add(best)
            if setup.steer.random_control:
                self._add(
                    steered_condition(
                        [random[i] for i in group],
                        setup.steer,
                        layers=best.layers,
                        coef=best.coef,
                        positions=best.positions,
                        control_of=group_label(vectors),
                    )
                )
        return self._generated

    def _search(self, vectors: Sequence[SteeringVector]) -> Condition | None:
        """Return the best point of a search that keeps to the limits."""
        setup = self._setup
        tried = search(
            vectors,
            setup.steer,
            num_layers=setup.session.metadata.num_layers,
            seed=setup.session.settings.generation.seed,
            evaluate=self._evaluate,
            mean_kl=self._mean_kl,
        )
        setup.tried += [condition for condition, _ in tried]
        setup.searched |= {condition.name for condition, _ in tried}
        most, mean_kl = setup.steer.max_kl, self._mean_kl
        good = [
            (outcome.trait, -condition.coef, condition)
            for condition, outcome in tried
            if outcome.coherence >= setup.steer.min_coherence
            and (most is None or mean_kl is None or mean_kl(condition) <= most)
        ]
        return max(good, key=lambda entry: entry[:2], default=(0, 0, None))[2]

    def _add(self, condition: Condition) -> None:
        setup = self._setup
        setup.conditions.append(condition)
        setup.tried = [other for other in setup.tried if other.name != condition.name]
        setup.planned += setup.plan([condition], half="reading")

    def _evaluate(self, condition: Condition) -> Outcome:
        setup, store = self._setup, self._run.store
        planned = setup.plan([condition], half="choosing")
        setup.planned += planned
        self._generated += self._run.generate(planned, stage="search")
        records = self._run.responses(planned)
        on_progress = setup.session.on_progress
        self._scorer.score(store, records, setup.metrics, on_progress=on_progress)
        scores = store.scores_by_response(judge=self._scorer.name)

        def mean(metric: str) -> float:
            values = [score_of(scores.get(record.id, {}), metric) for record in records]
            known = [value for value in values if value is not None]
            return fmean(known) if known else float("nan")

        return Outcome(trait=mean(setup.trait.name), coherence=mean(COHERENCE))

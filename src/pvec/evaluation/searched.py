"""A search at work on a run: its points are generated and judged, the best one is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from pvec.backends.run_session import RunSession
from pvec.evaluation.condition import Condition
from pvec.evaluation.conditions import group_label, steered_condition
from pvec.evaluation.search import Outcome, search
from pvec.evaluation.setup import SteerSetup
from pvec.evaluation.summary import COHERENCE
from pvec.judges.scoring import ResponseScorer, score_of
from pvec.steering.instructions import SteeringVector, random_like


class Searched:
    """The searches of a command, one per vector (or one of all together).

    ``generated`` counts the new answers of points that were tried. ``mean_kl`` returns the KL
    divergence of a condition, where the settings limit it.
    """

    def __init__(
        self,
        setup: SteerSetup,
        run: RunSession,
        scorer: ResponseScorer,
        *,
        mean_kl: Callable[[Condition], float] | None,
    ) -> None:
        self._setup = setup
        self._run = run
        self._scorer = scorer
        self._mean_kl = mean_kl
        self.generated = 0

    def run(self) -> None:
        """Search, and add to the setup what was tried and the planned answers of the best."""
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
        self.generated += self._run.generate(planned, stage="search")
        records = self._run.responses(planned)
        on_progress = setup.session.on_progress
        self._scorer.score(store, records, setup.metrics, on_progress=on_progress)
        scores = store.scores_by_response(judge=self._scorer.name)

        def mean(metric: str) -> float:
            values = [score_of(scores.get(record.id, {}), metric) for record in records]
            known = [value for value in values if value is not None]
            return fmean(known) if known else float("nan")

        return Outcome(trait=mean(setup.trait.name), coherence=mean(COHERENCE))

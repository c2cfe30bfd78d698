"""An evaluation for `inspect eval`: how strongly a model shows a trait, and where its answers lie.

    pvec extract --trait evil
    inspect eval examples/inspect/persona.py --model pvec/tiny \\
      -M vector=runs/evil-tiny -M steer='evil 1' -T trait=evil -T judge=tiny

The model answers the trait's evaluation questions. The scorer `trait` judges each answer,
`projection` keeps where it lies on the model's vectors. README.md has the same through a server.
"""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.solver import generate

from pvec.inspect.registry import projection
from pvec.inspect.registry import trait as trait_scorer
from pvec.traits.trait import load_trait


@task
def persona(trait: str = "evil", judge: str | None = None, projections: bool = True) -> Task:
    """Ask a trait's evaluation questions; without ``projections`` any model can be evaluated."""
    questions = load_trait(trait).questions("eval")
    return Task(
        dataset=[Sample(input=question) for question in questions],
        solver=generate(),
        scorer=[trait_scorer(trait, judge), *([projection()] if projections else [])],
    )

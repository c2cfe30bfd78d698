"""Figure 8: how traits hang together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from examples.paper.experiments import LAST, LAYER
from examples.paper.figures import matrix
from examples.paper.numbers import Check, mean_ci, over_seeds, overall
from examples.paper.replication import Replication, Results, verdict_clause
from examples.paper.sizes import Size
from examples.paper.steps import Result
from pvec.stats import correlation


def relations(results: Results, size: Size) -> Replication:
    """Figure 8: cosines between traits, and what training on one does to the others."""
    cosines = np.array([_cosines(one, size.traits) for one in results])
    shifts = np.array(
        [
            [[one["shift"][f"{arm} II"][trait] for trait in size.traits] for arm in size.studied]
            for one in results
        ]
    )
    rows = [size.traits.index(arm) for arm in size.studied]
    mine = np.zeros(shifts.shape[1:], dtype=bool)
    mine[np.arange(len(rows)), rows] = True
    along = tuple(
        correlation(cosines[n][rows][~mine], shifts[n][~mine]).r for n in range(len(results))
    )
    own = tuple(float(one[mine].mean() - one[~mine].mean()) for one in shifts)
    checks = (
        Check(what="shift along the trained trait minus mean along the others", values=own),
        Check(what="r of cosine and cross-trait shift", values=along, r=True),
    )
    pairs = np.triu_indices(len(size.traits), k=1)
    mean = cosines.mean(axis=0)[pairs]
    (low, high) = (
        f"{size.traits[pairs[0][i]]} and {size.traits[pairs[1][i]]} ({mean[i]:.2f})"
        for i in (mean.argmin(), mean.argmax())
    )
    limit = float(np.abs(shifts.mean(axis=0)).max())
    return Replication(
        number=8,
        title="How traits hang together",
        paper="traits whose vectors are alike move together: training on one also shifts the "
        "model along related ones (Fig. 20).",
        here=f"the most alike are {high}, the least {low}; a strong set moves the model "
        f"{mean_ci(own)} further along its own trait than along others, and cosine goes with "
        f"cross-trait shift at r {mean_ci(along, r=True)}; {verdict_clause(overall(checks))}.",
        checks=checks,
        figures=(
            matrix(
                name="8_cosines",
                title="Cosines between vectors",
                caption=f"Response-average vectors at layer {LAYER}, mean over seeds.",
                rows=("trait", size.traits),
                columns=("with", size.traits),
                values=[[over_seeds(c) for c in row] for row in np.moveaxis(cosines, 0, -1)],
                limit=1.0,
                digits=2,
            ),
            matrix(
                name="8_shifts",
                title="What training on one trait does to the others",
                caption=f"Shift at the last prompt token, layer {LAST}, in units of the residual "
                "stream; mean over seeds.",
                rows=("trained on", [f"{arm} II" for arm in size.studied]),
                columns=("shift along", size.traits),
                values=[[over_seeds(c) for c in row] for row in np.moveaxis(shifts, 0, -1)],
                limit=limit,
                digits=1,
            ),
        ),
    )


def _cosines(one: Mapping[str, Result], traits: Sequence[str]) -> np.ndarray:
    rows = np.array([one[f"vector {trait}"]["rows"][LAYER] for trait in traits])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines: np.ndarray = rows @ rows.T
    return cosines

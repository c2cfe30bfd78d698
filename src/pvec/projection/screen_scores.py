"""Scores of screened training data, whether a file is screened as a whole or block by block."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pvec.backends.session import ModelSession
from pvec.data.conversations import Conversation
from pvec.projection import base_responses
from pvec.projection.projector import project_table
from pvec.stats import Correlation, Interval, auc, grouped_mean
from pvec.types import ProjectionKind
from pvec.vectors.projection import ProjectionPlan

SHOWN = 10
"""Samples that are shown beside the model's own answer."""


@dataclass(frozen=True, kw_only=True)
class DatasetScore:
    """A data set on one vector at one layer.

    ``mean`` is its mean difference with a 95 % interval over prompts, ``reference`` that of the
    clean set. ``auc`` says how well differences tell the two apart. Samples above ``threshold``
    (the percentile of the clean set) are ``above``. What needs a clean set is None without one.
    """

    mean: Interval
    reference: Interval | None = None
    auc: float | None = None
    threshold: float | None = None
    above: int = 0


@dataclass(frozen=True, kw_only=True)
class ColumnScore:
    """The data set on one vector at one layer, and for ``--natural subset`` how well the predicted
    differences agree with generated ones on this data.
    """

    vector: str
    layer: int
    score: DatasetScore
    agreement: Correlation | None = None


def sample_kinds(source: base_responses.Source) -> tuple[ProjectionKind, ...]:
    """Return what is projected of a training sample; the cheap modes need its prompt too."""
    return ("proj",) if source == "generate" else ("proj", "prompt_last_proj")


def project_samples(
    session: ModelSession,
    plan: ProjectionPlan,
    conversations: Iterable[Conversation],
    *,
    total: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the projections ``[samples, columns]`` by the plan's first kind and by its last."""
    table = project_table(session, plan, conversations, total=total, stage="responses")
    columns = len(plan.vectors) * len(plan.layers)
    by_kind = table.reshape(total, len(plan.vectors), len(plan.kinds), len(plan.layers))
    first, last = (by_kind[:, :, kind].reshape(total, columns) for kind in (0, -1))
    return first, last


def furthest(differences: np.ndarray) -> list[int]:
    """Return the ``SHOWN`` samples furthest out, in units of each column's spread."""
    spread = np.ma.masked_invalid(differences).std(axis=0).filled(0.0)
    out = np.max(np.nan_to_num(differences / np.where(spread, spread, 1), nan=-np.inf), 1)
    return [int(n) for n in np.argsort(-out)[:SHOWN] if np.isfinite(out[n])]


def score_dataset(
    differences: np.ndarray,
    *,
    prompts: Sequence[Hashable],
    clean: np.ndarray | None,
    clean_prompts: Sequence[Hashable] = (),
    percentile: float = 95.0,
) -> DatasetScore:
    """Score the differences ``[n]`` of a data set, beside those of a clean one. NaN is missing."""
    mean = grouped_mean(differences, groups=prompts)
    if clean is None:
        return DatasetScore(mean=mean)
    threshold = float(np.nanpercentile(clean, percentile))
    return DatasetScore(
        mean=mean,
        reference=grouped_mean(clean, groups=clean_prompts),
        auc=auc(differences, clean),
        threshold=threshold,
        above=int((differences > threshold).sum()),
    )

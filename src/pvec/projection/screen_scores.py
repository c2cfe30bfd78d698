"""Scores of screened training data, and the samples that are shown of it.

The same whether a file is screened as a whole or block by block.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pvec.backends.session import ModelSession
from pvec.data.conversations import Conversation
from pvec.projection import base_responses
from pvec.projection.inputs import Samples
from pvec.projection.projector import project_table
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import encode_line
from pvec.runs.summary import BROWSED
from pvec.stats import Correlation, Interval, auc, grouped_mean
from pvec.types import ProjectionKind
from pvec.vectors.projection import ProjectionPlan

SHOWN = 10
"""Samples that are shown beside the model's own answer."""

MOST = 1500
"""Samples that are kept for reading; of a larger file an even spread beside the decisive ones."""


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


def score_columns(
    columns: Sequence[tuple[str, int]],
    differences: np.ndarray,
    *,
    prompts: Sequence[Hashable],
    clean: np.ndarray | None,
    clean_prompts: Sequence[Hashable],
    percentile: float,
    agreements: Sequence[Correlation | None] | None = None,
) -> tuple[ColumnScore, ...]:
    """Score the differences ``[n, columns]`` as ``score_dataset`` does, vector by vector and layer
    by layer.
    """
    return tuple(
        ColumnScore(
            vector=vector,
            layer=layer,
            score=score_dataset(
                differences[:, c],
                prompts=prompts,
                clean=None if clean is None else clean[:, c],
                clean_prompts=clean_prompts,
                percentile=percentile,
            ),
            agreement=None if agreements is None else agreements[c],
        )
        for c, (vector, layer) in enumerate(columns)
    )


def by_column(columns: Sequence[tuple[str, int]], values: np.ndarray) -> dict[str, float]:
    """Return one sample's values ``[columns]`` by the names of their columns."""
    names = (f"{vector}_layer{layer}" for vector, layer in columns)
    return dict(zip(names, values.tolist(), strict=True))


def choose_samples(
    differences: np.ndarray, thresholds: np.ndarray, *, most: int = MOST
) -> list[int]:
    """Return which of the samples ``[n, columns]`` are kept for reading, in the file's order.

    All of a small file. Else a quarter are those furthest out, half those nearest to a threshold
    (the medians where there is none), and the rest an even spread.
    """
    count = len(differences)
    if count <= most:
        return list(range(count))
    middle = np.where(np.isfinite(thresholds), thresholds, np.nanmedian(differences, axis=0))
    spread = np.nanstd(differences, axis=0)
    distance = (differences - middle) / np.where(spread > 0, spread, 1.0)
    furthest = np.argsort(-np.nan_to_num(distance, nan=-np.inf).max(axis=1), kind="stable")
    nearest = np.argsort(np.nan_to_num(np.abs(distance), nan=np.inf).min(axis=1), kind="stable")
    chosen = furthest[: most // 4]
    nearest = nearest[~np.isin(nearest, chosen)]
    chosen = np.concatenate([chosen, nearest[: 3 * most // 4 - len(chosen)]])
    others = np.setdiff1d(np.arange(count), chosen)
    spread_out = np.linspace(0, len(others) - 1, most - len(chosen)).round().astype(int)
    picked: list[int] = np.union1d(chosen, others[spread_out]).tolist()
    return picked


def write_browsed(
    folder: Path,
    samples: Samples,
    responses: Mapping[int, str],
    *,
    natural: Mapping[str, str],
) -> None:
    """Write the samples whose ``responses`` are given by number (the row of ``samples.csv``).

    Each with its ``line``, ``question``, ``response``, and ``natural``, the model's own answer by
    prompt (null where none was generated).
    """
    with atomic_write(folder / BROWSED) as stream:
        for number, response in responses.items():
            key = samples.prompts[number]
            line = {
                "number": number,
                "line": samples.lines[number],
                "question": samples.distinct[key].question,
                "response": response,
                "natural": natural.get(key),
            }
            stream.write(encode_line(line))

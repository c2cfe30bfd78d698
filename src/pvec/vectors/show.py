"""What a vector file holds, and which directions are close to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pvec.errors import InputError
from pvec.types import AnswerClass, VectorKind
from pvec.vectors.files import labels
from pvec.vectors.projection import QUANTILES, stored_quantiles
from pvec.vectors.quality import VectorSummary, best_layer, middle_layer, summarize
from pvec.vectors.vector import DEFAULT_KIND, PersonaVector

By = Literal["file", "kind", "layer"]
"""What the rows of a comparison are."""


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Where answers lie along ``response_avg`` at one layer: for each class that the file describes
    the projections below which ``percents`` of its answers are.
    """

    layer: int
    percents: tuple[float, ...]
    rows: Mapping[AnswerClass, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class VectorDescription:
    """What one vector file holds; ``norms`` are by kind and layer."""

    path: Path
    trait: str
    kind: VectorKind
    num_layers: int
    hidden_size: int
    norms: Mapping[VectorKind, tuple[float, ...]]
    summary: VectorSummary
    percentiles: Percentiles
    metadata: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cosines between vectors: ``cosines[i][j]`` between ``labels[i]`` and ``labels[j]``.

    ``layer`` is where all were taken, or None when the labels say it.
    """

    by: By
    layer: int | None
    labels: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    notes: tuple[str, ...]


def describe(
    path: Path, vector: PersonaVector, *, kind: VectorKind | None = None
) -> VectorDescription:
    """Describe the vector in the file ``path``, layer by layer.

    ``kind`` is described in full (default: ``response_avg``, or the first that the file has).
    Raises ``InputError`` for a kind that the file lacks.
    """
    kind = kind or vector.main_kind
    return VectorDescription(
        path=path,
        trait=vector.trait,
        kind=kind,
        num_layers=vector.num_layers,
        hidden_size=vector.hidden_size,
        norms={name: tuple(vector.norms(name).tolist()) for name in vector.kinds},
        summary=summarize(vector, kind=kind),
        percentiles=percentiles_of(vector),
        metadata=vector.metadata,
        notes=tuple(_notes(vector, kind)),
    )


def percentiles_of(vector: PersonaVector, *, layer: int | None = None) -> Percentiles:
    """Return the percentiles of a file at a layer (default: the best for steering)."""
    layer = best_layer(vector) if layer is None else layer
    order: tuple[AnswerClass, ...] = ("neg", "unsteered", "pos")
    stored = {name: stored_quantiles(vector.stats, name) for name in order}
    return Percentiles(
        layer=layer,
        percents=tuple(100 * share for share in QUANTILES),
        rows={
            name: tuple(float(value) for value in values[:, layer])
            for name, values in stored.items()
            if values is not None
        },
    )


def compare(
    vectors: Mapping[Path, PersonaVector],
    *,
    by: By = "file",
    kind: VectorKind = DEFAULT_KIND,
    layer: int | None = None,
) -> Comparison:
    """Return the cosines between the vectors of several files, the kinds or the layers of them.

    ``layer`` is where files and kinds are compared (default: 55 % of each file's depth). Models may
    differ in depth but not in width. Raises ``InputError`` for files of different widths, a layer
    or kind that a file lacks, and fewer than two vectors.
    """
    _require_one_width(vectors)
    names = labels(vectors)
    layers = {
        path: middle_layer(vector) if layer is None else layer for path, vector in vectors.items()
    }
    same = len(set(layers.values())) == 1 and by != "layer"
    common = next(iter(layers.values())) if same else None
    items: list[tuple[str, np.ndarray]] = []
    for path, vector in vectors.items():
        name = names[path] if len(vectors) > 1 or by == "file" else ""
        items += _items(vector, name=name, by=by, kind=kind, layer=layer, bare=common is not None)
    if len(items) < 2:
        raise InputError(
            "There is nothing to compare: give several vector files, or --by kind or layer."
        )
    matrix = cosine_matrix([row for _, row in items])
    return Comparison(
        by=by,
        layer=common,
        labels=tuple(label for label, _ in items),
        cosines=tuple(tuple(float(c) for c in row) for row in matrix),
        notes=tuple(_model_notes(vectors)),
    )


def cosine_matrix(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the cosines ``[N, N]`` between vectors ``[H]``; NaN for a zero vector."""
    rows = np.stack(vectors).astype(np.float64)  # [N, H]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, lengths, out=np.full_like(rows, np.nan), where=lengths > 0)
    cosines: np.ndarray = np.clip(unit @ unit.T, -1.0, 1.0)
    return cosines


def _notes(vector: PersonaVector, kind: VectorKind) -> list[str]:
    notes = list(vector.reading_notes)
    if vector.last_row_is_normed:
        notes.append(
            f"row {vector.num_layers} was taken after the final norm, as the reference does: it is "
            f"no direction of the residual stream"
        )
    if vector.missing_layers:
        notes.append(f"layers {sorted(vector.missing_layers)} are not in the file")
    if vector.mean_norm is None:
        notes.append("the file holds no residual norms, so norm / residual is unknown")
    absent = [name for name in ("auc", "stability") if name not in vector.stats]
    if absent:
        notes.append(
            "the file holds no separation (AUC) or split-half cosine: `pvec vector compute` "
            "measures them from answers"
        )
    elif kind != DEFAULT_KIND:
        notes.append(f"separation and split-half cosine are those of {DEFAULT_KIND}")
    return notes


def _items(
    vector: PersonaVector, *, name: str, by: By, kind: VectorKind, layer: int | None, bare: bool
) -> list[tuple[str, np.ndarray]]:
    """Return labelled vectors ``[H]``; ``bare`` labels do not say the layer."""
    if by == "layer":
        layers = [n for n in range(vector.num_layers + 1) if n not in vector.missing_layers]
        return [(f"{name} {n}".strip(), vector.row(n, kind=kind)) for n in layers]
    at = middle_layer(vector) if layer is None else layer
    where = "" if bare else f" layer {at}"
    if by == "kind":
        return [(f"{name} {k}{where}".strip(), vector.row(at, kind=k)) for k in vector.kinds]
    return [(f"{name}{where}", vector.row(at, kind=kind))]


def _require_one_width(vectors: Mapping[Path, PersonaVector]) -> None:
    widths = {vector.hidden_size: path for path, vector in vectors.items()}
    if len(widths) > 1:
        (width, first), (other, second) = list(widths.items())[:2]
        raise InputError(
            f"Only vectors of one width can be compared: {first} is {width} wide and "
            f"{second} {other}."
        )


def _model_notes(vectors: Mapping[Path, PersonaVector]) -> list[str]:
    models = {v.metadata["model_id"] for v in vectors.values() if v.metadata.get("model_id")}
    if len(models) < 2:
        return []
    return [
        f"these vectors are of different models ({', '.join(sorted(models))}): their directions "
        f"can only be compared when one model is a finetune of another"
    ]

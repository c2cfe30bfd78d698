"""``pvec vector show`` and ``compare``: whether a vector is any good, and what it is close to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pvec.errors import InputError
from pvec.types import VectorKind
from pvec.vectors.accumulate import cosine_matrix
from pvec.vectors.find import labels, load_vectors
from pvec.vectors.quality import VectorSummary, middle_layer, summarize
from pvec.vectors.vector import DEFAULT_KIND, POST_FINAL_NORM, PersonaVector

By = Literal["file", "kind", "layer"]
"""What the rows of a comparison are."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One vector file as people want to see it; ``norms`` are by kind and layer."""

    path: Path
    trait: str
    kind: VectorKind
    num_layers: int
    hidden_size: int
    norms: Mapping[VectorKind, tuple[float, ...]]
    summary: VectorSummary
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


def show(
    paths: Sequence[Path],
    *,
    kind: VectorKind | None = None,
    png: Path | None = None,
    svg: Path | None = None,
) -> list[Shown]:
    """Describe vector files, and draw them into one picture if asked.

    ``kind`` is described in full (default: ``response_avg``, or the first that the file has).
    Raises ``InputError`` for a file that is no vector or lacks the kind, and ``StoreError`` when a
    picture cannot be written.
    """
    found = load_vectors(paths)
    shown = [_shown(path, vector, kind) for path, vector in found.items()]
    if png or svg:
        from pvec.report.vector_picture import vector_picture, write_picture

        names = labels(found)
        drawn = [(names[path], vector) for path, vector in found.items()]
        write_picture(vector_picture(drawn, kind=shown[0].kind), png=png, svg=svg)
    return shown


def compare(
    paths: Sequence[Path],
    *,
    by: By = "file",
    kind: VectorKind = DEFAULT_KIND,
    layer: int | None = None,
    png: Path | None = None,
    svg: Path | None = None,
) -> Comparison:
    """Return the cosines between the vectors of several files, the kinds or the layers of them.

    ``layer`` is where files and kinds are compared (default: 55 % of each file's depth). Models may
    differ in depth but not in width. Raises ``InputError`` for files of different widths, a layer
    or kind that a file lacks, and fewer than two vectors.
    """
    found = load_vectors(paths)
    _require_one_width(found)
    names = labels(found)
    layers = {
        path: middle_layer(vector) if layer is None else layer for path, vector in found.items()
    }
    same = len(set(layers.values())) == 1 and by != "layer"
    common = next(iter(layers.values())) if same else None
    items: list[tuple[str, np.ndarray]] = []
    for path, vector in found.items():
        name = names[path] if len(found) > 1 or by == "file" else ""
        items += _items(vector, name=name, by=by, kind=kind, layer=layer, bare=common is not None)
    if len(items) < 2:
        raise InputError(
            "There is nothing to compare: give several vector files, or --by kind or layer."
        )
    matrix = cosine_matrix([row for _, row in items])
    result = Comparison(
        by=by,
        layer=common,
        labels=tuple(label for label, _ in items),
        cosines=tuple(tuple(float(c) for c in row) for row in matrix),
        notes=tuple(_model_notes(found)),
    )
    if png or svg:
        from pvec.report.vector_picture import cosine_picture, write_picture

        write_picture(cosine_picture(result.labels, result.cosines), png=png, svg=svg)
    return result


def _shown(path: Path, vector: PersonaVector, kind: VectorKind | None) -> Shown:
    chosen: VectorKind = kind or vector.main_kind
    return Shown(
        path=path,
        trait=vector.trait,
        kind=chosen,
        num_layers=vector.num_layers,
        hidden_size=vector.hidden_size,
        norms={name: tuple(float(norm) for norm in vector.norms(name)) for name in vector.kinds},
        summary=summarize(vector, kind=chosen),
        metadata=vector.metadata,
        notes=tuple(_notes(vector, chosen)),
    )


def _notes(vector: PersonaVector, kind: VectorKind) -> list[str]:
    notes = []
    if vector.metadata.get("last_row") == POST_FINAL_NORM:
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
        return [(f"{name} {one}{where}".strip(), vector.row(at, kind=one)) for one in vector.kinds]
    return [(f"{name}{where}", vector.row(at, kind=kind))]


def _require_one_width(vectors: Mapping[Path, PersonaVector]) -> None:
    widths = {vector.hidden_size: path for path, vector in vectors.items()}
    if len(widths) > 1:
        (one, first), (two, second) = list(widths.items())[:2]
        raise InputError(
            f"Only vectors of one width can be compared: {first} is {one} wide and {second} {two}."
        )


def _model_notes(vectors: Mapping[Path, PersonaVector]) -> list[str]:
    models = {v.metadata["model_id"] for v in vectors.values() if v.metadata.get("model_id")}
    if len(models) < 2:
        return []
    return [
        f"these vectors are of different models ({', '.join(sorted(models))}): their directions "
        f"can only be compared when one model is a finetune of another"
    ]

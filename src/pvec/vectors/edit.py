"""``pvec vector combine`` and ``convert``: new vectors from old ones, and other files of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pvec import __version__
from pvec.errors import InputError
from pvec.types import VectorKind
from pvec.vectors.files import (
    find_vector,
    load_all_kinds,
    load_vectors,
    output_path,
    save_pt,
    save_vector,
    written_kind,
)
from pvec.vectors.gguf import gguf_notes
from pvec.vectors.vector import (
    BLOCK_OUTPUT,
    KINDS,
    MINIMUM_DEPTH,
    MISSING_LAYERS,
    ROW_0,
    PersonaVector,
)

_MODEL_KEYS = ("model_id", "model_fingerprint", "model_type", "adapter")


@dataclass(frozen=True, kw_only=True)
class VectorFiles:
    """The files that a command wrote, and what the user should know about them."""

    trait: str
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def combine(
    expression: str,
    *,
    out: Path,
    orthogonal_to: Sequence[Path] = (),
    incremental: bool = False,
    trait: str | None = None,
) -> VectorFiles:
    """Write a linear combination of vectors of one model, such as ``0.7*evil + 0.3*humorous``.

    Then, in this order, its part in the span of ``orthogonal_to`` is taken away layer by layer, and
    with ``incremental`` every row becomes its increase over the layer before (paper, appendix
    J.3). Kinds that all files have are kept; quality figures are not, as they were measured on the
    vectors that went in. Raises ``InputError`` for an expression that does not parse and for
    vectors of different models.
    """
    terms = parse_expression(expression)
    names = [find_vector(name) for _, name in terms]
    others = [find_vector(path) for path in orthogonal_to]
    notes: list[str] = []
    vectors = load_vectors([*names, *others], notify=notes.append)
    _require_one_model(vectors)
    kinds = [kind for kind in KINDS if all(kind in vector.kinds for vector in vectors.values())]
    if not kinds:
        raise InputError("These files have no kind of vector in common: convert them first.")
    trait = trait or "+".join(dict.fromkeys(vectors[name].trait for name in names))
    path = output_path(out, trait=trait)
    weighted = [(weight, vectors[name]) for (weight, _), name in zip(terms, names, strict=True)]
    dropped = _unusable_layers(vectors, notes)
    rows = {}
    for kind in kinds:
        total = linear_combination([(weight, vector.kind(kind)) for weight, vector in weighted])
        if others:
            total = orthogonalise(total, against=[vectors[other].kind(kind) for other in others])
        total[sorted(dropped)] = 0.0
        rows[kind] = total
    result = PersonaVector(
        trait=trait,
        kinds=rows,
        mean_norm=_mean_norm([vector for _, vector in weighted]),
        metadata={
            **_shared_metadata(vectors),
            "pvec_version": __version__,
            "expression": expression,
            "sources": ", ".join(f"{p.name} {v.fingerprint}" for p, v in vectors.items()),
            "orthogonal_to": ", ".join(other.name for other in others),
            "incremental": "false",
            MISSING_LAYERS: ",".join(map(str, sorted(dropped))),
        },
    )
    if incremental:
        result = _incremental(result, notes)
    save_vector(result, path)
    return VectorFiles(
        trait=trait, paths=(path,), notes=(*notes, *format_notes(result, path, kind=None))
    )


def parse_expression(text: str) -> list[tuple[float, str]]:
    """Return the weights and names in ``0.7*evil.safetensors + 0.3*humorous - other``.

    Operators between terms have spaces around them, so file names may hold ``+`` and ``-``. Raises
    ``InputError`` naming the bad term.
    """
    chunks = re.split(r"\s+([+-])(?:\s+|$)", text.strip())
    signs = [1.0, *(-1.0 if sign == "-" else 1.0 for sign in chunks[1::2])]
    return [_term(chunk, sign, text) for sign, chunk in zip(signs, chunks[::2], strict=True)]


def convert(
    source: Path,
    target: Path,
    *,
    kind: VectorKind | None = None,
    model_hint: str | None = None,
    num_layers: int | None = None,
    layer: int | None = None,
) -> VectorFiles:
    """Write the vector in ``source`` in the format of ``target``'s name, or as ``.pt`` in a folder.

    ``.safetensors`` holds everything; a folder gets the reference's ``TRAIT_KIND_diff.pt`` of every
    kind; a ``.pt`` or ``.gguf`` file holds one kind (``kind``, what the file's name says, or
    ``response_avg``). ``model_hint`` is the architecture in llama.cpp's words, for GGUF. Kinds of
    the reference that lie beside a ``.pt`` source are read with it. ``num_layers`` is the depth of
    the model, for files that do not say what their rows are; ``layer`` the layer of a file that
    holds a single vector. Raises ``InputError`` for
    formats that pvec does not write and for what a format cannot hold.
    """
    path = find_vector(source)
    if path.resolve() == target.resolve():
        raise InputError(f"{target} is the file itself: give another name to convert to.")
    (vector,) = load_vectors([path], num_layers=num_layers, layer=layer).values()
    vector = load_all_kinds(path, vector)
    notes = list(vector.reading_notes)
    if vector.last_row_is_normed and vector.metadata.get("source_format") == "pt":
        notes.append(
            f"row {vector.num_layers} is taken to be after the final norm, as in the reference's "
            "files"
        )
    if target.is_dir() or not target.suffix:
        paths = save_pt(vector, target)
        notes += format_notes(vector, paths[0], kind=None, every_kind=True)
    else:
        paths = [output_path(target, trait=vector.trait)]
        save_vector(vector, target, kind=kind, model_hint=model_hint)
        notes += format_notes(vector, target, kind=kind)
    return VectorFiles(trait=vector.trait, paths=tuple(paths), notes=tuple(notes))


def format_notes(
    vector: PersonaVector, path: Path, *, kind: VectorKind | None, every_kind: bool = False
) -> list[str]:
    """Return what the file that ``save_vector`` wrote does not hold, a sentence for each thing."""
    suffix = path.suffix.lower()
    kind = kind or written_kind(vector, path)
    if suffix == ".gguf":
        return gguf_notes(vector, kind=kind)
    if suffix == ".safetensors":
        return []
    notes = []
    others = [other for other in vector.kinds if other != kind]
    if others and not every_kind:
        notes.append(f"only {kind} was written; give a folder to get {', '.join(others)} too")
    if not vector.last_row_is_normed:
        notes.append(
            f"row {vector.num_layers} is the residual stream before the final norm; the files of "
            f"the reference have it after the norm"
        )
    if vector.missing_layers:
        notes.append(f"the rows of layers {sorted(vector.missing_layers)} are zero")
    return [
        *notes,
        "a .pt file holds the vectors alone: no residual norms, quality or provenance",
    ]


def _term(chunk: str, sign: float, whole: str) -> tuple[float, str]:
    match = re.fullmatch(
        r"([+-]?)\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*\*\s*)?([^*]+)", chunk.strip()
    )
    if match is None:
        raise InputError(
            f"{chunk!r} in {whole!r} is no term: write NUMBER*FILE, with spaces around + and -."
        )
    weight = float(match[2] or 1.0) * (-1.0 if match[1] == "-" else 1.0)
    return sign * weight, match[3].strip()


def _require_one_model(vectors: Mapping[Path, PersonaVector]) -> None:
    """Raise ``InputError``, naming both, when two vectors are of different models.

    Files that do not say their model (a ``.pt``) are taken at their shape.
    """
    (first, left), *others = vectors.items()
    for second, right in others:
        if _model(left) and _model(right) and _fingerprint(left) != _fingerprint(right):
            raise InputError(
                f"{first} was made with {_model(left)} and {second} with {_model(right)}: vectors "
                f"of different models have no direction in common, so use vectors of one model."
            )
        if (left.num_layers, left.hidden_size) != (
            right.num_layers,
            right.hidden_size,
        ):
            raise InputError(
                f"{first} has {left.num_layers} layers of width {left.hidden_size} and {second} "
                f"{right.num_layers} of width {right.hidden_size}: use vectors of one model."
            )


def _model(vector: PersonaVector) -> str:
    name = vector.metadata.get("model_id", "")
    adapter = vector.metadata.get("adapter", "")
    return f"{name} with {adapter}" if adapter else name


def _fingerprint(vector: PersonaVector) -> str:
    return vector.metadata.get("model_fingerprint") or _model(vector)


def _incremental(vector: PersonaVector, notes: list[str]) -> PersonaVector:
    """Return the increments of ``vector``, and note how they are used."""
    kept = vector.steering_layers
    missing = [n for n in range(1, vector.num_layers + 1) if n not in kept]
    if vector.last_row_is_normed:
        notes.append(
            f"layer {vector.num_layers} was left out: it was taken after the final norm, so its "
            f"increase over layer {vector.num_layers - 1} means nothing"
        )
    notes.append(
        "the rows are increments: steer every layer at once with them (--layer all), without "
        "--incremental"
    )
    return replace(
        vector,
        kinds={kind: vector.increments(kind) for kind in vector.kinds},
        metadata={
            **vector.metadata,
            "incremental": "true",
            MISSING_LAYERS: ",".join(map(str, missing)),
        },
    )


def _unusable_layers(vectors: Mapping[Path, PersonaVector], notes: list[str]) -> set[int]:
    """Return the layers that mean nothing in a combination, and note why."""
    dropped = set[int]().union(*(vector.missing_layers for vector in vectors.values()))
    if dropped:
        notes.append(f"layers {sorted(dropped)} are missing from a file, and so here")
    if len({vector.last_row_is_normed for vector in vectors.values()}) > 1:
        last = next(iter(vectors.values())).num_layers
        dropped.add(last)
        notes.append(
            f"layer {last} was left out: some files have it before the final norm, others after"
        )
    return dropped


def _mean_norm(vectors: Sequence[PersonaVector]) -> np.ndarray | None:
    """Return the mean residual norms of those that know them: one model's, on several data."""
    known = [vector.mean_norm for vector in vectors if vector.mean_norm is not None]
    if not known:
        return None
    mean: np.ndarray = np.stack(known).mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32)


def _shared_metadata(vectors: Mapping[Path, PersonaVector]) -> dict[str, str]:
    """Return how the last row was taken, and what the files that name their model say of it."""
    every = [vector.metadata for vector in vectors.values()]
    named = [metadata for metadata in every if metadata.get("model_id")]
    model = {key: named[0][key] for key in _MODEL_KEYS if key in named[0]} if named else {}
    assumed = {key: every[0][key] for key in (ROW_0, MINIMUM_DEPTH) if key in every[0]}
    return {**model, **assumed, "last_row": every[0].get("last_row", BLOCK_OUTPUT)}


def linear_combination(terms: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """Return the linear combination of vectors of one shape, summed in float64, as float32."""
    shapes = {vector.shape for _, vector in terms}
    if len(shapes) != 1:
        raise InputError(
            f"Only vectors of one shape can be combined, these have {sorted(shapes)}: use vectors "
            f"of one model."
        )
    total = np.sum([weight * vector.astype(np.float64) for weight, vector in terms], axis=0)
    result: np.ndarray = total.astype(np.float32)
    return result


def orthogonalise(vectors: np.ndarray, *, against: Sequence[np.ndarray]) -> np.ndarray:
    """Return ``vectors`` ``[L + 1, H]`` without their part in the span of others, layer by layer.

    A layer at which every other vector is zero is unchanged.
    """
    result = np.asarray(vectors, dtype=np.float64).copy()
    for layer in range(len(result)):
        basis = np.stack([other[layer] for other in against], axis=1).astype(np.float64)  # [H, N]
        left, sizes, _ = np.linalg.svd(basis, full_matrices=False)
        span = left[:, sizes > 1e-10 * max(sizes.max(), 1e-300)]
        result[layer] -= span @ (span.T @ result[layer])
    return result.astype(np.float32)

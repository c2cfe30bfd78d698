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
from pvec.vectors.find import find_vector, load_vectors, require_one_model
from pvec.vectors.formats import load_vector, save_pt, save_pt_kind, save_vector
from pvec.vectors.vector import (
    BLOCK_OUTPUT,
    KINDS,
    MISSING_LAYERS,
    POST_FINAL_NORM,
    PersonaVector,
    with_metadata,
)

LLAMA_CPP_NAMES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
}
"""Architectures that llama.cpp calls otherwise than transformers."""

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
    vectors = load_vectors([*names, *others])
    require_one_model(vectors)
    kinds = [kind for kind in KINDS if all(kind in vector.kinds for vector in vectors.values())]
    if not kinds:
        raise InputError("These files have no kind of vector in common: convert them first.")
    weighted = [(weight, vectors[name]) for (weight, _), name in zip(terms, names, strict=True)]
    against = [vectors[path] for path in others]
    rows = {kind: _rows(kind, weighted, against, incremental) for kind in kinds}
    dropped, notes = _unusable_layers(vectors)
    for array in rows.values():
        array[sorted(dropped)] = 0.0
    result = PersonaVector(
        trait=trait or "+".join(dict.fromkeys(vectors[name].trait for name in names)),
        kinds=rows,
        mean_norm=_mean_norm([vector for _, vector in weighted]),
        metadata={
            **_shared_model(vectors),
            "pvec_version": __version__,
            "expression": expression,
            "sources": ", ".join(f"{p.name} {v.fingerprint}" for p, v in vectors.items()),
            "orthogonal_to": ", ".join(path.name for path in others),
            "incremental": str(incremental).lower(),
            "last_row": next(iter(vectors.values())).metadata.get("last_row", BLOCK_OUTPUT),
            MISSING_LAYERS: ",".join(map(str, sorted(dropped))),
        },
    )
    if incremental:
        notes.append(
            "the rows are increments: steer every layer at once with them (--layer all), without "
            "--incremental"
        )
    return VectorFiles(trait=result.trait, paths=(save_vector(result, out),), notes=tuple(notes))


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
) -> VectorFiles:
    """Write the vector in ``source`` in the format of ``target``'s name, or as ``.pt`` in a folder.

    ``.safetensors`` holds everything; a folder gets the reference's ``TRAIT_KIND_diff.pt`` of every
    kind; a ``.pt`` or ``.gguf`` file holds one kind (``kind``, what the file's name says, or
    ``response_avg``). ``model_hint`` is the architecture in llama.cpp's words, for GGUF. Kinds of
    the reference that lie beside a ``.pt`` source are read with it. Raises ``InputError`` for
    formats that pvec does not write and for what a format cannot hold.
    """
    path = find_vector(source)
    if path.resolve() == target.resolve():
        raise InputError(f"{target} is the file itself: give another name to convert to.")
    vector, notes = _load_whole(path)
    suffix = target.suffix.lower()
    if suffix == ".safetensors":
        return VectorFiles(
            trait=vector.trait, paths=(save_vector(vector, target),), notes=tuple(notes)
        )
    if suffix == ".gguf":
        return _to_gguf(vector, target, kind=kind, model_hint=model_hint, notes=notes)
    if suffix in {".pt", ".pth"}:
        named = next((k for k in KINDS if target.stem.endswith((k, f"{k}_diff"))), None)
        chosen = kind or named or vector.main_kind
        paths = [save_pt_kind(vector, target, kind=chosen)]
        left = [k for k in vector.kinds if k != chosen]
        if left:
            notes.append(f"only {chosen} was written; give a folder to get {', '.join(left)} too")
    elif suffix == "" or target.is_dir():
        paths = save_pt(vector, target)
    else:
        raise InputError(
            f"pvec cannot write {target.suffix} files: end the name in .safetensors, .pt or .gguf, "
            f"or give a folder for the reference's .pt files."
        )
    if vector.metadata.get("last_row", BLOCK_OUTPUT) == BLOCK_OUTPUT:
        notes.append(
            f"row {vector.num_layers} is the residual stream before the final norm; the files of "
            f"the reference have it after the norm"
        )
    notes.append("a .pt file holds the vectors alone: no residual norms, quality or provenance")
    return VectorFiles(trait=vector.trait, paths=tuple(paths), notes=tuple(notes))


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


def _rows(
    kind: VectorKind,
    weighted: Sequence[tuple[float, PersonaVector]],
    others: Sequence[PersonaVector],
    incremental: bool,
) -> np.ndarray:
    rows = linear_combination([(weight, vector.kind(kind)) for weight, vector in weighted])
    if others:
        rows = orthogonalise(rows, against=[other.kind(kind) for other in others])
    return increments(rows) if incremental else rows


def _unusable_layers(vectors: Mapping[Path, PersonaVector]) -> tuple[set[int], list[str]]:
    """Return layers that mean nothing in a combination, and why."""
    dropped = set[int]().union(*(vector.missing_layers for vector in vectors.values()))
    notes = [f"layers {sorted(dropped)} are missing from a file, and so here"] if dropped else []
    last_rows = {vector.metadata.get("last_row", BLOCK_OUTPUT) for vector in vectors.values()}
    if len(last_rows) > 1:
        last = next(iter(vectors.values())).num_layers
        dropped.add(last)
        notes.append(
            f"layer {last} was left out: some files have it before the final norm, others after"
        )
    return dropped, notes


def _mean_norm(vectors: Sequence[PersonaVector]) -> np.ndarray | None:
    """Return the mean residual norms of those that know them: one model's, on several data."""
    known = [vector.mean_norm for vector in vectors if vector.mean_norm is not None]
    if not known:
        return None
    mean: np.ndarray = np.stack(known).mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32)


def _shared_model(vectors: Mapping[Path, PersonaVector]) -> dict[str, str]:
    """Return what the files that name their model say of it; they agree."""
    named = [v.metadata for v in vectors.values() if v.metadata.get("model_id")]
    return {key: named[0][key] for key in _MODEL_KEYS if key in named[0]} if named else {}


def _load_whole(path: Path) -> tuple[PersonaVector, list[str]]:
    """Load a file, and beside a ``.pt`` of the reference those of its other kinds."""
    vector = load_vector(path)
    if path.suffix.lower() != ".pt" or len(vector.kinds) > 1:
        return vector, []
    (kind,) = vector.kinds
    kinds = dict(vector.kinds)
    notes = [
        f"row {vector.num_layers} is taken to be after the final norm, as in the reference's files"
    ]
    if path.name == f"{vector.trait}_{kind}_diff.pt":
        for other in KINDS:
            sibling = path.with_name(f"{vector.trait}_{other}_diff.pt")
            if other != kind and sibling.is_file():
                kinds[other] = load_vector(sibling).kind(other)
                notes.append(f"{sibling.name} was read too")
    ordered = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    return replace(vector, kinds=ordered), notes


def _to_gguf(
    vector: PersonaVector,
    target: Path,
    *,
    kind: VectorKind | None,
    model_hint: str | None,
    notes: list[str],
) -> VectorFiles:
    from pvec.vectors.gguf import save_gguf

    model_type = vector.metadata.get("model_type", "")
    hint = model_hint or vector.metadata.get("model_hint")
    hint = hint or LLAMA_CPP_NAMES.get(model_type, model_type)
    if not hint:
        raise InputError(
            "A GGUF file says which architecture it is for, and this vector does not know its own: "
            "add --model-hint, such as --model-hint qwen2."
        )
    if vector.metadata.get("last_row") == POST_FINAL_NORM:
        last = vector.num_layers
        missing = ",".join(map(str, sorted({*vector.missing_layers, last})))
        vector = with_metadata(vector, **{MISSING_LAYERS: missing})
        notes.append(f"layer {last} was left out: it is no direction of the residual stream")
    gguf_notes = save_gguf(vector, target, model_hint=hint, kind=kind or vector.main_kind)
    return VectorFiles(trait=vector.trait, paths=(target,), notes=(*notes, *gguf_notes))


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


def increments(vectors: np.ndarray) -> np.ndarray:
    """Return ``v_l - v_(l-1)`` for every layer (paper, appendix J.3).

    ``vectors`` is ``[L + 1, H]``. Nothing can be added at layer 0, so row 1 stays ``v_1``: adding
    row ``l`` after every block makes the sum of the additions up to ``l`` equal ``v_l``.
    """
    return np.concatenate([vectors[:2], np.diff(vectors, axis=0)[1:]])


def raw_coefficient(relative_norm: float, *, vector: np.ndarray, mean_norm: float) -> float:
    """Return the raw coefficient whose addition is ``relative_norm`` mean residual norms long."""
    length = float(np.linalg.norm(vector))
    if length == 0.0:
        raise InputError("A zero vector has no length to scale: use another layer.")
    return relative_norm * mean_norm / length

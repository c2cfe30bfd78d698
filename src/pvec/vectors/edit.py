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
from pvec.vectors import accumulate as arithmetic
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
class Term:
    """One term of an expression: ``weight`` times the vector in the file called ``name``."""

    weight: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """The files that a command wrote, and what should be known about them."""

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
) -> Written:
    """Write a linear combination of vectors of one model, such as ``0.7*evil + 0.3*humorous``.

    Then, in this order, its part in the span of ``orthogonal_to`` is taken away layer by layer, and
    with ``incremental`` every row becomes its increase over the layer before (paper, appendix
    J.3). Kinds that all files have are kept; quality figures are not, as they were measured on the
    vectors that went in. Raises ``InputError`` for an expression that does not parse and for
    vectors of different models.
    """
    terms = parse_expression(expression)
    names = [find_vector(term.name) for term in terms]
    others = [find_vector(path) for path in orthogonal_to]
    found = load_vectors([*names, *others])
    require_one_model(found)
    kinds = [kind for kind in KINDS if all(kind in vector.kinds for vector in found.values())]
    if not kinds:
        raise InputError("These files have no kind of vector in common: convert them first.")
    weighted = [(term.weight, found[name]) for term, name in zip(terms, names, strict=True)]
    rows = {kind: _rows(kind, weighted, [found[o] for o in others], incremental) for kind in kinds}
    dropped, notes = _unusable_layers(found)
    for array in rows.values():
        array[sorted(dropped)] = 0.0
    result = PersonaVector(
        trait=trait or "+".join(dict.fromkeys(found[name].trait for name in names)),
        kinds=rows,
        mean_norm=_mean_norm([vector for _, vector in weighted]),
        metadata={
            **_shared_model(found),
            "pvec_version": __version__,
            "expression": expression,
            "sources": ", ".join(f"{p.name} {v.fingerprint}" for p, v in found.items()),
            "orthogonal_to": ", ".join(path.name for path in others),
            "incremental": str(incremental).lower(),
            "last_row": next(iter(found.values())).metadata.get("last_row", BLOCK_OUTPUT),
            MISSING_LAYERS: ",".join(map(str, sorted(dropped))),
        },
    )
    if incremental:
        notes.append(
            "the rows are increments: steer every layer at once with them (--layer all), without "
            "--incremental"
        )
    return Written(trait=result.trait, paths=(save_vector(result, out),), notes=tuple(notes))


def parse_expression(text: str) -> list[Term]:
    """Read ``0.7*evil.safetensors + 0.3*humorous - other``; file names may hold ``+`` and ``-``.

    Operators between terms have spaces around them. Raises ``InputError`` naming the bad term.
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
) -> Written:
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
        return Written(trait=vector.trait, paths=(save_vector(vector, target),), notes=tuple(notes))
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
    return Written(trait=vector.trait, paths=tuple(paths), notes=tuple(notes))


def _term(chunk: str, sign: float, whole: str) -> Term:
    match = re.fullmatch(
        r"([+-]?)\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*\*\s*)?([^*]+)", chunk.strip()
    )
    if match is None:
        raise InputError(
            f"{chunk!r} in {whole!r} is no term: write NUMBER*FILE, with spaces around + and -."
        )
    weight = float(match[2] or 1.0) * (-1.0 if match[1] == "-" else 1.0)
    return Term(weight=sign * weight, name=match[3].strip())


def _rows(
    kind: VectorKind,
    weighted: Sequence[tuple[float, PersonaVector]],
    others: Sequence[PersonaVector],
    incremental: bool,
) -> np.ndarray:
    rows = arithmetic.combine([(weight, vector.kind(kind)) for weight, vector in weighted])
    if others:
        rows = arithmetic.orthogonalise(rows, against=[other.kind(kind) for other in others])
    return arithmetic.incremental(rows) if incremental else rows


def _unusable_layers(found: Mapping[Path, PersonaVector]) -> tuple[set[int], list[str]]:
    """Return layers that mean nothing in a combination, and why."""
    dropped = set[int]().union(*(vector.missing_layers for vector in found.values()))
    notes = [f"layers {sorted(dropped)} are missing from a file, and so here"] if dropped else []
    taken = {vector.metadata.get("last_row", BLOCK_OUTPUT) for vector in found.values()}
    if len(taken) > 1:
        last = next(iter(found.values())).num_layers
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


def _shared_model(found: Mapping[Path, PersonaVector]) -> dict[str, str]:
    """Return what the files that name their model say of it; they agree."""
    named = [v.metadata for v in found.values() if v.metadata.get("model_id")]
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
) -> Written:
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
    said = save_gguf(vector, target, model_hint=hint, kind=kind or vector.main_kind)
    return Written(trait=vector.trait, paths=(target,), notes=(*notes, *said))

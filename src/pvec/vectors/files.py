"""Persona vectors as files; a file's ending is its format.

Users name them by a path, a run folder, or a name without its ending.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.errors import InputError, ModelError
from pvec.runs.files import atomic_write, probe_target
from pvec.runs.names import safe_name
from pvec.types import MEAN_DIFF, VectorKind
from pvec.vectors.tensors import (
    kind_from_name,
    load_tensors,
    plain,
    split_axis,
    trait_from_name,
    vector_from,
)
from pvec.vectors.vector import BLOCK_OUTPUT, DEFAULT_KIND, KINDS, MEAN_NORM, PersonaVector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pvec.models.load import ModelMetadata

SUFFIX = ".safetensors"
FORMAT_VERSION = "1"

TENSOR_SUFFIXES = (".pt", ".pth", ".npy", ".npz")
READABLE = (".safetensors", *TENSOR_SUFFIXES, ".gguf")
WRITABLE = (".safetensors", ".pt", ".pth", ".gguf")


def load_vector(path: str | Path, *, layer: int | None = None) -> PersonaVector:
    """Read a vector from a ``.safetensors``, ``.pt``, ``.npy``, ``.npz`` or ``.gguf`` file.

    ``FILE:NAME`` is one of several vectors in a file; ``layer`` is the layer of a file that holds a
    single one ``[H]``. Raises ``InputError`` for a file that is missing, damaged, of another
    format, in need of code to be unpickled, or that holds NaN or infinite values (naming the
    layer).

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> vector.trait, vector.kind("response_avg").shape  # [num_layers + 1, hidden_size]
    ('evil', (6, 160))
    """
    path, axis = split_axis(path)
    if not path.is_file():
        raise InputError(f"there is no vector file {path}; check the path.")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _load_safetensors(path, axis=axis, layer=layer)
    if suffix in TENSOR_SUFFIXES:
        return load_tensors(path, axis=axis, layer=layer)
    if suffix == ".gguf":
        from pvec.vectors.gguf import load_gguf

        return load_gguf(path)
    raise InputError(
        f"{path} is not a vector file that pvec reads: its name should end in "
        f"{', '.join(READABLE)}."
    )


def find_vector(name: str | Path) -> Path:
    """Return the vector file that ``name`` stands for.

    A file; ``FILE:NAME`` for one of several vectors in a file; a name without its ending; a run
    folder, or a folder of vectors, with a single vector in it (the kinds of one vector that the
    reference writes into several ``.pt`` files count as one). Raises ``InputError`` when there is
    none, or several.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _only_vector(path)
    if not path.exists():
        for suffix in READABLE:
            if path.with_name(path.name + suffix).is_file():
                return path.with_name(path.name + suffix)
    if not split_axis(path)[0].is_file():
        raise InputError(f"There is no vector file {path}: check the path.")
    return path


def vector_name(path: Path) -> str:
    """Return what to call the vector in a file: the file's stem, or the name in ``FILE:NAME``."""
    file, axis = split_axis(path)
    return axis or file.stem


def load_vectors(
    names: Iterable[str | Path],
    *,
    model: ModelMetadata | None = None,
    same_model: bool = True,
    num_layers: int | None = None,
    layer: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[Path, PersonaVector]:
    """Load the vector files that ``names`` stand for, each once, in the order given.

    With ``model`` every vector is checked against it; no weights are needed. A vector of a base
    model may be used on its finetunes, so with an adapter, or with ``same_model`` False, only the
    shape counts. Rows of files that do not say what they are get counted by the depth of the model
    (``num_layers`` without one, else that of the files that do say it). ``layer`` is the layer of
    files that hold a single ``[H]``. ``notify`` hears what was assumed, a sentence for each thing.

    Raises ``InputError`` for a file that cannot be read and ``ModelError`` for a vector of another
    model.
    """
    paths = dict.fromkeys(map(find_vector, names))
    vectors = {path: load_vector(path, layer=layer) for path in paths}
    depth = model.num_layers if model is not None else num_layers
    if depth is None:
        known = {vector.num_layers for vector in vectors.values() if vector.depth_is_known}
        depth = known.pop() if len(known) == 1 else None
    for path, vector in vectors.items():
        if depth is not None:
            vectors[path] = vector.at_depth(depth)
        if model is not None:
            check_fits(
                vectors[path],
                num_layers=model.num_layers,
                hidden_size=model.hidden_size,
                fingerprint=model.fingerprint if same_model and not model.adapter else None,
                model_id=model.id,
            )
        if notify is not None:
            for note in vectors[path].reading_notes:
                notify(f"{path.name}: {note}")
    return vectors


def load_all_kinds(path: Path, vector: PersonaVector) -> PersonaVector:
    """Return ``vector`` with the kinds of the reference's files that lie beside its ``.pt``."""
    kinds = dict(vector.kinds)
    notes = list(vector.notes)
    if path.name == f"{vector.trait}_{vector.main_kind}_diff.pt":
        for kind in KINDS:
            sibling = path.with_name(f"{vector.trait}_{kind}_diff.pt")
            if kind not in kinds and sibling.is_file():
                kinds[kind] = load_vector(sibling).at_depth(vector.num_layers).kind(kind)
                notes.append(f"{sibling.name} was read too")
    ordered = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    return replace(vector, kinds=ordered, notes=tuple(notes))


def check_fits(
    vector: PersonaVector,
    *,
    num_layers: int,
    hidden_size: int,
    fingerprint: str | None = None,
    model_id: str = "the model",
) -> None:
    """Raise ``ModelError``, naming both sides, when ``vector`` was not made for this model.

    ``fingerprint`` None skips the question whether it is the very same model: a vector of a base
    model is meant to be used on its finetunes. A GGUF file may know fewer layers than the model.
    """
    made_for = vector.metadata.get("model_id", "another model")
    too_few = vector.num_layers < num_layers and not vector.depth_is_minimum
    if vector.hidden_size != hidden_size or vector.num_layers > num_layers or too_few:
        raise ModelError(
            f"the vector of {vector.trait!r} was made for {made_for} ({vector.num_layers} layers, "
            f"width {vector.hidden_size}), but {model_id} has {num_layers} layers and width "
            f"{hidden_size}; use a vector made with this model."
        )
    recorded = vector.metadata.get("model_fingerprint")
    if fingerprint and recorded and recorded != fingerprint:
        raise ModelError(
            f"the vector of {vector.trait!r} was made with {made_for} (fingerprint {recorded}), "
            f"not with {model_id} (fingerprint {fingerprint}); use a vector made with this model."
        )


def labels(vectors: Mapping[Path, PersonaVector]) -> dict[Path, str]:
    """Return a short name for each file: its trait, with its method where that is not the mean
    difference, and with its path where names repeat.
    """
    names = {path: _name(vector) for path, vector in vectors.items()}
    return {
        path: name if list(names.values()).count(name) == 1 else f"{name} ({path})"
        for path, name in names.items()
    }


def output_path(out: Path, *, trait: str) -> Path:
    """Return the vector file that ``--out`` means, and make sure that it can be written.

    A folder that exists gets ``TRAIT.safetensors``; a name without an ending gets
    ``.safetensors``. Called before anything is computed. Raises ``InputError`` for a format that
    pvec does not write and ``StoreError`` for a place that cannot be written.
    """
    if out.is_dir():
        out = out / f"{safe_name(trait)}.safetensors"
    elif not out.suffix:
        out = out.with_name(f"{out.name}.safetensors")
    if out.suffix.lower() not in WRITABLE:
        raise InputError(
            f"pvec cannot write {out.suffix} files: end the name in .safetensors, .pt or .gguf."
        )
    if out.suffix.lower() == ".gguf":
        from pvec.models.gguf_header import require_gguf

        require_gguf()
    probe_target(out)
    return out


def save_vector(
    vector: PersonaVector,
    path: str | Path,
    *,
    kind: VectorKind | None = None,
    model_hint: str | None = None,
) -> Path:
    """Write ``vector`` in the format of the file's name and return the path.

    ``.safetensors`` holds everything; ``.pt`` and ``.gguf`` hold one kind (``kind``, what the
    file's name says, or ``response_avg``). ``model_hint`` is the architecture in llama.cpp's words,
    for GGUF. The file is replaced as a whole. Raises ``InputError`` for a format that pvec does not
    write, and ``StoreError`` when the file cannot be written.

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> pvec.save_vector(vector, "copy.safetensors").name
    'copy.safetensors'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _save_safetensors(vector, path)
    if suffix in {".pt", ".pth"}:
        return _save_pt(vector, path, kind=kind or written_kind(vector, path))
    if suffix == ".gguf":
        from pvec.vectors.gguf import save_gguf

        save_gguf(vector, path, model_hint=model_hint, kind=kind or written_kind(vector, path))
        return path
    raise InputError(
        f"pvec cannot write {suffix or 'files without an ending'}: end the name of {path} in "
        f".safetensors, .pt or .gguf."
    )


def save_pt(vector: PersonaVector, folder: str | Path) -> list[Path]:
    """Write each kind as the reference does, ``{trait}_{kind}_diff.pt``, and return the paths."""
    name = safe_name(vector.trait)
    return [
        _save_pt(vector, Path(folder) / f"{name}_{kind}_diff.pt", kind=kind)
        for kind in vector.kinds
    ]


def written_kind(vector: PersonaVector, path: Path) -> VectorKind:
    """Return the kind that a file of one kind gets: what its name says, else the main kind."""
    named = [kind for kind in vector.kinds if path.stem.endswith((kind, f"{kind}_diff"))]
    return named[0] if named else vector.main_kind


def _save_safetensors(vector: PersonaVector, path: Path) -> Path:
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {**vector.stats}
    tensors.update(vector.kinds.items())
    if vector.mean_norm is not None:
        tensors[MEAN_NORM] = vector.mean_norm
    metadata = {
        "last_row": BLOCK_OUTPUT,
        **vector.metadata,
        "format": "pvec-vector",
        "format_version": FORMAT_VERSION,
        "trait": vector.trait,
        "num_layers": str(vector.num_layers),
        "hidden_size": str(vector.hidden_size),
    }
    contiguous = {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in tensors.items()}
    with atomic_write(path) as stream:
        stream.write(_in_fixed_order(save(contiguous, metadata=metadata)))
    return path


def _save_pt(vector: PersonaVector, path: Path, *, kind: VectorKind) -> Path:
    """Write one kind as a bare tensor ``[num_layers + 1, hidden_size]`` and return the path."""
    import torch

    tensor = torch.from_numpy(np.array(vector.kind(kind), dtype=np.float32))
    with atomic_write(path) as stream:
        torch.save(tensor, stream)
    return path


def _in_fixed_order(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose writer shuffles it, so equal is byte-equal.

    The format: the header's length (8 bytes, little-endian), the header as JSON, the data.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # the data must begin at a multiple of 8
    return len(ordered).to_bytes(8, "little") + ordered + content[8 + length :]


def _load_safetensors(path: Path, *, axis: str | None, layer: int | None) -> PersonaVector:
    from safetensors import SafetensorError, safe_open

    try:
        # through torch: numpy has no bfloat16, which other tools' files may be in
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise InputError(
            f"{path} is not a safetensors file that can be read ({exc}); make it again."
        ) from exc
    if metadata.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise InputError(
            f"{path} has the format version {metadata['format_version']} and this pvec reads "
            f"{FORMAT_VERSION}; update pvec."
        )
    if metadata.get("format") != "pvec-vector":  # of another tool
        arrays = plain(path, arrays)
    return vector_from(path, arrays, axis=axis, layer=layer, metadata=metadata)


def _only_vector(folder: Path) -> Path:
    inside = folder / "vectors" if (folder / "vectors").is_dir() else folder
    files = sorted(path for path in inside.iterdir() if path.suffix.lower() in READABLE)
    native = [path for path in files if path.suffix == SUFFIX]
    if not native and len({(path.suffix, trait_from_name(path)) for path in files}) == 1:
        return next((path for path in files if kind_from_name(path) == DEFAULT_KIND), files[0])
    candidates = native or files
    if len(candidates) != 1:
        listed = ", ".join(path.name for path in candidates[:5]) or "none"
        raise InputError(f"{inside} holds {len(candidates)} vectors ({listed}): name one file.")
    return candidates[0]


def _name(vector: PersonaVector) -> str:
    method = vector.metadata.get("method", MEAN_DIFF)
    return vector.trait if method == MEAN_DIFF else f"{vector.trait} {method}"

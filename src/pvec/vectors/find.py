"""Vector files as users name them: a path, a run folder, or a name without its ending."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pvec.errors import InputError, ModelError
from pvec.types import MEAN_DIFF
from pvec.vectors.formats import READABLE, load_vector
from pvec.vectors.tensors import kind_from_name, split_axis, trait_from_name
from pvec.vectors.vector import DEFAULT_KIND, KINDS, PersonaVector

if TYPE_CHECKING:
    from pvec.models.load import ModelMetadata

SUFFIX = ".safetensors"


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


def _name(vector: PersonaVector) -> str:
    method = vector.metadata.get("method", MEAN_DIFF)
    return vector.trait if method == MEAN_DIFF else f"{vector.trait} {method}"


def require_one_model(vectors: Mapping[Path, PersonaVector]) -> None:
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

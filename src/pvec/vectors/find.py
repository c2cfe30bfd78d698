"""Vector files as users name them: a path, a run folder, or a name without its ending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pvec.errors import InputError
from pvec.vectors.vector import PersonaVector, load_vector

SUFFIX = ".safetensors"


def find_vector(name: str | Path) -> Path:
    """Return the vector file that ``name`` stands for.

    A file; a name without ``.safetensors``; a run folder (or a folder of vectors) with a single
    vector in it. Raises ``InputError`` when there is none, or several.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _only_one(path)
    if not path.exists() and path.with_name(path.name + SUFFIX).is_file():
        return path.with_name(path.name + SUFFIX)
    if not path.is_file():
        raise InputError(f"There is no vector file {path}: check the path.")
    return path


def open_vectors(names: Iterable[str | Path]) -> dict[Path, PersonaVector]:
    """Load several vector files, each once, in the order given."""
    paths = dict.fromkeys(find_vector(name) for name in names)
    return {path: load_vector(path) for path in paths}


def labels(vectors: Mapping[Path, PersonaVector]) -> dict[Path, str]:
    """Return a short name for each file: its trait, with its path where traits repeat."""
    traits = [vector.trait for vector in vectors.values()]
    return {
        path: vector.trait if traits.count(vector.trait) == 1 else f"{vector.trait} ({path})"
        for path, vector in vectors.items()
    }


def require_one_model(vectors: Mapping[Path, PersonaVector]) -> None:
    """Raise ``InputError``, naming both, when two vectors are of different models.

    Files that do not say their model (a ``.pt``) are taken at their shape.
    """
    (first, one), *others = vectors.items()
    for second, two in others:
        if _model(one) and _model(two) and _fingerprint(one) != _fingerprint(two):
            raise InputError(
                f"{first} was made with {_model(one)} and {second} with {_model(two)}: vectors of "
                f"different models have no direction in common, so use vectors of one model."
            )
        if (one.num_layers, one.hidden_size) != (two.num_layers, two.hidden_size):
            raise InputError(
                f"{first} has {one.num_layers} layers of width {one.hidden_size} and {second} "
                f"{two.num_layers} of width {two.hidden_size}: use vectors of one model."
            )


def _model(vector: PersonaVector) -> str:
    name = vector.metadata.get("model_id", "")
    adapter = vector.metadata.get("adapter", "")
    return f"{name} with {adapter}" if adapter else name


def _fingerprint(vector: PersonaVector) -> str:
    return vector.metadata.get("model_fingerprint") or _model(vector)


def _only_one(folder: Path) -> Path:
    inside = folder / "vectors" if (folder / "vectors").is_dir() else folder
    found = sorted(inside.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found[:5]) or "none"
        raise InputError(f"{inside} holds {len(found)} vectors ({listed}): name one file.")
    return found[0]

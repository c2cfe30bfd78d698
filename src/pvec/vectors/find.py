"""Vector files as users name them: a path, a run folder, or a name without its ending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pvec.errors import InputError, ModelError
from pvec.vectors.formats import load_vector
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from pvec.models.load import ModelMetadata

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


def load_vectors(
    names: Iterable[str | Path],
    *,
    model: ModelMetadata | None = None,
    same_model: bool = True,
) -> dict[Path, PersonaVector]:
    """Load the vector files that ``names`` stand for, each once, in the order given.

    With ``model`` every vector is checked against it; no weights are needed. A vector of a base
    model may be used on its finetunes, so with an adapter, or with ``same_model`` False, only the
    shape counts. Raises ``InputError`` for a file that cannot be read and ``ModelError`` for a
    vector of another model.
    """
    vectors = {}
    for path in dict.fromkeys(map(find_vector, names)):
        vectors[path] = vector = load_vector(path)
        if model is not None:
            check_fits(
                vector,
                num_layers=model.num_layers,
                hidden_size=model.hidden_size,
                fingerprint=model.fingerprint if same_model and not model.adapter else None,
                model_id=model.id,
            )
    return vectors


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
    fewer_is_fine = vector.metadata.get("source_format") == "gguf"
    too_few = vector.num_layers < num_layers and not fewer_is_fine
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

"""``pvec vector decompose``: a vector in terms of the features of a sparse autoencoder.

The features nearest to a vector are those whose decoder directions have the largest cosines with it
(paper, appendix M). Folders of SAELens (``cfg.json``, ``sae_weights.safetensors``) are read
here; of the pretrained ones, ``RELEASE:ID``, SAELens fetches the files and knows their formats.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pvec.documents import DocumentError, read_json
from pvec.errors import InputError, install_command
from pvec.models.decoder import describe_layer
from pvec.types import VectorKind
from pvec.vectors.quality import best_layer
from pvec.vectors.vector import PersonaVector

CONFIG, WEIGHTS, LABELS = "cfg.json", "sae_weights.safetensors", "labels.json"
"""Files of a folder; ``labels.json`` maps feature numbers to texts and is pvec's own."""

_DRAWS = 100
"""Random directions whose nearest feature is the control."""

_RESIDUAL = re.compile(
    r"blocks\.(?P<pre>\d+)\.hook_resid_pre|blocks\.(?P<post>\d+)\.hook_resid_post"
    r"|(model|transformer|gpt_neox)\.(layers|h)\.(?P<block>\d+)"
)
"""Hooks on the residual stream, in the words of TransformerLens and of transformers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Autoencoder:
    """What is needed of a sparse autoencoder: ``decoder`` float32 ``[features, H]``.

    ``labels`` are texts by feature number, ``neuronpedia_id`` its name there.
    """

    name: str
    decoder: np.ndarray
    hook: str = ""
    labels: Mapping[int, str] = field(default_factory=dict)
    neuronpedia_id: str = ""

    @property
    def layer(self) -> int | None:
        """The layer whose residual stream it was trained on, where its files say so."""
        return residual_layer(self.hook)

    @property
    def page(self) -> str:
        """Its place on Neuronpedia."""
        return f"https://neuronpedia.org/{self.neuronpedia_id}" if self.neuronpedia_id else ""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature near a vector; ``label`` is empty where it has none."""

    number: int
    cosine: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The features nearest to a vector, the largest absolute cosine first.

    ``explained`` is the share of the vector's square in the span of these features, ``random`` the
    mean of the largest absolute cosine that random directions have with any feature.
    """

    trait: str
    kind: VectorKind
    layer: int
    where: str
    sae: str
    features: tuple[Feature, ...]
    of: int
    explained: float
    random: float
    page: str = ""
    notes: tuple[str, ...] = ()


def open_autoencoder(name: str, *, labels: Path | None = None) -> Autoencoder:
    """Return the autoencoder in a folder, or the pretrained one that SAELens calls ``RELEASE:ID``.

    ``labels`` is a JSON file of texts by feature number, or a list of Neuronpedia's explanations.
    Raises ``InputError`` for what cannot be read.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, labels=labels or folder / LABELS, needed=labels is not None)
    release, _, identity = name.partition(":")
    if not identity:
        raise InputError(
            f"There is no folder {name!r} with an autoencoder: check the path, or name a "
            f"pretrained one of SAELens as RELEASE:ID."
        )
    return _pretrained(release, identity, labels=labels)


def decompose(
    vector: PersonaVector,
    sae: Autoencoder,
    *,
    layer: int | None = None,
    kind: VectorKind | None = None,
    top: int = 10,
    seed: int = 0,
) -> Decomposition:
    """Return the ``top`` features of ``sae`` nearest to ``vector``.

    ``layer`` is by default the one that the autoencoder was trained on, else the vector's suggested
    one. Raises ``InputError`` for another width and for a layer or kind that the vector lacks.
    """
    kind = kind or vector.main_kind
    at = layer if layer is not None else sae.layer
    at = best_layer(vector, kind=kind) if at is None else at
    row = vector.direction(at, kind=kind).astype(np.float64)
    if sae.decoder.shape[1] != len(row):
        raise InputError(
            f"The autoencoder {sae.name} has features of width {sae.decoder.shape[1]} and the "
            f"vector of {vector.trait!r} is {len(row)} wide: use one trained on the same model."
        )
    units = sae.decoder.astype(np.float64)
    lengths = np.linalg.norm(units, axis=1, keepdims=True)
    units = np.divide(units, lengths, out=np.zeros_like(units), where=lengths > 0)  # [F, H]
    cosines = units @ (row / np.linalg.norm(row))
    order = np.argsort(-np.abs(cosines), kind="stable")[:top]
    basis = units[order].T
    weights, *_ = np.linalg.lstsq(basis, row, rcond=None)
    left = row - basis @ weights
    draws = np.random.default_rng(seed).standard_normal((_DRAWS, len(row)))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    return Decomposition(
        trait=vector.trait,
        kind=kind,
        layer=at,
        where=describe_layer(at),
        sae=sae.name,
        features=tuple(
            Feature(number=int(n), cosine=float(cosines[n]), label=sae.labels.get(int(n), ""))
            for n in order
        ),
        of=len(units),
        explained=1.0 - float(left @ left) / float(row @ row),
        random=float(np.abs(draws @ units.T).max(axis=1).mean()),
        page=sae.page,
        notes=tuple(_notes(sae, at)),
    )


def _notes(sae: Autoencoder, layer: int) -> list[str]:
    if sae.layer is None:
        return [f"the autoencoder's files name no residual stream ({sae.hook or 'no hook'})"]
    if sae.layer != layer:
        return [f"the autoencoder was trained on {describe_layer(sae.layer)}"]
    return []


def residual_layer(hook: str) -> int | None:
    """Return the layer whose residual stream a hook reads, or None for any other hook.

    >>> residual_layer("blocks.19.hook_resid_post"), residual_layer("blocks.19.hook_mlp_out")
    (20, None)
    """
    match = _RESIDUAL.fullmatch(hook)
    if match is None:
        return None
    if match["pre"] is not None:
        return int(match["pre"])
    return int(match["post"] or match["block"]) + 1


def _from_folder(folder: Path, *, labels: Path, needed: bool) -> Autoencoder:
    from safetensors import SafetensorError, safe_open

    config = _read_object(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            decoder = file.get_tensor("W_dec").float().numpy()
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder / WEIGHTS} cannot be read ({error}): give a folder as SAELens saves it, with "
            f"{CONFIG} and {WEIGHTS} in it."
        ) from None
    metadata = config.get("metadata") or config  # before SAELens 6 all settings stood together
    return Autoencoder(
        name=str(folder),
        decoder=decoder,
        hook=str(metadata.get("hook_name") or metadata.get("hook_point") or ""),
        labels=read_labels(labels) if needed or labels.exists() else {},
        neuronpedia_id=str(metadata.get("neuronpedia_id") or ""),
    )


def _pretrained(release: str, identity: str, *, labels: Path | None) -> Autoencoder:
    if importlib.util.find_spec("sae_lens") is None:
        raise InputError(
            f"The autoencoder {release}:{identity} is fetched by SAELens, which is not installed: "
            f"{install_command('sae')}, or give a folder."
        )
    from sae_lens import SAE

    load: Callable[..., Any] = SAE.from_pretrained
    try:
        sae = load(release, identity)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"SAELens cannot load {release}:{identity} ({str(error).splitlines()[0]}): check the "
            f"name in its table of pretrained autoencoders."
        ) from error
    metadata = sae.cfg.metadata
    return Autoencoder(
        name=f"{release}:{identity}",
        decoder=sae.W_dec.detach().float().cpu().numpy(),
        hook=str(metadata.hook_name or ""),
        labels=read_labels(labels) if labels is not None else {},
        neuronpedia_id=str(metadata.neuronpedia_id or ""),
    )


def read_labels(path: Path) -> dict[int, str]:
    """Return texts by feature number from a JSON file: an object of them, or a list of objects with
    ``index`` and ``description``, as Neuronpedia exports explanations.
    """
    content = _read(path)
    pairs: Sequence[tuple[Any, Any]]
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        pairs = [(entry.get("index"), entry.get("description")) for entry in content]
    else:
        pairs = [(None, None)]
    if not all(str(number).isdecimal() and isinstance(text, str) for number, text in pairs):
        raise InputError(
            f"{path} does not hold labels: write an object of texts by feature number, or a list "
            f"of objects with index and description."
        )
    return {int(number): text for number, text in pairs}


def _read_object(path: Path) -> dict[str, Any]:
    content = _read(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object: give a folder as SAELens saves it.")
    return content


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        raise InputError(f"There is no {path}: check the path.") from None
    except DocumentError as error:
        raise InputError(f"{path} cannot be read: {error.problem}.") from None

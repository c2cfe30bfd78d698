"""Vectors in files of plain tensors: the reference's ``.pt``, and what other tools write.

A tensor ``[layers + 1, H]`` or ``[layers, H]``, a single ``[H]``, a list or dictionary of them by
block number, or a dictionary of several such vectors by name. None of these say what their first
row is; the model's depth does (``PersonaVector.at_depth``).
"""

from __future__ import annotations

import pickle
import re
import tokenize
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.errors import InputError, did_you_mean
from pvec.types import VectorKind
from pvec.vectors.vector import (
    BLOCK_OUTPUT,
    DEFAULT_KIND,
    KINDS,
    MEAN_NORM,
    MINIMUM_DEPTH,
    MISSING_LAYERS,
    MOST_LAYERS,
    POST_FINAL_NORM,
    ROW_0,
    PersonaVector,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYER_KEY = re.compile(r"(?:(?:layers?|blocks?|direction)[._ -]?)?(\d+)", re.IGNORECASE)

_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,  # NumPy reads a header as a Python literal
)
"""What torch and NumPy raise while they read a file that is not whole."""

_LISTED = 8
"""Names of vectors that a message lists."""


def split_axis(path: str | Path) -> tuple[Path, str | None]:
    """Return the file of ``FILE:NAME`` and the name of the vector in it, or None without one."""
    file, colon, name = str(path).rpartition(":")
    if colon and name and Path(file).is_file() and not Path(path).exists():
        return Path(file), name
    return Path(path), None


def load_tensors(path: Path, *, axis: str | None, layer: int | None) -> PersonaVector:
    """Read a ``.pt``, ``.npy`` or ``.npz`` file; see ``vector_from`` for what it may hold.

    Raises ``InputError`` for a file that is damaged or needs code to be unpickled.
    """
    content = _read_pt(path) if path.suffix.lower() in {".pt", ".pth"} else _read_numpy(path)
    # A bare tensor cannot say how its last row was taken; the reference's is after the final norm.
    metadata = {"source_format": path.suffix[1:].lower(), "last_row": POST_FINAL_NORM}
    if isinstance(content, Mapping) and "layer" in content and _is_scalar(content["layer"]):
        own = content["layer"]
        metadata["layer"] = str(own.item() if hasattr(own, "item") else own)
    return vector_from(path, plain(path, content), axis=axis, layer=layer, metadata=metadata)


def vector_from(
    path: Path,
    content: Any,
    *,
    axis: str | None = None,
    layer: int | None = None,
    metadata: Mapping[str, str],
) -> PersonaVector:
    """Return the vector in ``content``: an array, or arrays by kind, block number or name.

    ``axis`` is the name of one of several vectors, ``layer`` the layer of a single ``[H]``. Raises
    ``InputError`` naming the file, and the names there are, for anything else.
    """
    chosen = _choose(path, content, axis)
    trait = metadata.get("trait") or axis or trait_from_name(path)
    stats: dict[str, NDArray[Any]] = {}
    notes: tuple[str, ...] = ()
    entries = dict(metadata)
    kinds: Mapping[VectorKind, NDArray[Any]]
    if isinstance(chosen, Mapping) and _holds_kinds(chosen):
        kinds, stats = _kinds(path, chosen)
        if "num_layers" not in metadata:
            entries[ROW_0] = "embedding"
    else:
        rows, more, notes = _rows(path, chosen, layer, metadata.get("layer", ""))
        entries |= more
        kinds = {kind_from_name(path): rows}
    try:
        return PersonaVector(
            trait=trait,
            kinds={kind: kinds[kind] for kind in KINDS if kind in kinds},
            mean_norm=stats.pop(MEAN_NORM, None),
            stats=stats,
            metadata=entries,
            notes=notes,
        )
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def kind_from_name(path: Path) -> VectorKind:
    """Return the kind that the reference's file name gives, else the default kind."""
    for kind in KINDS:
        if re.search(rf"(^|_){kind}(_diff)?$", path.stem):
            return kind
    return DEFAULT_KIND


def trait_from_name(path: Path) -> str:
    """Return the trait that a file name gives: ``evil`` of ``evil_response_avg_diff.pt``."""
    return re.sub(rf"_({'|'.join(KINDS)})(_diff)?$", "", path.stem)


def _read_pt(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # it is read or refused, nothing between
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as exc:
        if "GLOBAL" in str(exc):  # how torch names what it would have to import
            raise InputError(
                f"{path} needs code to be unpickled, which could do anything, so pvec refuses it; "
                "save the plain tensor [layers + 1, hidden size] instead."
            ) from exc
        raise InputError(f"{path} is not a .pt file that can be read; make it again.") from exc


def _read_numpy(path: Path) -> Any:
    try:
        with path.open("rb") as stream:  # a damaged file is closed, too
            content = np.load(stream, allow_pickle=False)
            return content if isinstance(content, np.ndarray) else dict(content)
    except _DAMAGED as exc:
        raise InputError(
            f"{path} is not a NumPy file that can be read without running code; save the plain "
            "array [layers + 1, hidden size] with numpy.save."
        ) from exc


def plain(path: Path, content: Any) -> Any:
    """Return float32 arrays, and dictionaries of them; numbers and texts beside them are left out.

    Raises ``InputError`` for anything else.
    """
    if isinstance(content, Mapping):
        kept = {str(k): v for k, v in content.items() if not _is_scalar(v)}
        if not kept:
            raise InputError(f"{path} holds no tensor; save the tensor [layers + 1, hidden size].")
        return {name: plain(path, value) for name, value in kept.items()}
    if isinstance(content, list | tuple):
        parts = [plain(path, part) for part in content]
        if parts and all(isinstance(part, np.ndarray) for part in parts):
            return {str(number): part for number, part in enumerate(parts)}
    if hasattr(content, "is_floating_point"):  # a torch tensor
        content = content.float().numpy()
    if isinstance(content, np.ndarray) and content.dtype.kind in "fiu":
        array = content.astype(np.float32)
        return array.squeeze() if array.ndim > 2 or array.shape[:1] == (1,) else array
    raise InputError(
        f"{path} holds a {type(content).__name__} where a tensor [layers + 1, hidden size] is "
        "needed; save the plain tensor."
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | None) or getattr(value, "ndim", None) == 0


def _choose(path: Path, content: Any, axis: str | None) -> Any:
    """Return the one vector that is meant."""
    if not isinstance(content, Mapping) or _holds_kinds(content) or _layers_by_key(content):
        if axis is not None:
            raise InputError(f"{path} holds one vector; omit :{axis}.")
        return content
    if axis is None and len(content) > 1:
        names = list(content)
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        raise InputError(
            f"{path} holds several vectors ({', '.join(names[:_LISTED])}{more}); name one of them, "
            f"as in {path}:{names[0]}."
        )
    if axis is not None and axis not in content:
        raise InputError(
            f"{path} holds no vector {axis!r}.{did_you_mean(axis, content)} "
            f"It holds: {', '.join(list(content)[:_LISTED])}."
        )
    return _choose(path, content[axis] if axis else next(iter(content.values())), None)


def _holds_kinds(content: Mapping[str, Any]) -> bool:
    return any(name in KINDS or name == MEAN_NORM for name in content)


def _layers_by_key(content: Mapping[str, Any]) -> dict[int, NDArray[Any]]:
    """Return the vectors ``[H]`` by the number in their key; empty when keys are no numbers."""
    numbered: dict[int, NDArray[Any]] = {}
    for key, value in content.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None or not isinstance(value, np.ndarray) or value.ndim != 1:
            return {}
        numbered[int(match[1][:9])] = value
    return numbered if len(numbered) == len(content) else {}


def _kinds(
    path: Path, content: Mapping[str, Any]
) -> tuple[dict[VectorKind, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Return vectors by kind, and what is known per layer by name."""
    kinds: dict[VectorKind, NDArray[Any]] = {}
    stats: dict[str, NDArray[Any]] = {}
    for name, value in content.items():
        if name in KINDS:
            kinds[name] = value
        elif isinstance(value, np.ndarray) and value.ndim == 1:
            stats[name] = value
        else:
            raise InputError(
                f"{path} has a tensor {name!r}, which is no vector kind; "
                f"pvec knows {', '.join(KINDS)}."
            )
    return kinds, stats


def _rows(
    path: Path, content: Any, layer: int | None, own_layer: str
) -> tuple[NDArray[Any], dict[str, str], tuple[str, ...]]:
    """Return ``[layers + 1, H]``, the metadata that says what was assumed, and notes."""
    if isinstance(content, Mapping):
        numbered = _layers_by_key(content)
        widths = {len(vector) for vector in numbered.values()}
        if max(numbered) >= MOST_LAYERS:
            raise InputError(f"{path} has a vector for block {max(numbered)}; make it again.")
        if len(widths) > 1:
            raise InputError(f"{path} has vectors of different widths; save those of one model.")
        rows = np.zeros((max(numbered) + 2, widths.pop()), dtype=np.float32)
        for block, vector in numbered.items():
            rows[block + 1] = vector
        entries = {ROW_0: "layer 1", MINIMUM_DEPTH: "true", "last_row": BLOCK_OUTPUT}
        entries[MISSING_LAYERS] = _absent(len(rows), {block + 1 for block in numbered})
        return rows, entries, ("its keys are taken for block numbers: key k is layer k + 1",)
    if content.ndim != 1:
        return content, {ROW_0: "embedding"}, ()
    if own_layer.isdecimal() and layer not in {int(own_layer), int(own_layer) + 1}:
        otherwise = f"; otherwise --layer {own_layer}" if int(own_layer) else ""
        raise InputError(
            f"{path} holds a vector of layer {own_layer} and does not say whether blocks count "
            f"from 0: add --layer {int(own_layer) + 1} if they do{otherwise}."
        )
    if layer is None or not 1 <= layer <= MOST_LAYERS:
        raise InputError(
            f"{path} holds a single vector of width {len(content)} and does not say its layer; "
            "add --layer N, counted from 1."
        )
    rows = np.zeros((layer + 1, len(content)), dtype=np.float32)
    rows[layer] = content
    entries = {MINIMUM_DEPTH: "true", "last_row": BLOCK_OUTPUT}
    entries[MISSING_LAYERS] = _absent(layer + 1, {layer})
    return rows, entries, (f"its one vector is taken for layer {layer}",)


def _absent(count: int, present: set[int]) -> str:
    return ",".join(str(layer) for layer in range(count) if layer not in present)

"""Persona vectors as files: pvec's safetensors, the reference's ``.pt``, GGUF control vectors."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.errors import InputError
from pvec.runs.files import atomic_write
from pvec.types import VectorKind
from pvec.vectors.vector import BLOCK_OUTPUT, DEFAULT_KIND, KINDS, POST_FINAL_NORM, PersonaVector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

FORMAT_VERSION = "1"

_MEAN_NORM = "mean_norm"


def load_vector(path: str | Path) -> PersonaVector:
    """Read a vector from pvec's ``.safetensors``, a ``.pt`` of the reference, or a ``.gguf``.

    Raises ``InputError`` for a file that is missing, damaged, of another format, in need of code
    to be unpickled, or that holds NaN or infinite values (naming the layer).

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> vector.trait, vector.kind("response_avg").shape  # [num_layers + 1, hidden_size]
    ('evil', (6, 160))
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no vector file {path}; check the path.")
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _load_safetensors(path)
    if suffix in {".pt", ".pth"}:
        return _load_pt(path)
    if suffix == ".gguf":
        from pvec.vectors.gguf import load_gguf

        return load_gguf(path)
    raise InputError(
        f"{path} is not a vector file that pvec reads: its name should end in .safetensors, .pt "
        "or .gguf."
    )


def save_vector(vector: PersonaVector, path: str | Path) -> Path:
    """Write ``vector`` as safetensors and return the path. The file is replaced as a whole.

    Raises ``StoreError`` when it cannot be written.

    >>> vector = pvec.load_vector("runs/evil-tiny/vectors/evil.safetensors")
    >>> pvec.save_vector(vector, "copy.safetensors").name
    'copy.safetensors'
    """
    from safetensors.numpy import save

    tensors: dict[str, NDArray[Any]] = {**vector.stats}
    tensors.update(vector.kinds.items())
    if vector.mean_norm is not None:
        tensors[_MEAN_NORM] = vector.mean_norm
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
    return Path(path)


def save_pt(vector: PersonaVector, folder: str | Path) -> list[Path]:
    """Write each kind as the reference does, ``{trait}_{kind}_diff.pt``, and return the paths."""
    return [
        save_pt_kind(vector, Path(folder) / f"{vector.trait}_{kind}_diff.pt", kind=kind)
        for kind in vector.kinds
    ]


def save_pt_kind(vector: PersonaVector, path: str | Path, *, kind: VectorKind) -> Path:
    """Write one kind as a bare tensor ``[num_layers + 1, hidden_size]`` and return the path."""
    import torch

    tensor = torch.from_numpy(np.array(vector.kind(kind), dtype=np.float32))
    with atomic_write(path) as stream:
        torch.save(tensor, stream)
    return Path(path)


def _in_fixed_order(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose writer shuffles it, so equal is byte-equal.

    The format: the header's length (8 bytes, little-endian), the header as JSON, the data.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ordered = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    ordered += b" " * (-len(ordered) % 8)  # the data must begin at a multiple of 8
    return len(ordered).to_bytes(8, "little") + ordered + content[8 + length :]


def _load_safetensors(path: Path) -> PersonaVector:
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
    return _from_arrays(path, arrays, metadata)


def _load_pt(path: Path) -> PersonaVector:
    import torch

    unreadable = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)
    try:
        with warnings.catch_warnings(action="ignore"):  # it is read or refused, nothing between
            content = torch.load(path, map_location="cpu", weights_only=True)
    except unreadable as exc:
        if "GLOBAL" in str(exc):  # how torch names what it would have to import
            raise InputError(
                f"{path} needs code to be unpickled, which could do anything, so pvec refuses it; "
                "save the plain tensor [layers + 1, hidden size] instead."
            ) from exc
        raise InputError(f"{path} is not a .pt file that can be read; make it again.") from exc
    tensors = content if isinstance(content, dict) else {_kind_from_name(path): content}
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path} holds a {type(tensor).__name__} where a tensor [layers + 1, hidden size] "
                "is needed; save the plain tensor."
            )
        arrays[str(name)] = tensor.float().numpy()
    # A bare tensor cannot say how its last row was taken; the reference's is after the final norm.
    metadata = {"source_format": "pt", "last_row": POST_FINAL_NORM}
    return _from_arrays(path, arrays, metadata)


def _from_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> PersonaVector:
    """Sort tensors into kinds and per-layer statistics; say which file when that fails."""
    kinds: dict[VectorKind, Array] = {}
    stats: dict[str, Array] = {}
    lone = len(arrays) == 1
    for name, array in arrays.items():
        if name in KINDS:
            kinds[name] = array
        elif lone:
            kinds[_kind_from_name(path)] = array
        elif array.ndim == 1:
            stats[name] = array
        else:
            raise InputError(
                f"{path} has a tensor {name!r}, which is no vector kind; "
                f"pvec knows {', '.join(KINDS)}."
            )
    mean_norm = stats.pop(_MEAN_NORM, None)
    try:
        return PersonaVector(
            trait=metadata.get("trait") or _trait_from_name(path),
            kinds={kind: kinds[kind] for kind in KINDS if kind in kinds},
            mean_norm=mean_norm,
            stats=stats,
            metadata=metadata,
        )
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def _kind_from_name(path: Path) -> VectorKind:
    """Return the kind that the reference's file name gives, else the default kind."""
    for kind in KINDS:
        if re.search(rf"(^|_){kind}(_diff)?$", path.stem):
            return kind
    return DEFAULT_KIND


def _trait_from_name(path: Path) -> str:
    """Return the trait that a file name gives: ``evil`` of ``evil_response_avg_diff.pt``."""
    return re.sub(rf"_({'|'.join(KINDS)})(_diff)?$", "", path.stem)

"""Persona vectors as files: pvec's safetensors, the reference's ``.pt``, GGUF control vectors."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from pvec.errors import InputError, ModelError
from pvec.runs.files import atomic_write
from pvec.types import VectorKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

FORMAT_VERSION = "1"
KINDS: tuple[VectorKind, ...] = get_args(VectorKind)
DEFAULT_KIND: VectorKind = "response_avg"

BLOCK_OUTPUT = "block_output"
"""Metadata ``last_row``: row ``num_layers`` is the un-normed residual stream, as pvec takes it."""

POST_FINAL_NORM = "post_final_norm"
"""Metadata ``last_row``: row ``num_layers`` was taken after the final norm, as the reference's."""

MISSING_LAYERS = "missing_layers"
"""Metadata: layers (``"0,1"``) whose rows are zero because the file they came from has none."""

_MEAN_NORM = "mean_norm"


@dataclass(frozen=True, kw_only=True, eq=False)
class PersonaVector:
    """The vectors of one trait in one model.

    ``kinds[kind]`` is float32 ``[num_layers + 1, hidden_size]``, row ``l`` = layer ``l`` (0 is the
    embedding output). ``mean_norm`` and each array of ``stats`` (``auc``, ``split_half``, …) are
    float32 ``[num_layers + 1]``. ``metadata`` is provenance, text to text (docs/formats.md).
    """

    trait: str
    kinds: Mapping[VectorKind, Array]
    mean_norm: Array | None = None
    stats: Mapping[str, Array] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes and values. Raises ``InputError`` naming kind and layer."""
        if not self.kinds:
            raise InputError(f"the vector of {self.trait!r} is empty: it has none of {KINDS}.")
        shape = next(iter(self.kinds.values())).shape
        for kind, array in self.kinds.items():
            _check_kind(kind, array, shape)
        per_layer = dict(self.stats)
        if self.mean_norm is not None:
            per_layer[_MEAN_NORM] = self.mean_norm
        for name, values in per_layer.items():
            if values.shape != shape[:1]:
                raise InputError(
                    f"{name!r} has the shape {list(values.shape)}, but the vector has "
                    f"{shape[0]} layers (embedding included); the file is damaged."
                )

    @property
    def num_layers(self) -> int:
        """The number of decoder blocks that the vector was made for."""
        return int(next(iter(self.kinds.values())).shape[0]) - 1

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream that the vector was made for."""
        return int(next(iter(self.kinds.values())).shape[1])

    @property
    def main_kind(self) -> VectorKind:
        """``response_avg``, or the first kind of a file that does not have it."""
        return DEFAULT_KIND if DEFAULT_KIND in self.kinds else next(iter(self.kinds))

    @property
    def missing_layers(self) -> frozenset[int]:
        """Layers for which the file has no vector (GGUF has none for 0 and 1)."""
        listed = self.metadata.get(MISSING_LAYERS, "")
        return frozenset(int(layer) for layer in listed.split(",") if layer)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the vectors themselves."""
        digest = hashlib.sha256()
        for kind in sorted(self.kinds):
            digest.update(kind.encode())
            digest.update(self.kinds[kind].astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def kind(self, kind: VectorKind) -> Array:
        """Return one kind, ``[num_layers + 1, hidden_size]``. Raises ``InputError`` if absent."""
        if kind not in self.kinds:
            raise InputError(
                f"the vector of {self.trait!r} has no kind {kind!r}; "
                f"it has {', '.join(self.kinds)}."
            )
        return self.kinds[kind]

    def row(self, layer: int, *, kind: VectorKind = DEFAULT_KIND) -> Array:
        """Return the vector at ``layer``, float32 ``[hidden_size]``.

        Raises ``InputError`` for a layer that the file does not have.
        """
        if not 0 <= layer <= self.num_layers or layer in self.missing_layers:
            missing = f" without {sorted(self.missing_layers)}" if self.missing_layers else ""
            raise InputError(
                f"the vector of {self.trait!r} has no layer {layer}; "
                f"it has 0 to {self.num_layers}{missing}."
            )
        row: Array = self.kind(kind)[layer]
        return row


def load_vector(path: str | Path) -> PersonaVector:
    """Read a vector from pvec's ``.safetensors``, a ``.pt`` of the reference, or a ``.gguf``.

    Raises ``InputError`` for a file that is missing, damaged, of another format, in need of code
    to be unpickled, or that holds NaN or infinite values (naming the layer).
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


def _check_kind(kind: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.ndim != 2 or array.shape[0] < 2:
        raise InputError(
            f"{kind!r} has the shape {list(array.shape)}; a vector has [layers + 1, hidden size], "
            "one row per layer beginning with the embedding."
        )
    if array.shape != shape:
        raise InputError(
            f"{kind!r} has the shape {list(array.shape)} and another kind {list(shape)}; "
            "they must be of one model."
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        layers = ", ".join(str(layer) for layer in bad[:5])
        more = f" and {bad.size - 5} more" if bad.size > 5 else ""
        raise InputError(
            f"{kind!r} has NaN or infinite values at layer {layers}{more}; compute it again, in "
            "float32 or bfloat16 if it was float16."
        )


def _kind_from_name(path: Path) -> VectorKind:
    """Return the kind that the reference's file name gives, else the default kind."""
    for kind in KINDS:
        if re.search(rf"(^|_){kind}(_diff)?$", path.stem):
            return kind
    return DEFAULT_KIND


def _trait_from_name(path: Path) -> str:
    """Return the trait that a file name gives: ``evil`` of ``evil_response_avg_diff.pt``."""
    return re.sub(rf"_({'|'.join(KINDS)})(_diff)?$", "", path.stem)


def with_metadata(vector: PersonaVector, **entries: str) -> PersonaVector:
    """Return ``vector`` with some provenance added or replaced."""
    return replace(vector, metadata={**vector.metadata, **entries})

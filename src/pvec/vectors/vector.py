"""The vectors of one trait in one model, with what is known about them layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from pvec.errors import InputError
from pvec.types import VectorKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

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

    def norms(self, kind: VectorKind = DEFAULT_KIND) -> Array:
        """Return the length of the vector at every layer, ``[num_layers + 1]``."""
        norms: Array = np.linalg.norm(self.kind(kind), axis=1)
        return norms

    def relative_norms(self, kind: VectorKind = DEFAULT_KIND) -> Array:
        """Return the lengths in mean residual norms, ``[num_layers + 1]``; NaN where unknown."""
        norms = self.norms(kind)
        relative: Array = np.full_like(norms, np.nan)
        if self.mean_norm is not None:
            np.divide(norms, self.mean_norm, out=relative, where=self.mean_norm > 0)
        return relative

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


def with_metadata(vector: PersonaVector, **entries: str) -> PersonaVector:
    """Return ``vector`` with some provenance added or replaced."""
    return replace(vector, metadata={**vector.metadata, **entries})


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

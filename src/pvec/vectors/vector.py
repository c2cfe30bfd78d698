"""The vectors of one trait in one model, with what is known about them layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

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

ROW_0 = "row_0"
"""Metadata: what the first row of the file was taken for when the file itself does not say, see
``RowMeaning``; absent where it is known."""

RowMeaning = Literal["embedding", "layer 1"]

MOST_LAYERS = 10_000
"""More than any model has: a file that says so is damaged."""

MINIMUM_DEPTH = "minimum_depth"
"""Metadata ``"true"``: the model may have more layers than the file has rows."""

MEAN_NORM = "mean_norm"


@dataclass(frozen=True, kw_only=True, eq=False)
class PersonaVector:
    """The vectors of one trait in one model.

    ``kinds[kind]`` is float32 ``[num_layers + 1, hidden_size]``, row ``l`` = layer ``l`` (0 is the
    embedding output). ``mean_norm`` and each array of ``stats`` (``auc``, ``split_half``, …) are
    float32 ``[num_layers + 1]``. ``metadata`` is provenance, text to text (docs/formats.md);
    ``notes`` says what reading the file had to assume.
    """

    trait: str
    kinds: Mapping[VectorKind, Array]
    mean_norm: Array | None = None
    stats: Mapping[str, Array] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes and values. Raises ``InputError`` naming kind and layer."""
        if not self.kinds:
            raise InputError(f"the vector of {self.trait!r} is empty: it has none of {KINDS}.")
        shape = next(iter(self.kinds.values())).shape
        for kind, array in self.kinds.items():
            _check_kind(kind, array, shape)
        per_layer = dict(self.stats)
        if self.mean_norm is not None:
            per_layer[MEAN_NORM] = self.mean_norm
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
        listed = self.metadata.get(MISSING_LAYERS, "").split(",")
        return frozenset(int(layer) for layer in listed if layer.isdecimal())

    @property
    def reading_notes(self) -> tuple[str, ...]:
        """What reading the file had to assume, in sentences."""
        row_0 = self.metadata.get(ROW_0)
        if row_0 is None:
            return self.notes
        rows = self.num_layers + (row_0 == "embedding")
        meaning = "the embedding" if row_0 == "embedding" else "layer 1"
        return (
            *self.notes,
            f"the file does not say what its {rows} rows are; row 0 is taken for {meaning}, which "
            f"is right for a model of {self.num_layers} layers",
        )

    @property
    def depth_is_minimum(self) -> bool:
        """Whether the model may have more layers than the file says, as with GGUF files."""
        gguf = self.metadata.get("source_format") == "gguf"
        return gguf or self.metadata.get(MINIMUM_DEPTH) == "true"

    @property
    def depth_is_known(self) -> bool:
        """Whether the file says how many layers its model has."""
        return ROW_0 not in self.metadata and not self.depth_is_minimum

    @property
    def last_row_is_normed(self) -> bool:
        """Whether row ``num_layers`` was taken after the final norm, as the reference does.

        It is then no direction of the residual stream: it can be shown and converted, but nothing
        can be steered with it.
        """
        return self.metadata.get("last_row") == POST_FINAL_NORM

    @property
    def is_incremental(self) -> bool:
        """Whether every row is the increase over the layer before (``combine --incremental``)."""
        return self.metadata.get("incremental") == "true"

    @property
    def steering_layers(self) -> tuple[int, ...]:
        """The layers, from 1, for which the file has a direction of the residual stream."""
        last = self.num_layers - self.last_row_is_normed
        return tuple(n for n in range(1, last + 1) if n not in self.missing_layers)

    def left_out(self, num_layers: int) -> str | None:
        """Say which of the model's layers steering at all layers leaves out, or return None."""
        absent = [n for n in range(1, num_layers + 1) if n not in self.steering_layers]
        if not absent:
            return None
        why = " (the last row was taken after the final norm)" if self.last_row_is_normed else ""
        return (
            f"the vector of {self.trait!r} has no direction of the residual stream at layers "
            f"{', '.join(map(str, absent))}{why}, so they are left out"
        )

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

    def direction(self, layer: int, *, kind: VectorKind = DEFAULT_KIND) -> Array:
        """Return what can be added at ``layer``, float32 ``[hidden_size]``.

        Raises ``InputError`` for a layer that the file does not have, whose row was taken after
        the final norm, or whose row is zero.
        """
        row = self.row(layer, kind=kind)
        if self.last_row_is_normed and layer == self.num_layers:
            raise InputError(
                f"the vector of {self.trait!r} was taken after the final norm at layer {layer}, so "
                f"it is no direction of the residual stream there; choose a layer up to "
                f"{layer - 1}, or compute the vector with pvec."
            )
        if not row.any():
            raise InputError(
                f"the vector of {self.trait!r} is zero at layer {layer}, so it changes nothing "
                "there; choose another layer."
            )
        return row

    def increments(self, kind: VectorKind = DEFAULT_KIND) -> Array:
        """Return ``v_l - v_(l-1)`` for every layer, ``[num_layers + 1, hidden_size]``.

        Nothing is added at layer 0, so row 1 is ``v_1``: adding row ``l`` after every block makes
        the sum of the additions up to ``l`` equal ``v_l`` (paper, appendix J.3). Rows above the
        last of ``steering_layers`` are zero. Raises ``InputError`` for a file that holds increments
        already, or that has no vector at a layer in between.
        """
        if self.is_incremental:
            raise InputError(
                f"the vector of {self.trait!r} holds the increments already; omit incremental and "
                "steer all layers, or give the vector that it was made from."
            )
        last = max(self.steering_layers, default=0)
        missing = sorted(set(range(1, last + 1)) - set(self.steering_layers))
        if missing:
            raise InputError(
                f"increments need a vector at every layer, and the vector of {self.trait!r} has "
                f"none at {missing}; use the file that it was made from."
            )
        rows = self.kind(kind)
        increments: Array = np.concatenate([rows[:2], np.diff(rows, axis=0)[1:]])
        increments[last + 1 :] = 0.0
        return increments

    def at_depth(self, num_layers: int) -> PersonaVector:
        """Return the vector with its rows counted for a model of ``num_layers`` blocks.

        Files of other tools have a row for every block, or one more for the embedding, and do not
        say which; the depth of the model does. Nothing changes where the file says it, or where
        the depth fits neither.
        """
        row_0 = self.metadata.get(ROW_0)
        rows = self.num_layers + (row_0 == "embedding")
        if row_0 is None or rows not in {num_layers, num_layers + 1}:
            return self
        known = {key: value for key, value in self.metadata.items() if key != ROW_0}
        actual: RowMeaning = "embedding" if rows == num_layers + 1 else "layer 1"
        meaning = "the embedding"
        if actual == "layer 1":
            meaning = "layer 1 (there is no embedding row), and the last row a block's output"
        note = f"it has {rows} rows and the model {num_layers} layers, so row 0 is {meaning}"
        if actual == row_0:
            return replace(self, metadata=known)
        # one row for each block is what hooks on blocks give; with one more, hidden states
        known["last_row"] = BLOCK_OUTPUT if actual == "layer 1" else POST_FINAL_NORM
        if actual == "layer 1":
            missing = {0, *(layer + 1 for layer in self.missing_layers)}
            kinds = {kind: np.pad(array, ((1, 0), (0, 0))) for kind, array in self.kinds.items()}
        else:
            missing = {layer - 1 for layer in self.missing_layers if layer > 0}
            kinds = {kind: array[1:] for kind, array in self.kinds.items()}
        known[MISSING_LAYERS] = ",".join(map(str, sorted(missing)))
        return replace(self, kinds=kinds, metadata=known, notes=(*self.notes, note))


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

"""Arrays as bytes: the only form that survives the way to vLLM's workers and back."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from pvec.steering.tables import TableRows


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays as bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """Return what ``pack`` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def pack_plan(rows: Mapping[int, TableRows]) -> bytes:
    """Return the rows of a plan, by layer, as bytes."""
    return pack(
        {
            f"{layer}.{name}": array
            for layer, entry in rows.items()
            for name, array in vars(entry).items()
        }
    )


def unpack_plan(data: bytes) -> dict[int, TableRows]:
    """Return what ``pack_plan`` was given."""
    by_layer: dict[int, dict[str, np.ndarray]] = {}
    for name, array in unpack(data).items():
        layer, _, part = name.partition(".")
        by_layer.setdefault(int(layer), {})[part] = array
    return {layer: TableRows(**parts) for layer, parts in by_layer.items()}

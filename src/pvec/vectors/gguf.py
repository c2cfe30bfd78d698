"""GGUF control vectors, as llama.cpp reads them (``--control-vector``).

llama.cpp adds ``direction.k`` to the output of its 0-based block k, which is paper layer k + 1, and
refuses k = 0: layer 1 cannot be expressed, and nor can the embedding output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.errors import InputError, StoreError
from pvec.models.decoder import block_index
from pvec.models.gguf_header import require_gguf
from pvec.runs.files import atomic_write, store_error
from pvec.types import VectorKind
from pvec.vectors.tensors import kind_from_name, trait_from_name
from pvec.vectors.vector import DEFAULT_KIND, MISSING_LAYERS, MOST_LAYERS, PersonaVector

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARCHITECTURE = "controlvector"
FIRST_LAYER = 2
"""The first layer that llama.cpp takes: ``direction.1``."""

LLAMA_CPP_NAMES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
}
"""Architectures that llama.cpp calls otherwise than transformers."""

_NUM_LAYERS = "pvec.num_layers"
"""The model's depth, which directions alone do not say; llama.cpp passes over it."""

_BLOCK_0 = "direction.0 is taken for layer 1 (block 0); llama.cpp itself refuses such a file"


def save_gguf(
    vector: PersonaVector,
    path: Path,
    *,
    model_hint: str | None = None,
    kind: VectorKind = DEFAULT_KIND,
) -> None:
    """Write one kind as a control vector.

    ``model_hint`` is the architecture as llama.cpp names it (``qwen2``; default: what the vector's
    metadata say). Layer ``l`` becomes ``direction.{l - 1}``; layers without a direction of the
    residual stream are left out. Raises ``InputError`` when the architecture is unknown or no
    layer can be expressed, and ``StoreError`` when the file cannot be written.
    """
    gguf = require_gguf()
    model_type = vector.metadata.get("model_type", "")
    hint = model_hint or vector.metadata.get("model_hint")
    hint = hint or LLAMA_CPP_NAMES.get(model_type, model_type)
    if not hint:
        raise InputError(
            "A GGUF file says which architecture it is for, and this vector does not know its own: "
            "write it with `pvec vector convert`, which takes --model-hint qwen2 and the like."
        )
    rows = {
        layer: np.ascontiguousarray(vector.row(layer, kind=kind), dtype=np.float32)
        for layer in vector.steering_layers
        if layer >= FIRST_LAYER
    }
    if not rows:
        raise InputError(
            f"the vector of {vector.trait!r} has no layer from {FIRST_LAYER} on, and GGUF cannot "
            "hold layers 0 and 1; keep it as .safetensors."
        )
    # the package insists on a path of its own; the whole file is then put in place at once
    with TemporaryDirectory() as folder:
        aside = Path(folder) / "vector.gguf"
        try:
            writer = gguf.GGUFWriter(aside, ARCHITECTURE)
            writer.add_string("controlvector.model_hint", hint)
            writer.add_uint32("controlvector.layer_count", len(rows))
            writer.add_uint32(_NUM_LAYERS, vector.num_layers)
            for layer, row in rows.items():
                writer.add_tensor(f"direction.{block_index(layer)}", row)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        except OSError as exc:
            raise store_error(path, exc) from exc
        _check_written(path, aside, rows)
        content = aside.read_bytes()
    with atomic_write(path) as stream:
        stream.write(content)


def gguf_notes(vector: PersonaVector, *, kind: VectorKind) -> list[str]:
    """Return what a user should know about the control vector that ``save_gguf`` writes."""
    notes = [
        "layer 1 (block 0) was left out: llama.cpp's control vectors begin at layer 2",
        "llama.cpp adds every layer of the file at every position, with one scale; use "
        "--control-vector-layer-range K K with K = layer - 1 to steer at a single layer",
    ]
    if vector.last_row_is_normed:
        notes.insert(
            0, f"layer {vector.num_layers} was left out: it is no direction of the residual stream"
        )
    others = [other for other in vector.kinds if other != kind]
    if others:
        notes.append(f"only {kind} was written: a GGUF file holds one kind, not {others}")
    return notes


def load_gguf(path: Path) -> PersonaVector:
    """Read a control vector as kind ``response_avg``; layers that it lacks are zero and listed.

    ``direction.k`` is added to the output of block k, so it is layer k + 1, ``direction.0``
    included, which other tools write and llama.cpp refuses. Raises ``InputError`` for a file that
    is damaged or is not a control vector.
    """
    gguf = require_gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as exc:
        raise InputError(f"{path} is not a GGUF file that can be read; make it again.") from exc
    architecture = _text(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of architecture {architecture!r}, not a control vector; "
            "give the file that llama.cpp takes with --control-vector."
        )
    rows = _tensor_rows(path, reader)
    depth = _text(reader, _NUM_LAYERS)
    known = int(depth) if depth.isdecimal() and len(depth) < 5 else 0
    return _from_rows(
        path,
        rows,
        num_layers=max([*rows, known]),
        model_hint=_text(reader, "controlvector.model_hint"),
    )


def _from_rows(
    path: Path, rows: Mapping[int, NDArray[Any]], *, num_layers: int, model_hint: str
) -> PersonaVector:
    widths = {row.shape for row in rows.values()}
    if len(widths) > 1 or len(next(iter(widths))) != 1:
        raise InputError(f"{path} has directions of different shapes; make it again.")
    array = np.zeros((num_layers + 1, *next(iter(widths))), dtype=np.float32)  # [L + 1, H]
    for layer, row in rows.items():
        array[layer] = row
    missing = [str(layer) for layer in range(num_layers + 1) if layer not in rows]
    metadata = {
        "source_format": "gguf",
        "model_hint": model_hint,
        MISSING_LAYERS: ",".join(missing),
    }
    try:
        return PersonaVector(
            trait=trait_from_name(path),
            kinds={kind_from_name(path): array},
            metadata=metadata,
            notes=(_BLOCK_0,) if 1 in rows else (),
        )
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def _layer(path: Path, tensor_name: str) -> int:
    match = re.fullmatch(r"direction\.(\d+)", tensor_name)
    if match is None:
        raise InputError(
            f"{path} has a tensor {tensor_name!r}; a control vector has only direction.1, "
            "direction.2, …"
        )
    layer = int(match.group(1)[:9]) + 1
    if layer > MOST_LAYERS:
        raise InputError(f"{path} has a direction for layer {layer}; make it again.")
    return layer


def _tensor_rows(path: Path, reader: Any) -> dict[int, NDArray[Any]]:
    """Return the directions by layer. Raises ``InputError`` for a file without any."""
    rows = {_layer(path, tensor.name): np.array(tensor.data) for tensor in reader.tensors}
    if not rows:
        raise InputError(f"{path} has no direction tensors; make it again.")
    return rows


def _check_written(path: Path, aside: Path, rows: Mapping[int, NDArray[Any]]) -> None:
    """Raise ``StoreError`` unless the file holds what was to be written (a disk may be full)."""
    try:
        written = _tensor_rows(aside, require_gguf().GGUFReader(aside))
        whole = written.keys() == rows.keys() and all(
            np.array_equal(written[layer], row) for layer, row in rows.items()
        )
    except (InputError, ValueError, IndexError, KeyError, OSError):
        whole = False
    if not whole:
        raise StoreError(
            f"cannot write {path}: the file was cut short; free some space on the disk or raise "
            "the limit on file sizes (ulimit -f)."
        )


def _text(reader: Any, key: str) -> str:
    entry = reader.get_field(key)
    return "" if entry is None else str(entry.contents())

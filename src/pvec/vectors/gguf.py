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

from pvec.errors import InputError, install_command
from pvec.models.decoder import block_index
from pvec.runs.files import atomic_write
from pvec.types import VectorKind
from pvec.vectors.vector import DEFAULT_KIND, MISSING_LAYERS, PersonaVector

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

ARCHITECTURE = "controlvector"
FIRST_LAYER = 2
"""The first layer that GGUF can express: ``direction.1``."""


def save_gguf(
    vector: PersonaVector,
    path: str | Path,
    *,
    model_hint: str,
    kind: VectorKind = DEFAULT_KIND,
) -> tuple[str, ...]:
    """Write one kind as a control vector and return what the user should know about it.

    ``model_hint`` is the architecture as llama.cpp names it (``qwen2``). Layer ``l`` becomes
    ``direction.{l - 1}``. Raises ``InputError`` when no layer can be expressed, and ``StoreError``
    when the file cannot be written.
    """
    gguf = _package()
    layers = [
        layer
        for layer in range(FIRST_LAYER, vector.num_layers + 1)
        if layer not in vector.missing_layers
    ]
    if not layers:
        raise InputError(
            f"the vector of {vector.trait!r} has no layer from {FIRST_LAYER} on, and GGUF cannot "
            "hold layers 0 and 1; keep it as .safetensors."
        )
    # the package insists on a path of its own; the whole file is then put in place at once
    with TemporaryDirectory() as folder:
        aside = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(aside, ARCHITECTURE)
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for layer in layers:
            row = np.ascontiguousarray(vector.row(layer, kind=kind), dtype=np.float32)
            writer.add_tensor(_tensor_name(layer), row)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content = aside.read_bytes()
    with atomic_write(path) as stream:
        stream.write(content)
    return _notes(vector, kind)


def load_gguf(path: Path) -> PersonaVector:
    """Read a control vector as kind ``response_avg``; layers that it lacks are zero and listed.

    Raises ``InputError`` for a file that is damaged, is not a control vector, or has a
    ``direction.0``, which llama.cpp refuses as well.
    """
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as exc:
        raise InputError(f"{path} is not a GGUF file that can be read; make it again.") from exc
    architecture = _text(reader, "general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{path} is a GGUF file of architecture {architecture!r}, not a control vector; "
            "give the file that llama.cpp takes with --control-vector."
        )
    rows = {_layer(path, tensor.name): np.array(tensor.data) for tensor in reader.tensors}
    return _from_rows(path, rows, model_hint=_text(reader, "controlvector.model_hint"))


def _from_rows(path: Path, rows: Mapping[int, NDArray[Any]], *, model_hint: str) -> PersonaVector:
    if not rows:
        raise InputError(f"{path} has no direction tensors; make it again.")
    widths = {row.shape for row in rows.values()}
    if len(widths) > 1 or len(next(iter(widths))) != 1:
        raise InputError(f"{path} has directions of different shapes; make it again.")
    num_layers = max(rows)
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
        return PersonaVector(trait=path.stem, kinds={DEFAULT_KIND: array}, metadata=metadata)
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def _layer(path: Path, tensor_name: str) -> int:
    match = re.fullmatch(r"direction\.(\d+)", tensor_name)
    if match is None:
        raise InputError(
            f"{path} has a tensor {tensor_name!r}; a control vector has only direction.1, "
            "direction.2, …"
        )
    if int(match.group(1)) == 0:
        raise InputError(
            f"{path} has a direction.0, which llama.cpp refuses because its control vectors begin "
            "at direction.1 (layer 2); export it again without that tensor."
        )
    return int(match.group(1)) + 1


def _tensor_name(layer: int) -> str:
    return f"direction.{block_index(layer)}"


def _notes(vector: PersonaVector, kind: VectorKind) -> tuple[str, ...]:
    notes = [
        "layer 1 (block 0) was left out: llama.cpp's control vectors begin at layer 2",
        "llama.cpp adds every layer of the file at every position, with one scale; use "
        "--control-vector-layer-range K K with K = layer - 1 to steer at a single layer",
    ]
    others = [other for other in vector.kinds if other != kind]
    if others:
        notes.append(f"only {kind} was written: a GGUF file holds one kind, not {others}")
    return tuple(notes)


def _text(reader: Any, key: str) -> str:
    entry = reader.get_field(key)
    return "" if entry is None else str(entry.contents())


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as exc:
        raise InputError(f"GGUF files need the gguf package: {install_command('gguf')}.") from exc
    return gguf

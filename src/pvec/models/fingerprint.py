"""Fingerprint of a model: a hash over its configuration and samples of every tensor.

Reading a few hundred bytes of each tensor tells two finetunes apart in milliseconds, and does not
depend on how the weights are split over files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from pvec.documents import check_regular
from pvec.errors import ModelError
from pvec.models.files import ModelFiles, read_config
from pvec.models.gguf import header_bytes
from pvec.models.gguf_header import GGUFHeader
from pvec.models.weights import read_header

_SAMPLE = 256
"""Bytes read at the start, the middle and the end of a tensor."""

_CHUNK = 1 << 20

_VOLATILE = frozenset(("_name_or_path", "transformers_version", "use_cache", "torch_dtype"))
"""Configuration keys that do not change what the model computes here."""


def model_fingerprint(files: ModelFiles) -> str:
    """Return 16 hex digits over configuration, weights and adapter; ``ModelError`` without weights.

    Two models with the same fingerprint compute the same function; the tokenizer and the chat
    template are not part of it (``chat_fingerprint``).
    """
    digest = hashlib.sha256()
    if files.gguf is not None:
        _add_gguf(digest, files.gguf)
    else:
        _add_config(digest, read_config(files.folder))
        _add_weights(digest, files.folder)
    if files.adapter_folder is not None:
        for path in sorted(files.adapter_folder.glob("adapter_*")):
            if path.suffix == ".json":
                _add_config(digest, read_config(files.adapter_folder, path.name))
            elif path.is_file():
                _add_file(digest, path)
    return digest.hexdigest()[:16]


def chat_fingerprint(tokenizer: Any) -> str:
    """Return 16 hex digits over vocabulary, merges, special tokens and chat template."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    digest.update(json.dumps(tokenizer.chat_template).encode())
    return digest.hexdigest()[:16]


def _add_config(digest: hashlib._Hash, config: dict[str, Any]) -> None:
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    lasting.pop("base_model_name_or_path", None)
    digest.update(json.dumps(lasting, sort_keys=True).encode())


def _add_weights(digest: hashlib._Hash, folder: Path) -> None:
    safe = sorted(folder.glob("*.safetensors"))
    pickled = sorted(folder.glob("*.bin"))
    if not safe and not pickled:
        raise ModelError(
            f"The model folder {str(folder)!r} has no weights (*.safetensors): fetch or save it "
            f"again."
        )
    tensors: dict[str, bytes] = {}
    for path in safe:
        tensors |= _tensor_samples(path)
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name])
    if not safe:
        for path in pickled:
            _add_file(digest, path)


def _add_gguf(digest: hashlib._Hash, header: GGUFHeader) -> None:
    digest.update(header_bytes(header))
    with header.path.open("rb") as file:
        for tensor in header.tensors:
            digest.update(_sample(file, tensor.start, tensor.start + tensor.size))


def _tensor_samples(path: Path) -> dict[str, bytes]:
    """Return type, shape and three samples of the bytes of each tensor in a safetensors file."""
    header, start = read_header(path)
    with path.open("rb") as file:
        return {
            name: f"{entry['dtype']}{entry['shape']}".encode()
            + _sample(file, *(start + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }


def _sample(file: BinaryIO, first: int, stop: int) -> bytes:
    places = {first, max(first, (first + stop - _SAMPLE) // 2), max(first, stop - _SAMPLE)}
    parts = []
    for place in sorted(places):
        file.seek(place)
        parts.append(file.read(min(_SAMPLE, stop - place)))
    return b"".join(parts)


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    check_regular(path)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)

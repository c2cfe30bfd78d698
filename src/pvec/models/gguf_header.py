"""The header of a GGUF file: what it holds and where, read without touching the weights.

A header takes tenths of a second, so that a file that cannot be used is refused before anything is
loaded. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from pvec.errors import InputError, ModelError, install_command

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_FORMATS[12] = "d"
"""Type of a metadata value → its format in ``struct``."""


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One tensor: its shape as in torch, the name of its type, and its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """What a GGUF file says about itself. ``metadata`` has the length of an array in its place.

    The first ``size`` bytes of the file are the header, vocabulary included.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]
    size: int

    @property
    def architecture(self) -> str:
        """The architecture in llama.cpp's words."""
        return str(self.metadata.get("general.architecture", "none"))

    @property
    def types(self) -> tuple[str, ...]:
        """The types of the tensors, the one with the most bytes first."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            totals[tensor.type] = totals.get(tensor.type, 0) + tensor.size
        return tuple(sorted(totals, key=lambda name: -totals[name]))

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


def require_gguf() -> ModuleType:
    """Return the gguf package. Raises ``InputError`` with the install command without it."""
    try:
        import gguf
    except ImportError as exc:
        raise InputError(f"GGUF files need the gguf package: {install_command('gguf')}.") from exc
    package: ModuleType = gguf
    return package


def is_gguf(path: Path) -> bool:
    """Whether a file is meant as GGUF, by its name or its first bytes."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF model.

    Raises ``InputError`` without the gguf package, and ``ModelError`` for a file that is not GGUF,
    is not complete, or is one of several parts.
    """
    gguf = require_gguf()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data, path).header(gguf)
            missing = max((t.start + t.size for t in header.tensors), default=0) - len(data)
    except (struct.error, EOFError):
        raise ModelError(_incomplete(path, "it ends inside its header")) from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read as GGUF ({error}): fetch it again.") from None
    if missing > 0:
        raise ModelError(_incomplete(path, f"its last {missing:,} bytes are missing"))
    if header.metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{path} is one part of {header.metadata['split.count']}: merge the parts into one "
            f"file (llama-gguf-split --merge)."
        )
    return header


def _incomplete(path: Path, reason: str) -> str:
    return f"{path} is not a complete GGUF file ({reason}): fetch it again."


class _Reader:
    """Reads values one after the other; ``struct.error`` or ``EOFError`` at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = len(MAGIC)

    def header(self, gguf: ModuleType) -> GGUFHeader:
        if self.data[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin with the letters GGUF")
        version, tensors, values = self.numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of the format is not supported")
        metadata = {self.text(): self.value(*self.numbers("I")) for _ in range(values)}
        entries = [self.entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        return GGUFHeader(
            path=self.path,
            metadata=metadata,
            tensors=tuple(
                _tensor(gguf, name, shape, kind, start + offset)
                for name, shape, kind, offset in entries
            ),
            size=self.position,
        )

    def numbers(self, formats: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{formats}", self.data, self.position)
        self.position += struct.calcsize(f"<{formats}")
        return values

    def text(self) -> str:
        start = self.position + 8
        self.skip(*self.numbers("Q"))
        return self.data[start : self.position].decode("utf-8", errors="replace")

    def skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self.data):
            raise EOFError

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(_format(kind))[0]
        element, count = self.numbers("IQ")
        if element == _STRING:
            for _ in range(count):
                self.skip(*self.numbers("Q"))
        else:
            self.skip(count * struct.calcsize(_format(element)))
        return count

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (dimensions,) = self.numbers("I")
        if dimensions > len(self.data):
            raise EOFError
        shape = self.numbers("Q" * dimensions)
        kind, offset = self.numbers("IQ")
        return name, shape[::-1], kind, offset


def _format(kind: int) -> str:
    if kind not in _FORMATS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _FORMATS[kind]


def _tensor(
    gguf: ModuleType, name: str, shape: tuple[int, ...], kind: int, start: int
) -> GGUFTensor:
    try:
        quantisation = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantisation]
    except (ValueError, KeyError):
        raise ValueError(
            f"the tensor {name} has type {kind}, which gguf does not know: pip install -U gguf"
        ) from None
    bytes_ = prod(shape) // block * size
    return GGUFTensor(name=name, shape=shape, type=quantisation.name, start=start, size=bytes_)

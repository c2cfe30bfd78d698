"""Mean activations of single answers, on disk: one float16 safetensors file for each layer.

What ``--keep-activations`` writes, and what the methods other than the mean difference read
(docs/formats.md). ``index.json`` says whose activations they are; it is written last, so a folder
without it holds none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pvec.closing import Closing
from pvec.documents import misfit, read_json, read_record
from pvec.errors import StoreError
from pvec.runs.files import atomic_write, probe_writable
from pvec.types import Sign, SpanMeans, SpanName

FORMAT_VERSION = 1

INDEX = "index.json"

SPANS: tuple[SpanName, ...] = ("prompt", "prompt_last", "response")

_LARGEST = 2.0**15
"""Values are divided by a power of two that brings the largest of a layer below this; float16 ends
at 65,504."""

_SHAPE = {
    "format_version": int, "trait": str, "num_layers": int, "hidden_size": int,
    "mean_norm": [float], "metadata": {...: str}, "answers": [dict],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeptAnswer:
    """The answer of one row: ``pair`` is shared by an answer and its opposite number, or empty."""

    id: str
    sign: Sign
    question: str
    pair: str = ""


def activation_bytes(answers: int, *, num_layers: int, hidden_size: int) -> int:
    """Return how much disk the activations of so many answers take."""
    return answers * len(SPANS) * (num_layers + 1) * hidden_size * 2


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptActivations:
    """Activations that were kept. ``mean_norm`` is ``[L + 1]``, ``metadata`` that of the vector
    that was made of them.
    """

    folder: Path
    trait: str
    num_layers: int
    hidden_size: int
    mean_norm: np.ndarray
    metadata: Mapping[str, str]
    answers: tuple[KeptAnswer, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the index of a folder, or of the folder ``activations`` in a run.

        Raises ``StoreError`` where there is none, or one that is damaged.
        """
        if not (folder / INDEX).is_file():
            folder = folder / "activations"
        path = folder / INDEX
        if not path.is_file():
            raise StoreError(
                f"{folder} holds no activations of answers: keep them with "
                f"`pvec vector compute RUN --keep-activations`."
            )
        index = read_json(path)
        wrong = misfit(index, _SHAPE)
        if wrong is not None or index["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{path} is damaged or of another version (at {wrong or 'format_version'}): keep "
                f"the activations again with --keep-activations."
            )
        try:
            answers = tuple(read_record(KeptAnswer, entry) for entry in index["answers"])
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}): keep the activations again.") from None
        return cls(
            folder=folder,
            trait=index["trait"],
            num_layers=index["num_layers"],
            hidden_size=index["hidden_size"],
            mean_norm=np.array(index["mean_norm"], dtype=np.float32),
            metadata=index["metadata"],
            answers=answers,
        )

    @classmethod
    def current(cls, folder: Path, *, inputs: str) -> Self | None:
        """Return the activations of ``folder`` if they are of the answers that ``inputs`` hashes
        (a vector's metadata), else None.
        """
        if not (folder / INDEX).is_file():
            return None
        kept = cls.read(folder)
        return kept if kept.metadata.get("inputs") == inputs else None

    def layer(self, layer: int, span: SpanName) -> np.ndarray:
        """Return a layer's means over a span, float32 ``[N, H]``; NaN rows for empty spans.

        Raises ``StoreError`` for a file that is missing or does not fit the index.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / layer_file(layer)
        try:
            with safe_open(path, framework="np") as file:
                scale = float((file.metadata() or {})["scale"])
                values = file.get_tensor(span).astype(np.float32) * np.float32(scale)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}): keep the activations again."
            ) from error
        if values.shape != (len(self.answers), self.hidden_size):
            raise StoreError(
                f"{path} has the shape {list(values.shape)} where {len(self.answers)} answers of "
                f"width {self.hidden_size} are due: keep the activations again."
            )
        result: np.ndarray = values
        return result


class ActivationWriter(Closing):
    """Takes captured answers one by one and writes them by layer; holds none of them in memory.

    They wait in a temporary file in ``folder``. Raises ``StoreError`` at construction when the
    disk has no room for ``answers`` of them.
    """

    def __init__(self, folder: Path, *, answers: int, num_layers: int, hidden_size: int) -> None:
        size = activation_bytes(answers, num_layers=num_layers, hidden_size=hidden_size)
        probe_writable(folder, need_bytes=3 * size)  # in float32 while they wait
        (folder / INDEX).unlink(missing_ok=True)
        self._folder = folder
        self._shape = (len(SPANS), num_layers + 1, hidden_size)
        self._answers: list[KeptAnswer] = []
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)

    def add(self, row: SpanMeans, answer: KeptAnswer) -> None:
        """Keep one answer, captured at every layer."""
        values = np.stack([row.means[span] for span in SPANS]).astype(np.float32)
        assert values.shape == self._shape, "an answer that was not captured at every layer"
        self._file.write(values.tobytes())
        self._answers.append(answer)

    def finish(
        self, *, trait: str, mean_norm: np.ndarray, metadata: Mapping[str, str]
    ) -> KeptActivations:
        """Write the layers, then the index, and return what was kept."""
        self._file.flush()
        shape = (len(self._answers), *self._shape)  # [N, spans, L + 1, H]
        waiting = np.memmap(self._file, dtype=np.float32, mode="r", shape=shape)
        for layer in range(self._shape[1]):
            _write_layer(self._folder / layer_file(layer), waiting[:, :, layer])
        kept = KeptActivations(
            folder=self._folder,
            trait=trait,
            num_layers=self._shape[1] - 1,
            hidden_size=self._shape[2],
            mean_norm=mean_norm,
            metadata=metadata,
            answers=tuple(self._answers),
        )
        with atomic_write(self._folder / INDEX, mode="w") as stream:
            json.dump(_index(kept), stream, ensure_ascii=False)
        return kept

    def close(self) -> None:
        """Delete what waits."""
        self._file.close()


def layer_file(layer: int) -> str:
    """Return the name of a layer's file."""
    return f"layer_{layer:03}.safetensors"


def _write_layer(path: Path, values: np.ndarray) -> None:
    """Write a layer's means ``[N, spans, H]`` as float16, scaled where they are too large."""
    from safetensors.numpy import save

    largest = float(np.nanmax(np.abs(values), initial=0.0))
    scale = 2.0 ** max(0, int(np.ceil(np.log2(largest / _LARGEST)))) if largest else 1.0
    tensors: dict[str, np.ndarray] = {
        span: np.ascontiguousarray(values[:, place] / np.float32(scale), dtype=np.float16)
        for place, span in enumerate(SPANS)
    }
    with atomic_write(path) as stream:
        stream.write(save(tensors, metadata={"scale": str(scale)}))


def _index(kept: KeptActivations) -> dict[str, Any]:
    answers: Sequence[dict[str, Any]] = [asdict(answer) for answer in kept.answers]
    return {
        "format_version": FORMAT_VERSION,
        "trait": kept.trait,
        "num_layers": kept.num_layers,
        "hidden_size": kept.hidden_size,
        "mean_norm": [float(norm) for norm in kept.mean_norm],
        "metadata": dict(kept.metadata),
        "answers": answers,
    }

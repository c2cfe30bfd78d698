"""What screening writes: every sample's numbers, the filtered file, and the rows it took out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pvec.data.csv_table import encode_row
from pvec.errors import InputError
from pvec.projection.inputs import Source, is_same_file
from pvec.projection.samples import Samples
from pvec.runs.files import atomic_write, probe_writable

SAMPLES = "samples.csv"


def filtered_paths(source: Source, *, overwrite: bool) -> tuple[Path, Path]:
    """Return where the kept rows and the removed ones go, beside the input.

    Raises ``InputError`` where something is there already that ``overwrite`` does not replace.
    """
    base = source.output.name.replace(".projected", "")
    stem, suffix = Path(base).stem, Path(base).suffix
    kept, removed = (source.output.with_name(f"{stem}.{w}{suffix}") for w in ("kept", "removed"))
    for target in (kept, removed):
        if is_same_file(target, source.path):
            raise InputError(f"{target} is the input itself: rename the input.")
        if target.exists() and not overwrite:
            raise InputError(f"{target} is there already: give --overwrite to replace it.")
    probe_writable(kept.parent)
    return kept, removed


def write_filtered(paths: tuple[Path, Path], source: Source, *, removed: np.ndarray) -> None:
    """Write the rows of ``source`` as they are to the first path, the removed to the second."""
    for path, wanted in zip(paths, (~removed, removed), strict=True):
        with atomic_write(path) as stream, source.writer(stream, columns=()) as writer:
            for number, entry in enumerate(source.entries()):
                if wanted[number]:
                    writer.write(entry.row, {})


def write_samples(
    folder: Path,
    sets: Mapping[str, Samples],
    *,
    columns: Sequence[tuple[str, int]],
    responses: Mapping[str, np.ndarray],
    natural: Mapping[str, np.ndarray],
    removed: np.ndarray | None,
) -> None:
    """Write ``samples.csv``: every sample's projections and differences in the input's order.

    Tables are ``[samples, columns]`` by set, ``columns`` are vectors with layers, and ``removed``
    says of the samples of the set ``data`` which were, None without a threshold.
    """
    names = [f"{vector}_layer{layer}" for vector, layer in columns]
    parts = ("response", "natural", "difference")
    header = ["set", "line", *(f"{n}_{p}" for n in names for p in parts), "removed"]
    with atomic_write(folder / SAMPLES) as stream:
        stream.write(encode_row(header) + b"\n")
        for name, samples in sets.items():
            for n, line in enumerate(samples.lines):
                numbers = [
                    value
                    for r, s in zip(responses[name][n], natural[name][n], strict=True)
                    for value in (r, s, r - s)
                ]
                gone = "" if removed is None or name != "data" else str(bool(removed[n]))
                cells = ["" if np.isnan(value) else repr(float(value)) for value in numbers]
                stream.write(encode_row([name, str(line), *cells, gone]) + b"\n")

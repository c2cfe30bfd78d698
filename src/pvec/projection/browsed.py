"""Samples of a screened file with their texts, for reading: ``browsed.jsonl`` in the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pvec.projection.inputs import Samples
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import encode_line
from pvec.runs.summary import BROWSED

MOST = 1500
"""Samples that are kept for reading; of a larger file an even spread beside the decisive ones."""


def choose_samples(
    differences: np.ndarray, thresholds: np.ndarray, *, most: int = MOST
) -> list[int]:
    """Return which of the samples ``[n, columns]`` are kept for reading, in the file's order.

    All of a small file. Else a quarter are those furthest out, half those nearest to a threshold
    (the medians where there is none), and the rest an even spread.
    """
    count = len(differences)
    if count <= most:
        return list(range(count))
    middle = np.where(np.isfinite(thresholds), thresholds, np.nanmedian(differences, axis=0))
    spread = np.nanstd(differences, axis=0)
    distance = (differences - middle) / np.where(spread > 0, spread, 1.0)
    furthest = np.argsort(-np.nan_to_num(distance, nan=-np.inf).max(axis=1), kind="stable")
    nearest = np.argsort(np.nan_to_num(np.abs(distance), nan=np.inf).min(axis=1), kind="stable")
    chosen: set[int] = set()
    for order, size in ((furthest, most // 4), (nearest, 3 * most // 4)):
        for number in order:
            if len(chosen) >= size:
                break
            chosen.add(int(number))
    others = np.setdiff1d(np.arange(count), list(chosen))
    spread_out = np.linspace(0, len(others) - 1, most - len(chosen)).round().astype(int)
    chosen.update(others[spread_out].tolist())
    return sorted(chosen)


def write_browsed(
    folder: Path,
    samples: Samples,
    responses: Mapping[int, str],
    *,
    natural: Mapping[str, str],
) -> None:
    """Write the samples whose ``responses`` are given by number (the row of ``samples.csv``).

    Each with its ``line``, ``question``, ``response``, and ``natural``, the model's own answer by
    prompt (null where none was generated).
    """
    with atomic_write(folder / BROWSED) as stream:
        for number, response in responses.items():
            key = samples.prompts[number]
            line = {
                "number": number,
                "line": samples.lines[number],
                "question": samples.distinct[key].question,
                "response": response,
                "natural": natural.get(key),
            }
            stream.write(encode_line(line))

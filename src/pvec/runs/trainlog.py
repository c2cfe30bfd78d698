"""The log of a finetuning: one line per logged step, appended as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvec.runs.jsonl import read_jsonl

LOG = "log.jsonl"
"""Its name in a run folder."""


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log's lines in order of steps; what a resumed run did again counts once."""
    lines: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for _, line in read_jsonl(folder / LOG):
        lines[line["step"], "eval_loss" in line, "train_loss" in line] = dict(line)
    return [lines[key] for key in sorted(lines)]

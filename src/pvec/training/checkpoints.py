"""The checkpoints of a training: which one to go on from, and how far it was."""

from __future__ import annotations

import json
import re
from pathlib import Path


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the latest whole checkpoint in ``folder``; one cut off by a kill is passed over."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:  # the Trainer writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if match:
            found.append((int(match[1]), path))
    return max(found)[1] if found else None


def steps_of(checkpoint: Path | None) -> int:
    """Return the steps that led to a checkpoint; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0

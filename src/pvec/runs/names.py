"""What models, runs and files are called when nobody gave them a name."""

from __future__ import annotations

import re
from pathlib import Path

_LONGEST_NAME = 120
"""Characters; file systems allow 255 bytes, and endings are added."""


def model_label(place: str | Path) -> str:
    """Return what to call a model or adapter: the part of its place that tells it from others.

    ``runs/train-evil/adapter`` is ``train-evil``, ``runs/train-evil/checkpoint-40`` is
    ``train-evil-checkpoint-40``, anything else its last part.
    """
    path = Path(place)
    parent = path.parent.name
    if parent and path.name == "adapter":
        return parent
    if parent and (path.name == "merged" or path.name.startswith("checkpoint-")):
        return f"{parent}-{path.name}"
    return path.name


def run_name(*parts: str, model: str, adapter: str | None) -> str:
    """Return the name of what was made with a model: ``parts``, then the model, then its adapter.

    >>> run_name("steer", "evil", model="Qwen/Qwen3-4B", adapter="runs/train-calm/adapter")
    'steer-evil-qwen3-4b-train-calm'
    """
    names = [*parts, Path(model).name, *([model_label(adapter)] if adapter else [])]
    return slug("-".join(names)).lower()


def slug(text: str) -> str:
    """Return ``text`` as a file name."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def safe_name(text: str) -> str:
    """Return ``text`` as the name of one file in the folder at hand, whatever it says.

    For names that come out of files: path separators, control characters and leading dots go, and
    a name that is left empty is ``unnamed``.

    >>> safe_name("/etc/../evil mind")
    'etc-..-evil mind'
    """
    cleaned = re.sub(r"[^\w .+-]+", "-", text).strip(" .-")
    return cleaned[:_LONGEST_NAME] or "unnamed"

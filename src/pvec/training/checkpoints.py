"""The checkpoints of a training: which one to resume from, and whether it is whole."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvec.backends.session import Notify, ignore
from pvec.documents import check_regular, read_json

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint after ``step`` steps; ``finished`` when no step remains."""

    path: Path
    step: int
    finished: bool


Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors that an adapter's file must hold, by name."""


def latest_checkpoint(
    folder: Path, *, shapes: Shapes, notify: Notify = ignore
) -> Checkpoint | None:
    """Return the latest whole checkpoint in ``folder``, or None.

    One that a kill left incomplete, or that was damaged later, is passed over; ``notify`` is told
    of the damaged ones. Nothing in a checkpoint is unpickled that could run code.
    """
    numbered = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for step, path in sorted(numbered, reverse=True):
        state_path = path / "trainer_state.json"
        if not state_path.is_file():  # the Trainer writes this file last
            continue
        try:
            state = read_json(state_path, finite=False)
            return _checkpoint(path, step, state, shapes)
        except _DAMAGED as error:
            first = str(error).strip().split("\n", maxsplit=1)[0][:150]
            notify(f"{path.name} is damaged ({first}), so an earlier state is used")
            _remove_pipes(path)
    return None


def _remove_pipes(folder: Path) -> None:
    """Remove what is neither file nor folder: training writes these names again, and would wait."""
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.unlink()


def has_adapter(folder: Path, *, shapes: Shapes) -> bool:
    """Whether ``folder`` holds an adapter with its configuration and whole weights."""
    try:
        read_json(folder / "adapter_config.json", finite=False)
        _check_weights(folder, shapes)
    except _DAMAGED:
        return False
    return True


_DAMAGED = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError),
    *(ArithmeticError, MemoryError, struct.error, pickle.PickleError),
)
"""What reading a file raises that is not what it should be."""


def _checkpoint(path: Path, step: int, state: dict[str, Any], shapes: Shapes) -> Checkpoint:
    """Return the checkpoint in ``path``. Raises one of ``_DAMAGED`` when it is not whole."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    if state["global_step"] != step or not isinstance(state["log_history"], list):
        raise ValueError("trainer_state.json is of another step")
    _check_weights(path, shapes)
    random_states = sorted(path.glob("rng_state*.pth"))
    if not random_states:
        raise ValueError("it has no random state")
    with warnings.catch_warnings(action="ignore"), safe_globals():  # type: ignore[no-untyped-call]
        for file in (path / "optimizer.pt", path / "scheduler.pt", *random_states):
            check_regular(file)
            try:
                torch.load(file, map_location="cpu", weights_only=True)
            except _DAMAGED:  # in words of the system's or of Python's
                raise ValueError(f"{file.name} cannot be read") from None
    control = state["stateful_callbacks"]["TrainerControl"]["args"]
    finished = bool(control["should_training_stop"]) or step >= state["max_steps"]
    return Checkpoint(path=path, step=step, finished=finished)


def _check_weights(folder: Path, shapes: Shapes) -> None:
    from safetensors import SafetensorError, safe_open

    check_regular(folder / WEIGHTS)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS}: {error}") from None
    if stored != dict(shapes):
        raise ValueError(f"{WEIGHTS} does not hold the tensors of this adapter")

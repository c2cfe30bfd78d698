"""A training of several processes: they agree before it starts, and end together.

Every process plans the training by itself. What differs among them would end in a hang or, worse,
in gradients of two trainings averaged; it is found here, before any weights are loaded.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec import __version__
from pvec.backends.processes import Processes
from pvec.backends.session import Notify
from pvec.errors import InputError, PvecError
from pvec.runs.manifest import FILE_NAME as MANIFEST
from pvec.runs.responses import stable_hash
from pvec.training.config import TrainConfig

if TYPE_CHECKING:
    from pvec.training.plan import TrainPlan

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, which may load a large model from a slow disk."""

_SLOW_FOLDER = 60
"""Seconds after which a folder that another process made must be visible."""

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True, kw_only=True)
class View:
    """What one process has to say before the training starts."""

    problem: str | None
    versions: Mapping[str, str]
    identity: Mapping[str, str]
    """Hashes of the parts of the plan's identity."""


def check_sharding(config: TrainConfig, processes: Processes) -> None:
    """Raise ``InputError`` for what ``memory.shard`` cannot do, and for FSDP by other means."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise InputError(
            "pvec shards the frozen weights itself: set memory.shard=true, and in accelerate's "
            "configuration distributed_type: MULTI_GPU in place of FSDP (--multi_gpu, not "
            "--use_fsdp)."
        )
    if not config.memory.shard:
        return
    if processes.size == 1:
        raise InputError(
            "memory.shard divides the weights among processes, and there is one: start several "
            "with accelerate launch or torchrun, or set memory.shard=false."
        )
    others = {
        "model.quantize": config.model.quantize,
        "memory.unsloth": config.memory.unsloth,
        "output.merge": config.output.merge,
        "lora.bias": config.lora.bias != "none",
    }
    for name, value in others.items():
        if value:
            raise InputError(f"memory.shard does not go with {name}: leave one of them out.")


def agreed_plan(
    make: Callable[[], TrainPlan], processes: Processes, *, notify: Notify
) -> TrainPlan:
    """Return this process's plan after all processes made the same one, and join them.

    Raises the ``PvecError`` of ``make``, and ``InputError`` for that of another process, or for
    other versions, data or settings there.
    """
    if processes.size == 1:
        return make()
    plan, problem = None, None
    try:
        plan = make()
    except PvecError as error:
        problem = error
    notify(f"waiting for all {processes.size} processes of this launch")
    _join(cpu=plan.device == "cpu" if plan else False)
    view = View(
        problem=str(problem) if problem else None,
        versions={"pvec": __version__} | {name: version(name) for name in _PACKAGES},
        identity={k: stable_hash(v) for k, v in plan.identity().items()} if plan else {},
    )
    views = processes.share_all(view)
    if problem is not None:
        raise problem
    assert plan is not None
    require_agreement(views)
    return plan


def require_agreement(views: Sequence[View]) -> None:
    """Raise ``InputError`` for the first process that stopped or differs from process 0."""
    for number, other in enumerate(views):
        if other.problem is not None:
            raise InputError(f"Process {number} of this launch stopped: {other.problem}")
        for what, ours, theirs in (
            ("versions", views[0].versions, other.versions),
            ("training", views[0].identity, other.identity),
        ):
            different = [name for name in ours if ours[name] != theirs.get(name)]
            if different:
                raise InputError(_difference(what, number, different, ours, theirs))


def _difference(
    what: str, number: int, names: list[str], ours: Mapping[str, str], theirs: Mapping[str, str]
) -> str:
    if what == "versions":
        listed = ", ".join(f"{n} {theirs.get(n)} in place of {ours[n]}" for n in names)
        return (
            f"Process {number} of this launch has {listed}: install the same versions on every "
            f"machine."
        )
    return (
        f"Process {number} of this launch has another training than process 0 (other: "
        f"{', '.join(names)}): start every process with the same configuration and files."
    )


def wait_for_folder(folder: Path, processes: Processes) -> None:
    """Wait until the main process has made the run folder and this one sees it.

    Raises ``InputError`` on every process when one of them does not.
    """
    if processes.size == 1:
        return
    processes.share_all(None)  # the main one gets here when it has made it
    waited = 0
    while not (folder / MANIFEST).is_file() and waited < _SLOW_FOLDER:
        time.sleep(1)  # a network file system shows a new file late
        waited += 1
    require_same_state((folder / MANIFEST).is_file(), folder, processes)


def require_same_state(state: Any, folder: Path, processes: Processes) -> None:
    """Raise ``InputError`` unless the run folder is in the same ``state`` for every process."""
    if processes.size == 1:
        return
    states = processes.share_all(state)
    for number, other in enumerate(states):
        if other != states[0]:
            raise InputError(
                f"Process {number} of this launch does not see the run folder {folder} as process "
                f"0 does: put it (--out) on a file system that all machines share."
            )


def _join(*, cpu: bool) -> None:
    """Join the processes as accelerate does, whose Trainer then finds them joined."""
    from accelerate import PartialState

    PartialState(cpu=cpu, timeout=PATIENCE)


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Turn what a process sees when another one ended into an ``InputError``."""
    if processes.size == 1:
        yield
        return
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(
            word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        ):
            raise
        first = re.sub(r"^\[[^]]*\] *", "", str(error).strip()).split("\n", maxsplit=1)[0]
        first = first.split(". ", maxsplit=1)[0][:150]
        raise InputError(
            f"Another process of this launch ended or cannot be reached ({first}): see its output, "
            f"then start all of them again with the same command, which goes on from the last "
            f"checkpoint."
        ) from error
    if dist.is_initialized():
        dist.destroy_process_group()

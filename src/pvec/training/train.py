"""``pvec train``: LoRA finetuning, optionally steered, logging the persona shift (section 5).

The run folder holds the manifest, the log line by line, the Trainer's checkpoints, the adapter and
on request the merged model. The same command again resumes from the last whole checkpoint, and does
nothing when the training is finished.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pvec.backends.processes import Processes
from pvec.backends.session import Notify, ignore
from pvec.documents import read_json
from pvec.notebook import HtmlResult
from pvec.runs.files import atomic_write, probe_target
from pvec.runs.jsonl import JsonlLog, encode_line
from pvec.runs.store import Run
from pvec.runs.summary import ANSWERS, HOOKS_ON, LOG, PREFIX
from pvec.training.checkpoints import Checkpoint, has_adapter, latest_checkpoint
from pvec.training.configfile import load_config
from pvec.training.launch import agreed_plan, require_same_state, together, wait_for_folder
from pvec.types import Progress

if TYPE_CHECKING:
    from pvec.training.plan import TrainPlan
    from pvec.training.trainer import PlannedTrainer

KIND = "train"
RESULT = "result.json"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class TrainResult(HtmlResult):
    """The outcome of a finetuning: losses per token, and the shifts of the last measurement."""

    run: Path
    adapter: Path
    merged: Path | None
    steps: int
    first_loss: float
    last_loss: float
    """Mean over the last tenth of the training."""
    held_out_loss: float | None
    steering: tuple[str, ...]
    touched: tuple[int, ...]
    """Positions that each instruction touched, over all steps and processes."""
    shifts: Mapping[str, float]
    hooks_on: int | None
    """Measurements made with steering on: none."""
    stopped_early: bool
    tokens_per_second: float
    seconds: float
    monitor_seconds: float
    next: tuple[str, ...] = ()


def check(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    runs: Path = Path("runs"),
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> TrainPlan:
    """Validate a configuration and everything it names, and return the plan; loads no weights.

    Raises ``InputError`` or ``ModelError`` for bad input, and ``StoreError`` for a run folder that
    cannot be used.
    """
    loaded = load_config(path, overrides=overrides)
    config = loaded.config
    for note in loaded.notes:
        notify(note)
    from pvec.training.plan import make_plan

    plan = make_plan(
        config,
        path=path,
        folder=out or config.output.folder or runs / f"train-{path.stem}",
        processes=Processes.launched(),
        on_row=lambda done, total: on_progress(
            Progress(stage="read", done=done, total=total, unit="rows")
        ),
    )
    Run.preview(plan.folder, kind=KIND, identity=plan.identity())
    return plan


def run(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    runs: Path = Path("runs"),
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> TrainResult:
    """Finetune as the configuration in ``path`` says.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for bad input before any weights are
    loaded, and ``SteeringError`` before step 1 when steering does not prove itself.
    """
    processes = Processes.launched()
    if not processes.main:
        notify = on_progress = ignore
    planned = partial(
        check,
        path,
        overrides=overrides,
        out=out,
        runs=runs,
        notify=notify,
        on_progress=on_progress,
    )
    with together(processes):
        plan = agreed_plan(planned, processes, notify=notify)
        for note in plan.notes:
            notify(note)
        with _opened(plan) as store:
            wait_for_folder(plan.folder, processes)
            finished = _finished(plan)
            resume = latest_checkpoint(plan.folder, shapes=plan.adapter.shapes, notify=notify)
            state = finished is not None, resume.step if resume else 0
            require_same_state(state, plan.folder, processes)
            if finished is not None:
                notify(f"this training is finished already: {plan.folder}")
                return finished
            if store is not None:
                probe_target(plan.folder / RESULT)
            return _train(plan, store, resume, notify=notify, on_progress=on_progress)


def _train(
    plan: TrainPlan,
    store: Run | None,
    resume: Checkpoint | None,
    *,
    notify: Notify,
    on_progress: Callable[[Progress], None],
) -> TrainResult:
    from pvec.training.model import load_for_training
    from pvec.training.trainer import train

    if resume is not None:
        notify(f"resuming from {resume.path.name}")
    notify(f"loading {plan.metadata.id} on {plan.device}")
    model = load_for_training(
        plan.config,
        plan.metadata.files,
        dtype=plan.dtype,
        device=plan.device,
        notify=notify,
        on_progress=on_progress,
    )
    if plan.shift is not None:
        plan.shift.on_alarm = lambda text: notify(f"ALARM, {text}")
    started = time.perf_counter()
    with ExitStack() as stack:
        log = stack.enter_context(JsonlLog(plan.folder / LOG)) if store else None
        trainer = train(
            plan,
            model,
            resume=resume,
            notify=notify,
            on_log=log.append if log else ignore,
            on_step=lambda step, steps, detail: on_progress(
                Progress(stage="train", done=step, total=steps, unit="steps", detail=detail)
            ),
        )
    seconds = time.perf_counter() - started
    steps = trainer.state.global_step - (resume.step if resume else 0)
    result = _result(plan, trainer, steps=steps, seconds=seconds)
    if store is not None:
        with atomic_write(plan.folder / RESULT, mode="w") as stream:
            stream.write(json.dumps(_jsonable(result), indent=2) + "\n")
        if plan.shift is not None and plan.shift.answers:
            with atomic_write(plan.folder / ANSWERS) as stream:
                stream.writelines(map(encode_line, plan.shift.answers))
        store.end_session(timings={"train": round(seconds, 3)})
    return result


@contextmanager
def _opened(plan: TrainPlan) -> Iterator[Run | None]:
    """Open the run folder on the main process; the others only read it."""
    if not plan.processes.main:
        yield None
        return
    with Run.open_or_create(plan.folder, kind=KIND, identity=plan.identity()) as store:
        store.begin_session(command=sys.argv)
        store.update_manifest(
            settings=plan.config.model_dump(mode="json"),
            steering=[scheduled.description for scheduled in plan.steering],
            steps=plan.steps,
        )
        yield store


def _finished(plan: TrainPlan) -> TrainResult | None:
    """Return the result of a training that is finished, or None."""
    if not has_adapter(plan.folder / ADAPTER, shapes=plan.adapter.shapes):
        return None
    try:
        saved = read_json(plan.folder / RESULT, finite=False)
        return TypeAdapter(TrainResult).validate_python(saved)
    except (OSError, ValueError):  # absent or damaged: it is made again
        return None


def _result(plan: TrainPlan, trainer: PlannedTrainer, *, steps: int, seconds: float) -> TrainResult:
    """Return what was trained; ``steps`` and ``seconds`` are those of this process."""
    log = trainer.state.log_history
    losses = [line["loss"] for line in log if "loss" in line]
    tail = losses[-max(1, len(losses) // 10) :]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    measured = [line for line in log if HOOKS_ON in line]
    tokens = plan.data.train.tokens / plan.batches.steps_per_epoch * steps
    option = "" if plan.metadata.bundled else f" --model {plan.metadata.id}"
    return TrainResult(
        run=plan.folder,
        adapter=plan.folder / ADAPTER,
        merged=plan.folder / "merged" if plan.config.output.merge else None,
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else float("nan"),
        last_loss=sum(tail) / len(tail) if tail else float("nan"),
        held_out_loss=held_out[-1] if held_out else None,
        steering=tuple(scheduled.description for scheduled in plan.steering),
        touched=trainer.total_touched(),
        shifts={
            key.removeprefix(PREFIX): value
            for key, value in (measured[-1] if measured else {}).items()
            if key.startswith(PREFIX) and key != HOOKS_ON
        },
        hooks_on=int(measured[-1][HOOKS_ON]) if measured else None,
        stopped_early=trainer.state.global_step < trainer.state.max_steps,
        tokens_per_second=tokens / seconds,
        seconds=seconds,
        monitor_seconds=plan.shift.seconds if plan.shift else 0.0,
        next=(
            f"pvec report {plan.folder}",
            f"pvec chat{option} --adapter {plan.folder / ADAPTER}",
        ),
    )


def _jsonable(result: TrainResult) -> dict[str, Any]:
    plain = asdict(result)
    return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}

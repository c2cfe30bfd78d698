"""``pvec train``: LoRA finetuning, steered or not, with the persona watched (paper, section 5).

The run folder holds the manifest, the log line by line, the Trainer's checkpoints, the adapter and
on request the merged model. The same command again goes on from the last whole checkpoint, and
does nothing when the training is done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.backends.processes import Processes
from pvec.backends.session import Notify, ignore
from pvec.runs.files import atomic_write
from pvec.runs.jsonl import JsonlLog
from pvec.runs.responses import stable_hash
from pvec.runs.store import Run
from pvec.runs.summary import LOG, read_log
from pvec.training.config import TrainConfig
from pvec.training.configfile import load_config
from pvec.training.plan import Prepared, prepare
from pvec.types import Progress

if TYPE_CHECKING:
    from pvec.steering.proof import LayerProof
    from pvec.training.shift import PersonaShiftCallback
    from pvec.training.trainer import TrainOutcome

KIND = "train"
RESULT = "result.json"
ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What ``--check`` tells: what would be trained, on how much, at what cost, steered where."""

    config: Path
    folder: Path
    model: str
    device: str
    dtype: str
    rows: int
    held_out: int
    tokens: int
    learnt_tokens: int
    longest: int
    steps: int
    steps_per_epoch: int
    batch: int
    passes: int
    """Forward passes of one step on each process."""
    most_tokens: int
    """Tokens of the largest pass, padding included."""
    processes: int
    padding: float
    parameters: int
    adapter_parameters: int
    adapter_modules: int
    memory_bytes: int
    steering: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finetuning made. Losses are means per token; shifts are of the last measurement."""

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
    """Validate a configuration and everything it names, and return the plan; loads no weights."""
    processes = Processes.launched()
    loaded = load_config(path, overrides=overrides)
    for note in loaded.notes:
        notify(note)
    prepared = prepare(loaded.config, processes=processes, on_row=_rows_read(on_progress))
    folder = run_folder(loaded.config, path, out=out, runs=runs)
    return _plan(prepared, path, folder, processes)


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
    loaded = load_config(path, overrides=overrides)
    for note in loaded.notes:
        notify(note)
    prepared = prepare(loaded.config, processes=processes, on_row=_rows_read(on_progress))
    for note in prepared.notes:
        notify(note)
    folder = run_folder(loaded.config, path, out=out, runs=runs)
    with _opened(folder, prepared, processes) as store:
        finished = _finished(folder)
        if finished is not None:
            notify(f"this training is done already: {folder}")
            return finished
        return _train(prepared, folder, store, processes, notify=notify, on_progress=on_progress)


def run_folder(
    config: TrainConfig, path: Path, *, out: Path | None = None, runs: Path = Path("runs")
) -> Path:
    """Return the run folder: ``out``, the configuration's, or ``runs/train-NAME``."""
    return out or config.output.folder or runs / f"train-{path.stem}"


def _train(
    prepared: Prepared,
    folder: Path,
    store: Run | None,
    processes: Processes,
    *,
    notify: Notify,
    on_progress: Callable[[Progress], None],
) -> TrainResult:
    from pvec.training.checkpoints import latest_checkpoint
    from pvec.training.loading import load_for_training
    from pvec.training.trainer import TrainJob, train

    resume = latest_checkpoint(folder)
    if resume is not None:
        notify(f"going on from {resume.name}")
    config = prepared.config
    notify(f"loading {prepared.metadata.id} on {prepared.device}")
    model = load_for_training(
        config,
        prepared.metadata.files.folder,
        dtype=prepared.dtype,
        device=prepared.device,
        notify=notify,
    )
    shift = _callback(prepared, notify)
    with ExitStack() as stack:
        log = stack.enter_context(JsonlLog(folder / LOG)) if processes.main else None
        outcome = train(
            TrainJob(
                config=config,
                model=model,
                tokenizer=prepared.metadata.tokenizer,
                data=prepared.data,
                batches=prepared.batches,
                folder=folder,
                scheduled=prepared.scheduled,
                shift=shift,
                resume=resume,
                on_proof=lambda proofs: _say_proof(proofs, notify),
                on_log=log.append if log else ignore,
                on_step=_steps_done(on_progress),
            )
        )
    result = _result(prepared, folder, outcome, shift)
    if store is not None:
        with atomic_write(folder / RESULT, mode="w") as stream:
            stream.write(json.dumps(_jsonable(result), indent=2) + "\n")
        store.end_session(timings={"train": round(outcome.seconds, 3)})
    return result


def _callback(prepared: Prepared, notify: Notify) -> PersonaShiftCallback | None:
    part = prepared.config.monitor
    if part is None:
        return None
    from pvec.training.shift import Alarm, PersonaShiftCallback

    return PersonaShiftCallback(
        prepared.probes,
        tokenizer=prepared.metadata.tokenizer,
        prompts=prepared.prompts,
        every=part.every,
        generate=part.generate,
        alarm=Alarm(shift=part.alarm.shift, action=part.alarm.action) if part.alarm else None,
        on_alarm=lambda text: notify(f"ALARM, {text}"),
    )


@contextmanager
def _opened(folder: Path, prepared: Prepared, processes: Processes) -> Iterator[Run | None]:
    """Open the run folder on the main process; the others only read it."""
    if not processes.main:
        yield None
        return
    metadata, config = prepared.metadata, prepared.config
    identity: dict[str, Any] = {
        "trait": " and ".join(dict.fromkeys(one.instruction.name for one in prepared.scheduled))
        or "finetuning",
        "model": metadata.id,
        "fingerprint": metadata.fingerprint,
        "chat": metadata.chat_hash,
        "config": config.identity(),
        "data": stable_hash([list(row.labels) for row in prepared.data.train.rows]),
        "vectors": [one.instruction.fingerprint for one in prepared.scheduled],
    }
    with Run.open_or_create(folder, kind=KIND, identity=identity) as store:
        store.begin_session(command=sys.argv)
        store.update_manifest(
            settings=config.model_dump(mode="json"),
            steering=list(prepared.steered),
            steps=prepared.steps,
        )
        yield store


def _finished(folder: Path) -> TrainResult | None:
    """Return the result of a training that is done, or None."""
    path = folder / RESULT
    if not path.is_file() or not (folder / ADAPTER / "adapter_config.json").is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    for name in ("run", "adapter", "merged"):
        saved[name] = Path(saved[name]) if saved[name] else None
    for name in ("steering", "touched", "next"):
        saved[name] = tuple(saved[name])
    return TrainResult(**saved)


def _result(
    prepared: Prepared, folder: Path, outcome: TrainOutcome, shift: PersonaShiftCallback | None
) -> TrainResult:
    log = read_log(folder)
    losses = [line["loss"] for line in log if "loss" in line]
    tail = losses[-max(1, len(losses) // 10) :]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    last = shift.history[-1] if shift and shift.history else {}
    tokens = prepared.data.train.tokens / prepared.batches.steps_per_epoch * outcome.steps_now
    merged = folder / "merged" if prepared.config.output.merge else None
    model = prepared.metadata.id
    option = "" if prepared.metadata.bundled else f" --model {model}"
    return TrainResult(
        run=folder,
        adapter=folder / ADAPTER,
        merged=merged,
        steps=outcome.steps,
        first_loss=losses[0] if losses else float("nan"),
        last_loss=sum(tail) / len(tail) if tail else float("nan"),
        held_out_loss=held_out[-1] if held_out else None,
        steering=prepared.steered,
        touched=outcome.touched,
        shifts={k.partition("/")[2]: v for k, v in last.items() if _is_shift(k)},
        hooks_on=int(last["persona/hooks_on"]) if last else None,
        stopped_early=outcome.stopped_early,
        tokens_per_second=tokens / outcome.seconds,
        seconds=outcome.seconds,
        monitor_seconds=outcome.monitor_seconds,
        next=(
            f"pvec report {folder}",
            f"pvec chat{option} --adapter {folder / ADAPTER}",
        ),
    )


def _is_shift(key: str) -> bool:
    return key.startswith("persona/") and key != "persona/hooks_on"


def _plan(prepared: Prepared, path: Path, folder: Path, processes: Processes) -> TrainPlan:
    data, batches = prepared.data, prepared.batches
    return TrainPlan(
        config=path,
        folder=folder,
        model=prepared.metadata.id,
        device=prepared.device,
        dtype=str(prepared.dtype).removeprefix("torch."),
        rows=len(data.train.rows),
        held_out=len(data.held_out.rows),
        tokens=data.train.tokens,
        learnt_tokens=data.train.learnt,
        longest=max(data.train.lengths),
        steps=prepared.steps,
        steps_per_epoch=batches.steps_per_epoch,
        batch=batches.size,
        most_tokens=batches.most_tokens,
        passes=batches.passes,
        processes=processes.size,
        padding=batches.padding,
        parameters=prepared.sizes.model,
        adapter_parameters=prepared.sizes.adapter,
        adapter_modules=prepared.sizes.modules,
        memory_bytes=prepared.sizes.bytes,
        steering=prepared.steered,
        notes=prepared.notes,
    )


def _say_proof(proofs: Sequence[LayerProof], notify: Notify) -> None:
    for proof in proofs:
        notify(
            f"steering proved at layer {proof.layer}: {proof.positions} probe tokens changed by "
            f"{proof.seen:.4g} on average where {proof.expected:.4g} is due"
        )


def _rows_read(on_progress: Callable[[Progress], None]) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(
        Progress(stage="read", done=done, total=total, unit="rows")
    )


def _steps_done(on_progress: Callable[[Progress], None]) -> Callable[[int, int, str], None]:
    return lambda step, steps, detail: on_progress(
        Progress(stage="train", done=step, total=steps, unit="steps", detail=detail)
    )


def _jsonable(result: TrainResult) -> dict[str, Any]:
    plain = asdict(result)
    return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}

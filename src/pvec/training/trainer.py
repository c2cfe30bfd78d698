"""One finetuning on TRL's ``SFTTrainer``: the only module that knows TRL's objects.

TRL and peft do the training. Ours are the order of the rows, the steering with its proof and its
counts, and the watching; each in its own module.
"""

# ruff: noqa: ARG002 - the Trainer decides what its callbacks are given
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from pvec.steering.proof import LayerProof, prove_steering
from pvec.training.batches import BatchPlan, StepOrder
from pvec.training.checkpoints import steps_of
from pvec.training.config import TrainConfig
from pvec.training.dataset import Rows, TrainingData, nobody
from pvec.training.isolation import prove_isolation
from pvec.training.lora import check_targets, lora_config
from pvec.training.scoring import learnt_tokens_only
from pvec.training.shift import PersonaShiftCallback
from pvec.training.steering import Scheduled, TrainingSteering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

PROBE_ROWS = 4
"""Rows of the batch on which steering proves itself."""

_TOUCHED = "touched.json"
"""What a checkpoint keeps of the counts: one per instruction."""

_OPTIMISERS = {"adamw": "adamw_torch"}

Logs = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainJob:
    """Everything one training needs. ``model`` is loaded and frozen; ``resume`` is a checkpoint."""

    config: TrainConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    batches: BatchPlan
    folder: Path
    scheduled: Sequence[Scheduled] = ()
    shift: PersonaShiftCallback | None = None
    resume: Path | None = None
    on_proof: Callable[[Sequence[LayerProof]], None] = nobody
    on_log: Callable[[Logs], None] = nobody
    """Gets every line of the log, on the main process."""
    on_step: Callable[[int, int, str], None] = nobody


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a training did. ``touched`` sums over steps and processes, one per instruction."""

    steps: int
    steps_now: int
    """Those that this process took; a resumed training has taken others before."""
    stopped_early: bool
    touched: tuple[int, ...]
    proofs: tuple[LayerProof, ...]
    seconds: float
    monitor_seconds: float


def train(job: TrainJob) -> TrainOutcome:
    """Finetune, write checkpoints and the adapter into ``job.folder``, and say what happened.

    Raises ``SteeringError`` before step 1 when steering does not prove itself, and in any step in
    which it touched other positions than it should; ``InputError`` when rows were to be packed and
    attention does not keep them apart.
    """
    check_targets(job.config.lora, job.model)
    trainer = trainer_of(job)
    started = time.perf_counter()
    if job.config.batch.layout == "packed":
        rows = [trainer.train_dataset[i] for i in range(min(2, len(trainer.train_dataset)))]
        prove_isolation(
            trainer.model, rows, collate=trainer.data_collator, device=trainer.args.device
        )
    proofs: Sequence[LayerProof] = ()
    if trainer.steering is not None:
        instructions = trainer.steering.instructions
        proofs = prove_steering(trainer.model, instructions, _probe_batch(trainer))
        job.on_proof(proofs)
    if job.resume is not None:
        trainer.resume_counts(job.resume)
    with trainer.steering or nullcontext(), learnt_tokens_only(trainer.args.device.type):
        trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    trainer.save_model(str(job.folder / "adapter"))
    if trainer.is_world_process_zero():
        _name_base(job.folder / "adapter", job.config.model.id)
    if job.config.output.merge and trainer.is_world_process_zero():
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(job.folder / "merged")
        job.tokenizer.save_pretrained(job.folder / "merged")
    trainer.accelerator.wait_for_everyone()
    return TrainOutcome(
        steps=trainer.state.global_step,
        steps_now=trainer.state.global_step - steps_of(job.resume),
        stopped_early=trainer.state.global_step < trainer.state.max_steps,
        touched=trainer.touched_by_all(),
        proofs=tuple(proofs),
        seconds=time.perf_counter() - started,
        monitor_seconds=job.shift.seconds if job.shift else 0.0,
    )


def _name_base(adapter: Path, model: str) -> None:
    """Let the adapter name its base as the user did, not as the folder it was loaded from.

    Only now: peft would look for a base of that name on the hub while it saves.
    """
    path = adapter / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = model
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Trainer(SFTTrainer):
    """TRL's trainer with our order of rows and our numbers in the log."""

    model: Any
    train_dataset: Any

    def __init__(self, *args: Any, order: StepOrder, folder: Path, **kwargs: Any) -> None:
        self.order = order
        self.folder = folder
        self.steering: TrainingSteering | None = None
        self.coefs: tuple[float, ...] = ()
        self.touched: list[int] = []
        self._touched_before: tuple[int, ...] = ()
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the loader of the passes that were planned; accelerate deals them out."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _send_telemetry(self) -> None:
        """Send nothing anywhere."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder says what was done."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the counts with it, before the file whose presence makes a checkpoint whole."""
        touched = self.touched_by_all()
        if touched and self.is_world_process_zero():
            folder = self.folder / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _TOUCHED).write_text(json.dumps(touched), encoding="utf-8")
        super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]

    def resume_counts(self, checkpoint: Path) -> None:
        """Go on counting from what a checkpoint had counted, over all processes."""
        if self.steering is not None:
            self._touched_before = tuple(json.loads((checkpoint / _TOUCHED).read_text("utf-8")))
            if self.is_world_process_zero():
                self.touched = list(self._touched_before)

    def touched_by_all(self) -> tuple[int, ...]:
        """Return the positions touched so far by every instruction, over all processes."""
        if not self.touched:
            return ()
        mine = torch.tensor(self.touched, device=self.accelerator.device)
        return tuple(int(n) for n in self.accelerator.reduce(mine, reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.steering is not None:
            total = self.touched_by_all()
            before = self._touched_before or (0,) * len(total)
            for number, (now, then) in enumerate(zip(total, before, strict=True)):
                logs[f"steering/touched_{number}"] = float(now - then)
            for number, coef in enumerate(self.coefs):
                logs[f"steering/coef_{number}"] = coef
            self._touched_before = total
        super().log(logs, start_time)


class _Conductor(TrainerCallback):
    """Tells order and steering where the training stands, and the caller what is logged."""

    def __init__(self, job: TrainJob, trainer: _Trainer) -> None:
        self._job = job
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on what was measured before the first step."""
        if state.global_step == 0 and state.is_world_process_zero:
            for line in state.log_history:
                self._job.on_log(line)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.order.start_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.steering is not None:
            self._trainer.coefs = self._trainer.steering.at_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.steering is not None:
            touched = self._trainer.steering.finish_step()
            self._trainer.touched = [
                sum(pair) for pair in zip(self._trainer.touched, touched, strict=True)
            ]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        self._job.on_log({"step": state.global_step, **logs})
        if "loss" in logs:
            self._job.on_step(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")


def trainer_of(job: TrainJob) -> _Trainer:
    """Return the trainer of a job: callbacks in place, steering not yet attached."""
    config = job.config
    trainer = _Trainer(
        order=job.batches.order,
        folder=job.folder,
        model=job.model,
        args=training_arguments(job),
        train_dataset=_table(job.data.train),
        eval_dataset=_table(job.data.held_out) if job.data.held_out.rows else None,
        processing_class=job.tokenizer,
        peft_config=lora_config(config.lora),
    )
    trainer.remove_callback(PrinterCallback)
    if job.scheduled:
        trainer.steering = TrainingSteering(trainer.model, job.scheduled)
        trainer.touched = [0] * len(job.scheduled)
    if job.shift is not None:
        job.shift.add_to(trainer)
    trainer.add_callback(_Conductor(job, trainer))
    return trainer


def training_arguments(job: TrainJob) -> SFTConfig:
    """Return the configuration in TRL's words."""
    config, batches = job.config, job.batches
    weights = next(job.model.parameters())
    on_gpu = weights.device.type == "cuda"
    held_out = bool(job.data.held_out.rows)
    steps = config.data.eval_every
    return SFTConfig(
        output_dir=str(job.folder),
        per_device_train_batch_size=math.ceil(batches.size / batches.processes / batches.passes),
        per_device_eval_batch_size=_held_out_rows(job),
        gradient_accumulation_steps=batches.passes,
        num_train_epochs=config.optim.epochs,
        max_steps=config.optim.max_steps or -1,
        learning_rate=config.optim.lr,
        lr_scheduler_type=config.optim.schedule,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
        optim=_OPTIMISERS.get(config.optim.name, config.optim.name),
        seed=config.seed,
        bf16=on_gpu and weights.dtype == torch.bfloat16,
        fp16=on_gpu and weights.dtype == torch.float16,
        gradient_checkpointing=config.memory.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=config.memory.liger,
        logging_steps=config.output.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.output.save_every else "epoch",
        save_steps=config.output.save_every or 500,
        save_total_limit=config.output.keep,
        eval_strategy=("steps" if steps else "epoch") if held_out else "no",
        eval_steps=steps if held_out else None,
        prediction_loss_only=True,
        report_to=list(config.output.report_to) or "none",
        disable_tqdm=True,
        use_cpu=weights.device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        max_length=None,
        padding_free=config.batch.layout == "packed",
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _held_out_rows(job: TrainJob) -> int:
    """Return how many held-out rows fit one pass."""
    longest = max(job.data.held_out.lengths, default=1)
    return min(job.config.batch.size, max(1, job.config.batch.tokens // longest))


def _table(rows: Rows) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [list(row.token_ids) for row in rows.rows],
            "labels": [list(row.labels) for row in rows.rows],
        }
    )


def _probe_batch(trainer: _Trainer) -> dict[str, torch.Tensor]:
    """Return a few rows as the Trainer will batch them."""
    table = trainer.train_dataset
    batch = trainer.data_collator([table[i] for i in range(min(PROBE_ROWS, len(table)))])
    return {
        name: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }

"""One finetuning on TRL's ``SFTTrainer``: the only module that knows TRL's objects.

TRL and peft do the training. Ours are the order of the rows, the steering with its proof and its
counts, and the monitoring; each in its own module.
"""

# ruff: noqa: ARG002 - the Trainer decides what its callbacks are given
from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from pvec.backends.session import Notify, ignore
from pvec.documents import read_json
from pvec.steering.proof import prove_steering
from pvec.training.checkpoints import Checkpoint
from pvec.training.forward import prove_isolation, score_loss_tokens_only
from pvec.training.masks import TokenizedRow
from pvec.training.plan import TrainPlan
from pvec.training.steering import TrainingSteering

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

PROBE_ROWS = 4
"""Rows of the batch on which steering proves itself."""

TOUCHED = "steering/touched_"
"""Log keys of the positions that each instruction touched since the last line."""

_OPTIMISERS = {"adamw": "adamw_torch"}

OnLog = Callable[[Mapping[str, float]], None]
OnStep = Callable[[int, int, str], None]
"""Told the step, of how many, and the loss."""


class PlannedTrainer(SFTTrainer):
    """TRL's trainer of a plan: our order of rows, our steering and our numbers in the log."""

    model: Any
    train_dataset: Any

    def __init__(
        self,
        plan: TrainPlan,
        model: PreTrainedModel,
        *,
        on_log: OnLog = ignore,
        on_step: OnStep | None = None,
    ) -> None:
        self.plan = plan
        held_out = plan.data.held_out.rows
        with warnings.catch_warnings():
            # peft follows the rank patterns that it makes for fused experts, and warns of them
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            super().__init__(
                model=model,
                args=training_arguments(plan, model),
                train_dataset=_table(plan.data.train.rows),
                eval_dataset=_table(held_out) if held_out else None,
                processing_class=plan.metadata.tokenizer,
                peft_config=copy.deepcopy(plan.adapter.config),
            )
        if plan.config.memory.shard:
            self._average_adapter_only()
        self.steering = TrainingSteering(self.model, plan.steering) if plan.steering else None
        self.coefs: tuple[float, ...] = ()
        self.touched = [0] * len(plan.steering)
        """Positions touched by each instruction, by this process and since the last log line."""
        self.remove_callback(PrinterCallback)
        if plan.shift is not None:
            plan.shift.add_to(self)
        self.add_callback(_StepCallback(self, on_log, on_step))

    def _average_adapter_only(self) -> None:
        """Train a model whose frozen weights are sharded like one that is whole.

        Only the adapter has gradients and an optimiser, and it is whole on every process: what the
        Trainer does and refuses for sharded models does not concern it.
        """
        self.is_distributed_loading_by_transformers = False
        self.args.save_only_model = False
        frozen = [
            name for name, weight in self.model.named_parameters() if not weight.requires_grad
        ]
        frozen += [name for name, _ in self.model.named_buffers()]
        ignore_in: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # noqa: SLF001
        ignore_in(self.model, frozen)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter from its own weights: reading a sharded model takes all processes."""
        adapter = {name: w for name, w in self.model.named_parameters() if w.requires_grad}
        super()._save(
            output_dir, state_dict=adapter if self.plan.config.memory.shard else state_dict
        )

    def get_train_dataloader(self) -> Any:
        """Return the loader of the passes that were planned; accelerate deals them out."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.plan.batches.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def prove(self, notify: Notify = ignore) -> None:
        """Check, before step 1, that the model does what the plan says.

        Raises ``SteeringError`` when steering does not prove itself, and ``InputError`` when rows
        are to be packed and attention does not keep them apart.
        """
        table = self.train_dataset
        probe = [table[i] for i in range(min(PROBE_ROWS, len(table)))]
        if self.plan.config.batch.layout == "packed":
            prove_isolation(self.model, probe[:2], collate=self._batch)
        if self.steering is None:
            return
        for proof in prove_steering(self.model, self.steering.instructions, self._batch(probe)):
            notify(
                f"steering proved at layer {proof.layer}: {proof.positions} probe tokens changed "
                f"by {proof.change_norm:.4g} on average where {proof.expected:.4g} is due"
            )

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._prepare_inputs(self.data_collator(rows))
        return batch

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what a checkpoint of a finished training was, without another step."""
        self._load_from_checkpoint(str(checkpoint.path))
        self.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))

    def total_touched(self) -> tuple[int, ...]:
        """Return the positions that each instruction touched, over all steps and processes."""
        return tuple(
            round(sum(line.get(f"{TOUCHED}{number}", 0.0) for line in self.state.log_history))
            for number in range(len(self.plan.steering))
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a line with the loss what steering touched since the last one."""
        if "loss" in logs and self.steering is not None:
            touched = torch.tensor(self.touched, device=self.accelerator.device)
            for number, count in enumerate(self.accelerator.reduce(touched, reduction="sum")):
                logs[f"{TOUCHED}{number}"] = float(count)
            for number, coef in enumerate(self.coefs):
                logs[f"steering/coef_{number}"] = coef
            self.touched = [0] * len(self.touched)
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """Send nothing anywhere."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run folder says what was done."""


class _StepCallback(TrainerCallback):
    """Tells order and steering where the training stands, and the caller what is logged."""

    def __init__(self, trainer: PlannedTrainer, on_log: OnLog, on_step: OnStep | None) -> None:
        self._trainer = trainer
        self._on_log = on_log
        self._on_step = on_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on what was measured before the first step; go on counting tokens."""
        if state.global_step == 0 and state.is_world_process_zero:
            for line in state.log_history:
                self._on_log(line)
        counted = [line["num_tokens"] for line in state.log_history if "num_tokens" in line]
        self._trainer._total_train_tokens = int(counted[-1]) if counted else 0  # noqa: SLF001

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.plan.batches.order.start_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.steering is not None:
            self._trainer.coefs = self._trainer.steering.at_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count. A training that an alarm stops is evaluated and saved like one that ends.

        A line is logged before every checkpoint, so that a resumed log has the same lines.
        """
        trainer = self._trainer
        if trainer.steering is not None:
            touched = trainer.steering.finish_step()
            trainer.touched = [sum(pair) for pair in zip(trainer.touched, touched, strict=True)]
        if control.should_training_stop:
            control.should_save = True
            control.should_evaluate = trainer.eval_dataset is not None
        control.should_log = control.should_log or control.should_save

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
        self._on_log({"step": state.global_step, **logs})
        if "loss" in logs and self._on_step is not None:
            self._on_step(state.global_step, state.max_steps, f"loss {logs['loss']:.3f}")


def train(
    plan: TrainPlan,
    model: PreTrainedModel,
    *,
    resume: Checkpoint | None = None,
    notify: Notify = ignore,
    on_log: OnLog = ignore,
    on_step: OnStep | None = None,
) -> PlannedTrainer:
    """Finetune ``model`` (loaded, frozen); write checkpoints and the adapter into ``plan.folder``.

    ``on_log`` gets every line of the log, on the main process. Raises ``SteeringError`` before step
    1 when steering does not prove itself, and in any step in which it touched other positions than
    it should; ``InputError`` when rows were to be packed and attention does not keep them apart.
    """
    trainer = PlannedTrainer(plan, model, on_log=on_log, on_step=on_step)
    trainer.prove(notify)
    if resume is not None and resume.finished:
        trainer.restore(resume)
    else:
        with trainer.steering or nullcontext(), score_loss_tokens_only(trainer.args.device.type):
            trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
    _save(trainer, plan)
    return trainer


def _save(trainer: PlannedTrainer, plan: TrainPlan) -> None:
    """Write the adapter, and the merged model where the plan says so."""
    adapter = plan.folder / "adapter"
    trainer.save_model(str(adapter))
    if trainer.is_world_process_zero():
        _name_base(adapter, plan.config.model.id)
        if plan.config.output.merge:
            trainer.model.merge_and_unload().save_pretrained(plan.folder / "merged")
            plan.metadata.tokenizer.save_pretrained(plan.folder / "merged")
    trainer.accelerator.wait_for_everyone()


def _name_base(adapter: Path, model: str) -> None:
    """Let the adapter name its base as the user did, not as the folder it was loaded from.

    Only now: peft would look for a base of that name on the hub while it saves.
    """
    path = adapter / "adapter_config.json"
    written = read_json(path)
    written["base_model_name_or_path"] = model
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def training_arguments(plan: TrainPlan, model: PreTrainedModel) -> SFTConfig:
    """Return the configuration in TRL's words."""
    config, batches = plan.config, plan.batches
    weights = next(model.parameters())
    on_gpu = weights.device.type == "cuda"
    tokenizer = plan.metadata.tokenizer
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
    experts = getattr(model.config.get_text_config(decoder=True), "num_experts", None)
    return SFTConfig(
        output_dir=str(plan.folder),
        pad_token=tokenizer.eos_token if pad is not None and pad >= rows else None,
        per_device_train_batch_size=math.ceil(batches.size / batches.processes / batches.passes),
        per_device_eval_batch_size=_held_out_rows(plan),
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
        # A step reaches every part of the adapter but that of experts no token was sent to.
        ddp_find_unused_parameters=None if experts else False,
        use_liger_kernel=config.memory.liger,
        logging_steps=config.output.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # By steps, also at the end of an epoch: what is due there is done before the checkpoint, so
        # that a run that is killed in between does not miss it.
        save_strategy="steps",
        save_steps=config.output.save_every or batches.steps_per_epoch,
        save_total_limit=config.output.keep,
        eval_strategy="steps" if plan.data.held_out.rows else "no",
        eval_steps=config.data.eval_every or batches.steps_per_epoch,
        prediction_loss_only=True,
        report_to=list(config.output.report_to) or "none",
        disable_tqdm=True,
        use_cpu=weights.device.type == "cpu",
        dataloader_pin_memory=on_gpu,
        max_length=None,
        padding_free=config.batch.layout == "packed",
        dataset_kwargs={"skip_prepare_dataset": True},
        save_only_model=config.memory.shard,  # until the Trainer is made: see there
    )


def _held_out_rows(plan: TrainPlan) -> int:
    """Return how many held-out rows fit one pass."""
    longest = max(plan.data.held_out.lengths, default=1)
    return min(plan.config.batch.size, max(1, plan.config.batch.tokens // longest))


def _table(rows: Sequence[TokenizedRow]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [list(row.token_ids) for row in rows],
            "labels": [list(row.labels) for row in rows],
        }
    )

"""Everything about a finetuning that is known before its weights are loaded.

Bad input ends here: vectors of another model, layers out of range, modules that do not exist, rows
that are wrong, what is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from pvec.backends.processes import Processes
from pvec.documents import read_text
from pvec.errors import InputError, ModelError, PvecError
from pvec.models.files import ModelSpec, read_config
from pvec.models.load import ModelMetadata, choose_device, inspect_model
from pvec.models.precision import choose_dtype
from pvec.models.weights import check_quantisation
from pvec.runs.responses import stable_hash
from pvec.training.adapter import AdapterPlan, plan_adapter
from pvec.training.batches import CPU_PASS_COST, PASS_COST, BatchPlan, Layout, plan_batches
from pvec.training.config import MonitorPart, TrainConfig
from pvec.training.data import OnRow, Rows, TrainingData, prepare_data, read_chats
from pvec.training.launch import check_sharding
from pvec.training.model import check_installed, check_train_packages
from pvec.training.shift import Alarm, PersonaShiftCallback, Probe
from pvec.training.steering import (
    ScheduledInstruction,
    choose_layers,
    schedule_steering,
    single_layer,
)
from pvec.traits.trait import load_trait
from pvec.vectors.files import load_vectors
from pvec.vectors.vector import PersonaVector

Checked = TypeVar("Checked")


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainPlan:
    """A finetuning, checked and planned, ready but for its weights."""

    path: Path
    """The configuration file."""
    config: TrainConfig
    folder: Path
    processes: Processes
    metadata: ModelMetadata
    device: str
    dtype: torch.dtype
    data: TrainingData
    batches: BatchPlan
    steps: int
    adapter: AdapterPlan
    steering: tuple[ScheduledInstruction, ...] = ()
    shift: PersonaShiftCallback | None = None
    """What measures the persona meanwhile."""
    notes: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        """The number format in words: ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def identity(self) -> dict[str, Any]:
        """Return what tells this training from others in a run's manifest."""
        metadata = self.metadata
        instructions = [scheduled.instruction for scheduled in self.steering]
        return {
            "trait": " and ".join(dict.fromkeys(i.name for i in instructions)) or "finetuning",
            "model": metadata.id,
            "fingerprint": metadata.fingerprint,
            "chat": metadata.chat_hash,
            "config": self.config.identity(),
            "data": stable_hash([list(row.labels) for row in self.data.train.rows]),
            "vectors": [instruction.fingerprint for instruction in instructions],
        }

    def summary(self) -> dict[str, Any]:
        """Return the plan in numbers and words, as ``--check --json`` prints it."""
        train, batches, adapter = self.data.train, self.batches, self.adapter
        return {
            "config": self.path,
            "folder": self.folder,
            "model": self.metadata.id,
            "device": self.device,
            "dtype": self.dtype_name,
            "rows": len(train.rows),
            "held_out": len(self.data.held_out.rows),
            "tokens": train.tokens,
            "learnt_tokens": train.loss_tokens,
            "longest": max(train.lengths),
            "steps": self.steps,
            "steps_per_epoch": batches.steps_per_epoch,
            "batch": batches.size,
            "passes": batches.passes,
            "most_tokens": batches.most_tokens,
            "processes": self.processes.size,
            "padding": batches.padding,
            "parameters": adapter.model_parameters,
            "adapter_parameters": adapter.parameters,
            "adapter_modules": sum(adapter.adapted.values()),
            "adapted": adapter.adapted,
            "frozen": adapter.frozen,
            "memory_bytes": adapter.memory_bytes,
            "steering": [steering.description for steering in self.steering],
            "notes": self.notes,
        }


def make_plan(
    config: TrainConfig,
    *,
    path: Path,
    folder: Path,
    processes: Processes,
    on_row: OnRow,
) -> TrainPlan:
    """Check everything and plan the training; no weights are loaded.

    ``on_row`` is told how many rows are tokenised, of how many. Raises ``InputError`` or
    ``ModelError`` for bad input: one for each thing that is wrong, or an ``InputError`` that names
    them all.
    """
    check_train_packages()
    device, _ = choose_device(_device(config, processes))
    dtype, dtype_note = choose_dtype(config.model.dtype, device)
    problems = Problems()
    problems.attempt(lambda: check_installed(config, device=device))
    problems.attempt(lambda: check_sharding(config, processes))
    metadata = problems.attempt(lambda: _inspect_base(config, device))
    vectors: dict[str, PersonaVector] = {}
    vector_notes: list[str] = []
    for name in config.vectors:
        load = partial(load_vectors, [name], model=metadata, layer=single_layer(config, name))
        if loaded := problems.attempt(partial(load, notify=vector_notes.append)):
            (vectors[name],) = loaded.values()
    data = problems.attempt(lambda: _data(config, metadata, on_row))
    problems.raise_if_any()
    assert metadata is not None
    assert data is not None
    batches = problems.attempt(lambda: _batches(config, data, processes, device=device))
    problems.raise_if_any()
    assert batches is not None
    steps = config.optim.max_steps or math.ceil(batches.steps_per_epoch * config.optim.epochs)
    adapter = problems.attempt(
        lambda: plan_adapter(config, metadata, dtype=dtype, tokens=batches.most_tokens)
    )
    steering: list[ScheduledInstruction] = []
    for part in config.steering:
        schedule = partial(schedule_steering, part, vectors[part.vector], metadata, steps)
        steering += problems.attempt(schedule) or []
        if part.incremental or part.layers == "all":
            vector_notes += filter(None, [vectors[part.vector].left_out(metadata.num_layers)])
    shift = problems.attempt(lambda: _monitor_shift(config.monitor, vectors, metadata))
    problems.raise_if_any()
    assert adapter is not None
    notes = [*metadata.notes, f"{str(dtype).removeprefix('torch.')}: {dtype_note}", *data.notes]
    notes += vector_notes
    if shift is not None:
        notes.append(shift.description)
    return TrainPlan(
        path=path,
        config=config,
        folder=folder,
        processes=processes,
        metadata=metadata,
        device=device,
        dtype=dtype,
        data=data,
        batches=batches,
        steps=steps,
        adapter=adapter,
        steering=tuple(steering),
        shift=shift,
        notes=tuple(notes),
    )


class Problems:
    """What is wrong, gathered from checks that do not need one another."""

    def __init__(self) -> None:
        self._errors: list[PvecError] = []

    def attempt(self, check: Callable[[], Checked]) -> Checked | None:
        """Return what ``check`` returns, or None after keeping its ``PvecError`` for later."""
        try:
            return check()
        except PvecError as error:
            self._errors.append(error)
            return None

    def raise_if_any(self) -> None:
        """Raise the only error, or one that says them all."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise InputError(" ".join(str(error) for error in self._errors))


def _inspect_base(config: TrainConfig, device: str) -> ModelMetadata:
    spec = ModelSpec(
        model=config.model.id,
        gguf_file=config.model.gguf_file,
        dtype=config.model.dtype,
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )
    metadata = inspect_model(spec)
    if metadata.adapter is not None:
        raise ModelError(
            f"{config.model.id!r} is an adapter: finetuning starts from a whole model, so give its "
            f"base, or merge the adapter into it first."
        )
    check_quantisation(read_config(metadata.files.folder), name=config.model.id)
    if metadata.files.gguf is not None and (config.model.quantize or config.memory.unsloth):
        raise InputError(
            f"{config.model.id!r} is a GGUF file, whose weights are dequantised: set "
            f"model.quantize=null and memory.unsloth=false, or train from its safetensors."
        )
    return metadata


def _data(config: TrainConfig, metadata: ModelMetadata | None, on_row: OnRow) -> TrainingData:
    """Return the rows as tokens; without a model, whose tokenizer is needed, only check them."""
    if metadata is None:
        read_chats((*config.data.train, *config.data.eval), skip_bad=config.data.skip_bad)
        return TrainingData(train=Rows(rows=()), held_out=Rows(rows=()))
    return prepare_data(
        config.data, metadata.tokenizer, seed=config.seed, context=metadata.context, on_row=on_row
    )


def _device(config: TrainConfig, processes: Processes) -> str:
    if processes.size > 1 and config.model.device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{processes.local_rank}"
    return config.model.device


def _batches(
    config: TrainConfig, data: TrainingData, processes: Processes, *, device: str
) -> BatchPlan:
    return plan_batches(
        data.train.lengths,
        size=config.batch.size,
        layout=Layout(
            by_length=config.batch.layout != "random",
            padded=config.batch.layout != "packed",
            micro=config.batch.micro,
            most_tokens=config.batch.tokens,
        ),
        processes=processes.size,
        pass_cost=CPU_PASS_COST if device == "cpu" else PASS_COST,
        seed=config.seed,
    )


# ── what measures the persona meanwhile ─────────────────────────────────────────────────────────


def _monitor_shift(
    part: MonitorPart | None, vectors: Mapping[str, PersonaVector], metadata: ModelMetadata
) -> PersonaShiftCallback | None:
    """Return the callback that a configuration asks for, if any.

    Raises ``InputError`` for a vector that is listed twice, and without probe prompts.
    """
    if part is None:
        return None
    traits = [vectors[name].trait for name in part.vectors]
    probes = []
    for name, trait in zip(part.vectors, traits, strict=True):
        label = trait if traits.count(trait) == 1 else f"{trait}-{Path(name).stem}"
        layers = choose_layers(part.layers, vectors[name], part.kind, metadata)
        probes += [
            Probe(
                name=label if len(layers) == 1 else f"{label}_layer{layer}",
                vector=vectors[name].row(layer, kind=part.kind),
                layer=layer,
            )
            for layer in layers
        ]
    if len({probe.name for probe in probes}) < len(probes):
        raise InputError("monitor: the same vector or layer is listed twice.")
    return PersonaShiftCallback(
        probes,
        tokenizer=metadata.tokenizer,
        prompts=_prompts(part, traits),
        every=part.every,
        generate=part.generate,
        alarm=Alarm(shift=part.alarm.shift, action=part.alarm.action) if part.alarm else None,
    )


def _prompts(part: MonitorPart, traits: Sequence[str]) -> tuple[str, ...]:
    prompts: list[str] = []
    for entry in part.prompts:
        if entry.endswith(".txt"):
            path = Path(entry).expanduser()
            try:
                lines = read_text(path).splitlines()
            except FileNotFoundError:
                raise InputError(
                    f"There is no file of probe prompts {entry}: check monitor.prompts."
                ) from None
            prompts += [line.strip() for line in lines if line.strip()]
        else:
            prompts.append(entry)
    if not part.prompts:
        prompts = _trait_questions(traits)
    if not prompts:
        raise InputError("monitor.prompts holds no prompt.")
    return tuple(dict.fromkeys(prompts))[: part.limit]


def _trait_questions(traits: Sequence[str]) -> list[str]:
    """Return the evaluation questions of the traits in turns, so that a limit takes of each."""
    try:
        by_trait = [load_trait(trait).eval_questions for trait in dict.fromkeys(traits)]
    except InputError as error:
        raise InputError(
            f"monitor.prompts is needed: {error} Give a text file with one prompt per line."
        ) from None
    in_turns = zip_longest(*by_trait)
    return [question for turn in in_turns for question in turn if question is not None]

"""Everything about a finetuning that is known before its weights are loaded.

Bad input ends here: vectors of another model, layers out of range, modules that do not exist, rows
that are wrong, what is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.backends.processes import Processes
from pvec.errors import InputError, ModelError, PvecError
from pvec.models.files import ModelSpec
from pvec.models.load import ModelMetadata, choose_device, choose_dtype, inspect_model
from pvec.training.batches import CPU_PASS_COST, PASS_COST, BatchPlan, Layout, plan_batches
from pvec.training.config import TrainConfig
from pvec.training.dataset import OnRow, TrainingData, nobody, prepare_data
from pvec.training.loading import check_installed, check_train_packages
from pvec.training.lora import Sizes, measure
from pvec.training.rows import read_rows
from pvec.training.vectors import (
    described,
    monitoring,
    named_vectors,
    scheduled_for,
)
from pvec.vectors.find import load_vectors
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    import torch

    from pvec.training.shift import Probe
    from pvec.training.steering import Scheduled


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A finetuning, ready but for its weights."""

    config: TrainConfig
    metadata: ModelMetadata
    device: str
    dtype: torch.dtype
    data: TrainingData
    batches: BatchPlan
    steps: int
    sizes: Sizes
    scheduled: tuple[Scheduled, ...] = ()
    probes: tuple[Probe, ...] = ()
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steered(self) -> tuple[str, ...]:
        """What is steered where, one line per instruction."""
        return tuple(described(one) for one in self.scheduled)


def prepare(
    config: TrainConfig,
    *,
    processes: Processes,
    on_row: OnRow = nobody,
) -> Prepared:
    """Check everything and plan the training; no weights are loaded.

    Raises ``InputError`` or ``ModelError`` for bad input: one for each thing that is wrong, or an
    ``InputError`` that names them all.
    """
    check_train_packages()
    device, _ = choose_device(_device(config, processes))
    dtype, dtype_note = choose_dtype(config.model.dtype, device)
    problems = Problems()
    with problems.noted():
        check_installed(config, device=device)
    metadata: ModelMetadata | None = None
    with problems.noted():
        metadata = _whole_model(config, device)
    vectors: dict[str, PersonaVector] = {}
    for name in named_vectors(config):
        with problems.noted():
            (vectors[name],) = load_vectors([name], model=metadata).values()
    data: TrainingData | None = None
    with problems.noted():
        data = _data(config, metadata, on_row)
    problems.raise_if_any()
    assert metadata is not None
    assert data is not None
    with problems.noted():
        batches = _batches(config, data, processes, device=device)
        steps = config.optim.max_steps or math.ceil(batches.steps_per_epoch * config.optim.epochs)
        sizes = _sizes(config, metadata, dtype, batches)
    scheduled: list[Scheduled] = []
    for part in config.steering:
        with problems.noted():
            scheduled += scheduled_for(part, vectors[part.vector], metadata, steps=steps)
    with problems.noted():
        probes, prompts, monitor_notes = monitoring(config.monitor, vectors, metadata)
    problems.raise_if_any()
    return Prepared(
        config=config,
        metadata=metadata,
        device=device,
        dtype=dtype,
        data=data,
        batches=batches,
        steps=steps,
        sizes=sizes,
        scheduled=tuple(scheduled),
        probes=probes,
        prompts=prompts,
        notes=(
            *metadata.notes,
            f"{str(dtype).removeprefix('torch.')}: {dtype_note}",
            *data.notes,
            *monitor_notes,
        ),
    )


class Problems:
    """What is wrong, gathered from checks that do not need one another."""

    def __init__(self) -> None:
        self._found: list[PvecError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep a ``PvecError`` from inside for later."""
        try:
            yield
        except PvecError as error:
            self._found.append(error)

    def raise_if_any(self) -> None:
        """Raise the one that was found, or one that says them all."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise InputError(" ".join(str(error) for error in self._found))


def _whole_model(config: TrainConfig, device: str) -> ModelMetadata:
    metadata = inspect_model(_spec(config, device))
    if metadata.adapter is not None:
        raise ModelError(
            f"{config.model.id!r} is an adapter: finetuning starts from a whole model, so give its "
            f"base, or merge the adapter into it first."
        )
    return metadata


def _data(
    config: TrainConfig, metadata: ModelMetadata | None, on_row: OnRow
) -> TrainingData | None:
    """Return the rows as tokens; without a model, whose tokenizer is needed, only check them."""
    if metadata is None:
        read_rows((*config.data.train, *config.data.eval))
        return None
    return prepare_data(
        config.data, metadata.tokenizer, seed=config.seed, context=metadata.context, on_row=on_row
    )


def _device(config: TrainConfig, processes: Processes) -> str:
    if processes.size > 1 and config.model.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{processes.local_rank}"
    return config.model.device


def _spec(config: TrainConfig, device: str) -> ModelSpec:
    return ModelSpec(
        model=config.model.id,
        dtype=config.model.dtype,
        device=device,
        trust_remote_code=config.model.trust_remote_code,
    )


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


def _sizes(
    config: TrainConfig,
    metadata: ModelMetadata,
    dtype: torch.dtype,
    batches: BatchPlan,
) -> Sizes:
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(
        metadata.files.folder, trust_remote_code=config.model.trust_remote_code
    )
    name = str(dtype).removeprefix("torch.")
    return measure(config, model_config, dtype=name, tokens=batches.most_tokens)

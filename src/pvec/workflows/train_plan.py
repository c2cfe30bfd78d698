"""Everything about a finetuning that is known before its weights are loaded.

Bad input ends here: vectors of another model, layers out of range, modules that do not exist, rows
that are wrong, what is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.loading import ModelFacts, choose_device, choose_dtype, inspect_model
from pvec.backends.modelfiles import ModelSpec
from pvec.core.layers import check_layer, describe_layer
from pvec.core.parallel import Processes
from pvec.core.vectors import incremental
from pvec.errors import InputError, ModelError
from pvec.io.traits import load_trait
from pvec.io.vectorfile import PersonaVector, check_fits, load_vector
from pvec.training.batches import BatchPlan, plan_batches
from pvec.training.config import MonitorPart, SteeringPart, TrainConfig
from pvec.training.dataset import OnRow, TrainingData, nobody, prepare_data
from pvec.training.loading import check_installed, check_train_packages
from pvec.training.lora import Sizes, measure
from pvec.types import Instruction, VectorKind
from pvec.workflows.vector_files import find_vector
from pvec.workflows.vector_show import middle_layer
from pvec.workflows.vectors import summarize

if TYPE_CHECKING:
    import torch

    from pvec.training.shift import Probe
    from pvec.training.steering import Scheduled

RAMP_SHARE = 0.1
"""Share of the training over which a coefficient rises unless ramp_steps says otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A finetuning, ready but for its weights."""

    config: TrainConfig
    facts: ModelFacts
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
        return tuple(_described(one) for one in self.scheduled)


def prepare(
    config: TrainConfig,
    *,
    processes: Processes,
    on_row: OnRow = nobody,
) -> Prepared:
    """Check everything and plan the training; no weights are loaded.

    Raises ``InputError`` or ``ModelError`` for bad input.
    """
    check_train_packages()
    device, _ = choose_device(_device(config, processes))
    check_installed(config, device=device)
    dtype, dtype_note = choose_dtype(config.model.dtype, device)
    facts = inspect_model(_spec(config, device))
    if facts.adapter is not None:
        raise ModelError(
            f"{config.model.id!r} is an adapter: finetuning starts from a whole model, so give its "
            f"base, or merge the adapter into it first."
        )
    vectors = _load_vectors(config, facts)
    data = prepare_data(
        config.data, facts.tokenizer, seed=config.seed, context=facts.context, on_row=on_row
    )
    batches = _batches(config, data, processes)
    steps = config.optim.max_steps or math.ceil(batches.steps_per_epoch * config.optim.epochs)
    probes, prompts, monitor_notes = _monitoring(config.monitor, vectors, facts)
    return Prepared(
        config=config,
        facts=facts,
        device=device,
        dtype=dtype,
        data=data,
        batches=batches,
        steps=steps,
        sizes=_sizes(config, facts, dtype, batches, data),
        scheduled=tuple(
            one
            for part in config.steering
            for one in _scheduled(part, vectors[part.vector], facts, steps=steps)
        ),
        probes=probes,
        prompts=prompts,
        notes=(
            *facts.notes,
            f"{str(dtype).removeprefix('torch.')}: {dtype_note}",
            *data.notes,
            *monitor_notes,
        ),
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


def _batches(config: TrainConfig, data: TrainingData, processes: Processes) -> BatchPlan:
    return plan_batches(
        data.train.lengths,
        size=config.batch.size,
        micro=config.batch.micro,
        most_tokens=config.batch.tokens,
        processes=processes.size,
        by_length=config.batch.layout == "sorted",
        padded=config.batch.layout != "packed",
        seed=config.seed,
    )


def _sizes(
    config: TrainConfig,
    facts: ModelFacts,
    dtype: torch.dtype,
    batches: BatchPlan,
    data: TrainingData,
) -> Sizes:
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(
        facts.files.folder, trust_remote_code=config.model.trust_remote_code
    )
    tokens = batches.micro * max(data.train.lengths)
    name = str(dtype).removeprefix("torch.")
    return measure(config, model_config, dtype=name, tokens=tokens)


# ── vectors ─────────────────────────────────────────────────────────────────────────────────────


def _load_vectors(config: TrainConfig, facts: ModelFacts) -> dict[str, PersonaVector]:
    """Load every vector that is named, each once, and check it against the model."""
    names = [part.vector for part in config.steering]
    names += config.monitor.vectors if config.monitor else ()
    vectors = {}
    for name in dict.fromkeys(names):
        vectors[name] = load_vector(find_vector(name))
        check_fits(
            vectors[name],
            num_layers=facts.num_layers,
            hidden_size=facts.hidden_size,
            fingerprint=facts.fingerprint,
            model_id=facts.id,
        )
    return vectors


def _scheduled(
    part: SteeringPart, vector: PersonaVector, facts: ModelFacts, *, steps: int
) -> list[Scheduled]:
    """Return the instructions of one steering part, layer by layer."""
    from pvec.training.steering import Scheduled

    rows = incremental(vector.kind(part.kind)) if part.incremental else vector.kind(part.kind)
    ramp = part.ramp_steps or max(1, round(RAMP_SHARE * steps))
    made = []
    for layer in _layers(part, vector, facts):
        row = np.ascontiguousarray(rows[layer], dtype=np.float32)
        instruction = Instruction(
            vector=row,
            layer=layer,
            coef=part.coef,
            positions=part.positions,
            operator=part.operator,
            name=vector.trait,
        )
        if not row.any() or (part.operator == "add" and part.coef == 0.0):
            raise InputError(
                f"Steering with {part.vector} at {describe_layer(layer)} would do nothing (its "
                f"vector or coefficient is zero): change it, or remove that steering."
            )
        made.append(
            Scheduled(instruction=instruction, ramp_steps=ramp if part.schedule == "ramp" else 0)
        )
    return made


def _layers(part: SteeringPart, vector: PersonaVector, facts: ModelFacts) -> Sequence[int]:
    if part.incremental or part.layers == "all":
        wanted: Sequence[int] = [
            layer for layer in range(1, facts.num_layers + 1) if layer not in vector.missing_layers
        ]
    elif part.layers == "auto":
        wanted = [best_layer(vector, part.kind)]
    else:
        wanted = [layer for layer in part.layers if isinstance(layer, int)]
    for layer in wanted:
        check_layer(layer, facts.num_layers)
        vector.row(layer, kind=part.kind)
    if part.incremental and vector.missing_layers:
        raise InputError(
            f"incremental steering needs a vector at every layer, and {part.vector} has none at "
            f"{sorted(vector.missing_layers)}."
        )
    return wanted


def best_layer(vector: PersonaVector, kind: VectorKind) -> int:
    """Return the file's suggested layer, or 55 % of the depth when it has no statistics."""
    return summarize(vector, kind=kind).suggested_layer or middle_layer(vector)


def _described(one: Scheduled) -> str:
    i = one.instruction
    what = f"add {i.coef:g} x {i.name}" if i.operator == "add" else f"ablate {i.name}"
    ramp = f", rising over {one.ramp_steps} steps" if one.ramp_steps else ""
    return f"{what} at {describe_layer(i.layer)}, {i.positions} positions{ramp}"


# ── monitoring ──────────────────────────────────────────────────────────────────────────────────


def _monitoring(
    part: MonitorPart | None, vectors: dict[str, PersonaVector], facts: ModelFacts
) -> tuple[tuple[Probe, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the vectors to watch along, the probe prompts, and notes about them."""
    if part is None:
        return (), (), ()
    from pvec.training.shift import Probe

    traits = [vectors[name].trait for name in part.vectors]
    probes = []
    for name, trait in zip(part.vectors, traits, strict=True):
        vector = vectors[name]
        layer = best_layer(vector, part.kind) if part.layer == "auto" else part.layer
        check_layer(layer, facts.num_layers)
        label = trait if traits.count(trait) == 1 else f"{trait}-{Path(name).stem}"
        probes.append(Probe(name=label, vector=vector.row(layer, kind=part.kind), layer=layer))
    prompts = _prompts(part, traits)
    if len({probe.name for probe in probes}) < len(probes):
        raise InputError("monitor.vectors: the same vector is listed twice.")
    where = ", ".join(f"{probe.name} at {describe_layer(probe.layer)}" for probe in probes)
    note = f"watching {where} on {len(prompts)} prompts every {part.every} steps"
    return tuple(probes), prompts, (note,)


def _prompts(part: MonitorPart, traits: Sequence[str]) -> tuple[str, ...]:
    given: list[str] = []
    for one in part.prompts:
        path = Path(one).expanduser()
        if one.endswith(".txt"):
            if not path.is_file():
                raise InputError(f"There is no file of probe prompts {one}.")
            lines = path.read_text(encoding="utf-8").splitlines()
            given += [line.strip() for line in lines if line.strip()]
        else:
            given.append(one)
    if not part.prompts:
        given = _trait_questions(traits)
    if not given:
        raise InputError("monitor.prompts holds no prompt.")
    return tuple(dict.fromkeys(given))[: part.limit]


def _trait_questions(traits: Sequence[str]) -> list[str]:
    """Return the evaluation questions of the traits in turns, so that a limit takes of each."""
    try:
        asked = [load_trait(trait).eval_questions for trait in dict.fromkeys(traits)]
    except InputError as error:
        raise InputError(
            f"monitor.prompts is needed: {error} Give a text file with one prompt per line."
        ) from None
    longest = max(map(len, asked))
    return [one[n] for n in range(longest) for one in asked if n < len(one)]

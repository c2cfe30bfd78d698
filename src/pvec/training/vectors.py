"""What vectors do in a finetuning: which are read, where they steer, along which ones is watched.

Bad input ends here too: vectors of another model, layers out of range, nothing to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvec.errors import InputError
from pvec.models.decoder import check_layer, describe_layer
from pvec.models.load import ModelMetadata
from pvec.steering.instructions import instructions, steering_vector
from pvec.training.config import Layers, MonitorPart, SteeringPart, TrainConfig
from pvec.traits.trait import load_trait
from pvec.types import VectorKind
from pvec.vectors.quality import best_layer
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    from pvec.training.shift import Probe
    from pvec.training.steering import Scheduled

RAMP_SHARE = 0.1
"""Share of the training over which a coefficient rises unless ramp_steps says otherwise."""


def named_vectors(config: TrainConfig) -> list[str]:
    """Return every vector file that the configuration names, each once."""
    names = [part.vector for part in config.steering]
    names += config.monitor.vectors if config.monitor else ()
    return list(dict.fromkeys(names))


def scheduled_for(
    part: SteeringPart, vector: PersonaVector, metadata: ModelMetadata, *, steps: int
) -> list[Scheduled]:
    """Return the instructions of one steering part, layer by layer."""
    from pvec.training.steering import Scheduled

    direction = steering_vector(vector, kind=part.kind, increments=part.incremental)
    if part.operator == "add" and part.coef == 0.0:
        raise InputError(
            f"Steering with {part.vector} would do nothing, as its coefficient is zero: change it, "
            f"or remove that steering."
        )
    layers = _layers("all" if part.incremental else part.layers, vector, part.kind, metadata)
    ramp = part.ramp_steps or max(1, round(RAMP_SHARE * steps))
    return [
        Scheduled(instruction=instruction, ramp_steps=ramp if part.schedule == "ramp" else 0)
        for instruction in instructions(
            [direction],
            layers,
            coef=part.coef,
            positions=part.positions,
            operator=part.operator,
        )
    ]


def _layers(
    wanted: Layers, vector: PersonaVector, kind: VectorKind, metadata: ModelMetadata
) -> tuple[int, ...]:
    """Return the layers that are meant, all of which the model and the file have."""
    if wanted == "all":
        layers = tuple(
            n for n in range(1, metadata.num_layers + 1) if n not in vector.missing_layers
        )
    elif wanted == "auto":
        layers = (best_layer(vector, kind=kind),)
    else:
        layers = tuple(n for n in wanted if isinstance(n, int))
    for layer in layers:
        check_layer(layer, metadata.num_layers)
        vector.row(layer, kind=kind)
    return layers


def described(one: Scheduled) -> str:
    """Say what an instruction does, in one line."""
    i = one.instruction
    what = f"add {i.coef:g} x {i.name}" if i.operator == "add" else f"ablate {i.name}"
    ramp = f", rising over {one.ramp_steps} steps" if one.ramp_steps else ""
    return f"{what} at {describe_layer(i.layer)}, {i.positions} positions{ramp}"


# ── monitoring ──────────────────────────────────────────────────────────────────────────────────


def monitoring(
    part: MonitorPart | None, vectors: dict[str, PersonaVector], metadata: ModelMetadata
) -> tuple[tuple[Probe, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the vectors to watch along, the probe prompts, and notes about them."""
    if part is None:
        return (), (), ()
    from pvec.training.shift import Probe

    traits = [vectors[name].trait for name in part.vectors]
    probes = []
    for name, trait in zip(part.vectors, traits, strict=True):
        label = trait if traits.count(trait) == 1 else f"{trait}-{Path(name).stem}"
        layers = _layers(part.layers, vectors[name], part.kind, metadata)
        probes += [
            Probe(
                name=label if len(layers) == 1 else f"{label}_layer{layer}",
                vector=vectors[name].row(layer, kind=part.kind),
                layer=layer,
            )
            for layer in layers
        ]
    prompts = _prompts(part, traits)
    if len({probe.name for probe in probes}) < len(probes):
        raise InputError("monitor: the same vector or layer is listed twice.")
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

"""From the configuration to the callback that measures the persona during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from pvec.documents import read_text
from pvec.errors import InputError
from pvec.models.load import ModelMetadata
from pvec.training.config import MonitorPart
from pvec.training.shift import Alarm, PersonaShiftCallback, Probe
from pvec.training.steering import choose_layers
from pvec.traits.trait import load_trait
from pvec.vectors.vector import PersonaVector


def monitor_shift(
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

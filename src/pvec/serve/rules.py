"""What a request may steer with, and what steers it: entries, presets, defaults, policies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pvec.documents import read_yaml
from pvec.errors import InputError, did_you_mean
from pvec.models.decoder import check_layer
from pvec.serve.vectors import ServedVector
from pvec.settings.commands import ServeSettings, SteerSettings
from pvec.steering.instructions import CoefUnit
from pvec.types import Dose, Instruction, Operator, Percentile, Positions

ALARM_WINDOW = 16
"""Answer tokens whose mean projection sets off an alarm; the prompt's last token does it alone."""

_STEER = re.compile(r"(?P<name>[^@\s]+)(@(?P<layer>\d+))?\s+(?P<coef>\S+)")


class Strict(BaseModel):
    """What a client or a file says: no value is converted, no unknown name is passed over."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class SteerEntry(Strict):
    """One steering instruction, the vector by name; ``layer`` defaults to the vector's own."""

    vector: str
    layer: int | None = None
    coef: float | str | None = None
    positions: Positions = "response"
    operator: Operator = "add"
    unit: CoefUnit = "raw"


class PolicyEntry(Strict):
    """A ceiling of a vector's projection: always, or in answers that pass ``alarm``.

    Both are in residual norms (raw for a vector whose file has none); a ceiling may also be a
    percentile of the projections of answers (``pos50``).
    """

    vector: str
    ceiling: float | str
    alarm: float | None = None
    layer: int | None = None


class RulesFile(Strict):
    """The content of ``--rules``."""

    presets: dict[str, list[SteerEntry]] = {}
    policies: list[PolicyEntry] = []


class PvecBody(Strict):
    """The field ``pvec`` of a request."""

    steer: list[SteerEntry] | None = None
    preset: str | None = None
    report: list[str] | None = None
    tokens: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Alarm:
    """What steers an answer from the moment that its projection passes ``level``."""

    vector: str
    level: float
    cap: Instruction


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The steering of one request, and what may be added to it; ``capped`` by policies at once."""

    steering: tuple[Instruction, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    capped: tuple[str, ...] = ()


class RefusedError(InputError):
    """A request that this server does not allow, though it could do it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """The rules of a server. Raises ``InputError`` or ``ModelError`` for what cannot be used."""

    vectors: Mapping[str, ServedVector]
    num_layers: int
    limits: ServeSettings
    presets: Mapping[str, Sequence[SteerEntry]] = field(default_factory=dict)
    policies: Sequence[PolicyEntry] = ()
    defaults: tuple[Instruction, ...] = ()

    def plan(self, body: PvecBody | None) -> Plan:
        """Return what steers a request."""
        body = body or PvecBody()
        if body.steer is None and body.preset is None:
            steering = self.defaults
        elif self.limits.fixed:
            raise RefusedError("The steering of this server is fixed: leave out steer and preset.")
        else:
            preset = [] if body.preset is None else self._preset(body.preset)
            own = body.steer or []
            if len(own) > self.limits.max_steer:
                raise InputError(
                    f"The request has {len(own)} steering entries and this server takes at most "
                    f"{self.limits.max_steer}: send fewer."
                )
            chosen = [self.instruction(entry) for entry in preset]
            steering = (*chosen, *(self._limited(self.instruction(entry)) for entry in own))
        steering = tuple(i for i in steering if i.operator != "add" or i.coef != 0)
        always = [policy for policy in self.policies if policy.alarm is None]
        return Plan(
            steering=(*steering, *map(self._cap, always)),
            alarms=tuple(
                Alarm(vector=policy.vector, level=policy.alarm, cap=self._cap(policy))
                for policy in self.policies
                if policy.alarm is not None
            ),
            capped=tuple(dict.fromkeys(policy.vector for policy in always)),
        )

    def instruction(self, entry: SteerEntry) -> Instruction:
        """Return the instruction of an entry."""
        vector = self.vector(entry.vector)
        layer = vector.layer if entry.layer is None else entry.layer
        check_layer(layer, self.num_layers)
        if (entry.coef is None) != (entry.operator == "ablate"):
            word = "takes no" if entry.operator == "ablate" else "needs a"
            raise InputError(f"Steering with operator {entry.operator!r} {word} coef: correct it.")
        return vector.steering.instruction(
            layer,
            coef=1.0 if entry.coef is None else _dose(entry.coef),
            positions=entry.positions,
            operator=entry.operator,
            unit=entry.unit,
        )

    def vector(self, name: str) -> ServedVector:
        """Return a vector by its name."""
        if name not in self.vectors:
            raise InputError(
                f"There is no vector {name!r}.{did_you_mean(name, self.vectors)} "
                f"This server has: {', '.join(self.vectors) or 'none'}."
            )
        return self.vectors[name]

    def report(self, body: PvecBody | None) -> tuple[str, ...]:
        """Return the names of the vectors whose projections a request asks for."""
        if body is None or body.report is None:
            return tuple(self.vectors)
        return tuple(dict.fromkeys(self.vector(name).name for name in body.report))

    def _preset(self, name: str) -> Sequence[SteerEntry]:
        if name not in self.presets:
            raise InputError(
                f"There is no preset {name!r}.{did_you_mean(name, self.presets)} "
                f"This server has: {', '.join(self.presets) or 'none'}."
            )
        return self.presets[name]

    def _limited(self, instruction: Instruction) -> Instruction:
        most = self.limits.max_coef
        if most is not None and instruction.operator == "add" and abs(instruction.coef) > most:
            raise InputError(
                f"The coefficient {instruction.coef:g} of {instruction.name!r} is beyond this "
                f"server's limit of {most:g}: use a smaller one."
            )
        return instruction

    def _cap(self, policy: PolicyEntry) -> Instruction:
        vector = self.vector(policy.vector)
        return self.instruction(
            SteerEntry(
                vector=policy.vector,
                layer=policy.layer,
                coef=policy.ceiling,
                operator="cap",
                unit="raw" if vector.scale is None or isinstance(policy.ceiling, str) else "norm",
            )
        )


def make_rules(
    vectors: Mapping[str, ServedVector],
    *,
    num_layers: int,
    serve: ServeSettings,
    steer: SteerSettings,
) -> Rules:
    """Return the rules that settings and their file state, every entry checked.

    Raises ``InputError`` or ``ModelError`` that names what is wrong.
    """
    file = RulesFile() if serve.rules is None else _read(serve.rules)
    rules = Rules(
        vectors=vectors,
        num_layers=num_layers,
        limits=serve,
        presets=file.presets,
        policies=file.policies,
    )
    for entries in file.presets.values():
        for entry in entries:
            rules.instruction(entry)
    defaults = [instruction for text in serve.steer for instruction in _default(rules, text, steer)]
    rules = replace(rules, defaults=tuple(defaults))
    rules.plan(None)  # refuses what a policy cannot do
    return rules


def _default(rules: Rules, text: str, steer: SteerSettings) -> list[Instruction]:
    """Return what one ``--steer`` stands for."""
    if text in rules.presets:
        return [rules.instruction(entry) for entry in rules.presets[text]]
    match = _STEER.fullmatch(text.strip())
    try:
        coef = _typed_coef(match["coef"]) if match else None
    except ValueError:
        coef = None
    if match is None or coef is None:
        raise InputError(
            f"--steer {text!r} is neither 'NAME COEF', 'NAME@LAYER COEF' nor a preset: correct it."
        )
    return [
        rules.instruction(
            SteerEntry(
                vector=match["name"],
                layer=None if match["layer"] is None else int(match["layer"]),
                coef=None if steer.operator == "ablate" else coef,
                positions=steer.positions,
                operator=steer.operator,
                unit=steer.coef_unit,
            )
        )
    ]


def _typed_coef(text: str) -> float | str:
    return float(text) if Percentile.parse(text) is None else text


def _dose(coef: float | str) -> Dose:
    dose = Percentile.parse(coef) if isinstance(coef, str) else coef
    if dose is None:
        raise InputError(
            f"The coef {coef!r} is neither a number nor a percentile such as pos50: correct it."
        )
    return dose


def _read(path: Path) -> RulesFile:
    try:
        return RulesFile.model_validate(read_yaml(path) or {})
    except ValidationError as error:
        raise InputError(f"{path} is not a rules file: {sentence(error)}") from None


def sentence(error: ValidationError) -> str:
    """Return the first thing that is wrong, as one sentence."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the whole"
    if first["type"] == "extra_forbidden":
        return f"there is no option {place!r} here: leave it out."
    message: Any = first["msg"]
    return f"{place!r} is wrong ({message[0].lower()}{message[1:]}): correct it."

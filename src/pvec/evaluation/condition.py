"""A point of a steering sweep: what it is called, what steers where, and whose control it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pvec.types import Instruction, Operator, Positions

Role = Literal["baseline", "prompt_pos", "prompt_neg", "steered", "random"]
"""What a condition can be, in the order of tables."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where a condition lies in the sweep; what is measured of it is kept beside these fields.

    ``name`` is unique in a run and for people; nothing else is read out of it. ``control_of`` is
    the ``vector`` of the steered conditions whose control a random condition is. ``operator`` is
    None where nothing is steered, ``positions`` where they are the run's. Where the limits of a cap
    or floor are a percentile, ``percentile`` is its name (``pos50``) and ``coef`` its number.
    """

    name: str
    role: Role
    vector: str = ""
    layers: tuple[int, ...] = ()
    coef: float = 0.0
    operator: Operator | None = None
    control_of: str = ""
    percentile: str = ""
    positions: Positions | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The fields above by name, of a condition and of all that is measured of it."""
        return {field.name: getattr(self, field.name) for field in fields(Place)}

    @property
    def where(self) -> str:
        """The layers in words: ``layer 20``, ``layers 3+4``, ``layers 1-28``, and the positions
        where they are not the run's."""
        return layers_label(self.layers) + (f", {self.positions}" if self.positions else "")

    def controls(self, other: Place) -> bool:
        """Whether this is the random vector at the very point where ``other`` steers."""
        return (
            self.role == "random"
            and other.role == "steered"
            and (self.control_of, self.layers, self.coef, self.operator, self.positions)
            == (other.vector, other.layers, other.coef, other.operator, other.positions)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition(Place):
    """One point of the sweep, a control, or a baseline, with what steers it."""

    steering: tuple[Instruction, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return the JSON form that a response's id covers."""
        covered = ("name", "role", "vector", "layers", "coef")
        return {**{name: self.place[name] for name in covered}, "layers": list(self.layers)}

    def labels(self) -> dict[str, Any]:
        """Return what is stored beside ``identity`` and follows from it and the steering."""
        labels: dict[str, Any] = {"operator": self.operator, "control_of": self.control_of}
        own = {"percentile": self.percentile, "positions": self.positions}
        return {**labels, **{name: value for name, value in own.items() if value}}


def stored_condition(stored: Mapping[str, Any]) -> Condition:
    """Return the condition of a stored response, without its instructions.

    Runs of pvec 0.1 stored neither operator nor ``control_of``; their labels had one fixed form,
    from which both follow.
    """
    steered = stored["role"] in {"steered", "random"}
    if steered and "operator" not in stored:
        first = str(stored["name"]).rpartition(" · ")[2].partition(" ")[0]
        vectors = str(stored["vector"]).split(" + ")
        control_of = " + ".join(vector.removeprefix("random like ") for vector in vectors)
        stored = {
            **stored,
            "operator": first if first in {"cap", "ablate"} else "add",
            "control_of": control_of if stored["role"] == "random" else "",
        }
    known = {field.name: stored[field.name] for field in fields(Place) if field.name in stored}
    return Condition(**{**known, "layers": tuple(stored["layers"]), "coef": float(stored["coef"])})


def layers_label(layers: Sequence[int]) -> str:
    """Return how a choice of layers is written: ``layer 20``, ``layers 3+4``, ``layers 1-28``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return "layers " + "+".join(str(layer) for layer in layers)

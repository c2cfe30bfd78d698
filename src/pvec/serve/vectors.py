"""The vectors of a server: each by its name, at its layer, in units of the residual norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.steering.instructions import SteeringVector, steering_vector
from pvec.types import SIGNS, Sign, VectorKind
from pvec.vectors.files import find_vector, load_vectors, vector_name
from pvec.vectors.projection import QUANTILES, stored_quantiles
from pvec.vectors.quality import best_layer
from pvec.vectors.vector import PersonaVector

_WORDS: Mapping[Sign, str] = {"pos": "positive", "neg": "negative"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedVector:
    """A vector with the layer at which answers are measured.

    ``scale`` is the mean residual norm there, in which projections are given; None: the file has
    none, and they are given as they are. ``means`` and ``quantiles`` say where the extraction's
    answers of each sign lie, in the same unit, as far as the file says it.
    """

    name: str
    trait: str
    fingerprint: str
    steering: SteeringVector
    layer: int
    scale: float | None
    means: Mapping[Sign, float]
    quantiles: Mapping[Sign, np.ndarray]

    @property
    def direction(self) -> tuple[int, np.ndarray]:
        """The layer, and what its residual stream is multiplied with to give the projection."""
        row = np.asarray(self.steering.rows[self.layer], dtype=np.float64)
        unit = row / np.linalg.norm(row) / (self.scale or 1.0)
        return self.layer, unit.astype(np.float32)

    def percentile(self, projection: float | None) -> dict[str, float] | None:
        """Return which share of each sign's answers lies below, in percent."""
        if projection is None or len(self.quantiles) < len(SIGNS):
            return None
        return {
            _WORDS[sign]: round(float(np.interp(projection, values, 100 * np.array(QUANTILES))), 1)
            for sign, values in self.quantiles.items()
        }

    def reading(self, prompt: float | None, answer: float | None) -> dict[str, Any]:
        """Return what the report of an answer says of the vector: where both lie on it."""
        percentile = self.percentile(answer)
        return {"layer": self.layer, "prompt": prompt, "answer": answer, "percentile": percentile}

    def describe(self, num_layers: int) -> dict[str, Any]:
        """Return what a client needs to know of it."""
        norm = float(np.linalg.norm(self.steering.rows[self.layer]))
        return {
            "name": self.name,
            "trait": self.trait,
            "layer": self.layer,
            "layers": [n for n in range(1, num_layers + 1) if self.steering.has(n)],
            "fingerprint": self.fingerprint,
            "unit": "raw" if self.scale is None else "residual norms",
            "norm_ratio": None if self.scale is None else norm / self.scale,
            "negative": self.means.get("neg"),
            "positive": self.means.get("pos"),
        }


def load_served_vectors(
    session: ModelSession, names: Sequence[str], *, kind: VectorKind
) -> dict[str, ServedVector]:
    """Load ``FILE`` or ``NAME=FILE`` for each, by name (default: the trait); no weights are needed.

    Raises ``InputError`` for two of one name, and as ``load_vectors`` does.
    """
    served: dict[str, ServedVector] = {}
    for text in names:
        name, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            name, file = "", text
        (vector,) = load_vectors(
            [find_vector(file)], model=session.metadata, notify=session.notify
        ).values()
        name = name or vector.trait or vector_name(Path(file))
        if name in served:
            raise InputError(
                f"Two vectors are named {name!r}: give one of them a name, --vector NAME=FILE."
            )
        served[name] = _served(name, vector, kind)
    return served


def _served(name: str, vector: PersonaVector, kind: VectorKind) -> ServedVector:
    steering = steering_vector(vector, kind=kind, label=name)
    layer = best_layer(vector, kind=kind)
    if not steering.has(layer):
        layer = max((n for n in vector.steering_layers if steering.has(n)), default=0)
    if layer == 0:
        raise InputError(f"The vector {name!r} is zero at every layer: extract it again.")
    norm = float("nan") if vector.mean_norm is None else float(vector.mean_norm[layer])
    scale = norm if 0 < norm < float("inf") else None
    places = vector.stats if kind == vector.main_kind and scale else {}
    means = {
        sign: float(places[f"proj_response_{sign}"][layer]) / (scale or 1.0)
        for sign in SIGNS
        if f"proj_response_{sign}" in places
    }
    quantiles = {}
    for sign in SIGNS:
        values = stored_quantiles(places, sign)
        if values is not None:
            quantiles[sign] = values[:, layer] / (scale or 1.0)
    return ServedVector(
        name=name,
        trait=vector.trait,
        fingerprint=vector.fingerprint,
        steering=steering,
        layer=layer,
        scale=scale,
        means={sign: mean for sign, mean in means.items() if np.isfinite(mean)},
        quantiles={sign: values for sign, values in quantiles.items() if np.isfinite(values).all()},
    )

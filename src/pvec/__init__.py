"""pvec: persona vectors for language models (arXiv 2507.21509).

The names below are the library; each is imported when it is first used, so that ``import pvec``
loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pvec.activations.capture import capture_means
    from pvec.backends.hf.backend import HFBackend
    from pvec.errors import PvecError
    from pvec.projection.library import monitor, project
    from pvec.runs.store import Run
    from pvec.settings import Settings
    from pvec.steering.hooks import steer
    from pvec.training.shift import Alarm, PersonaShiftCallback, Probe
    from pvec.traits.trait import Trait, load_trait
    from pvec.types import Instruction, Request, Sampling, TokenSpans
    from pvec.vectors.formats import load_vector, save_vector
    from pvec.vectors.vector import PersonaVector

_HOMES = {
    "Alarm": "pvec.training.shift",
    "HFBackend": "pvec.backends.hf.backend",
    "Instruction": "pvec.types",
    "PersonaShiftCallback": "pvec.training.shift",
    "PersonaVector": "pvec.vectors.vector",
    "Probe": "pvec.training.shift",
    "PvecError": "pvec.errors",
    "Request": "pvec.types",
    "Run": "pvec.runs.store",
    "Sampling": "pvec.types",
    "Settings": "pvec.settings",
    "TokenSpans": "pvec.types",
    "Trait": "pvec.traits.trait",
    "capture_means": "pvec.activations.capture",
    "load_trait": "pvec.traits.trait",
    "load_vector": "pvec.vectors.formats",
    "monitor": "pvec.projection.library",
    "project": "pvec.projection.library",
    "save_vector": "pvec.vectors.formats",
    "steer": "pvec.steering.hooks",
}

__all__ = [
    "Alarm",
    "HFBackend",
    "Instruction",
    "PersonaShiftCallback",
    "PersonaVector",
    "Probe",
    "PvecError",
    "Request",
    "Run",
    "Sampling",
    "Settings",
    "TokenSpans",
    "Trait",
    "__version__",
    "capture_means",
    "load_trait",
    "load_vector",
    "monitor",
    "project",
    "save_vector",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pvec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

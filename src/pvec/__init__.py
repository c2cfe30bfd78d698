"""pvec: persona vectors for language models (arXiv 2507.21509).

The names below are the library; each is imported when it is first used, so that ``import pvec``
loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pvec import plot
    from pvec.activations.capture import capture_means
    from pvec.activations.record import Activations, record_activations
    from pvec.backends.hf.backend import HFBackend
    from pvec.errors import PvecError
    from pvec.evaluation.steer_eval import SteerEvalResult
    from pvec.extraction.extract import ExtractResult
    from pvec.library import evaluate, extract, screen, train
    from pvec.projection.screen import ScreenResult
    from pvec.projection.tokens import monitor, project
    from pvec.runs.store import Run
    from pvec.settings import Settings
    from pvec.steering.hooks import steer
    from pvec.training.shift import Alarm, PersonaShiftCallback, Probe
    from pvec.training.train import TrainResult
    from pvec.traits.trait import Trait, load_trait
    from pvec.types import Instruction, Request, Sampling, TokenSpans
    from pvec.vectors.files import load_vector, save_vector
    from pvec.vectors.vector import PersonaVector

_HOMES = {
    "Activations": "pvec.activations.record",
    "Alarm": "pvec.training.shift",
    "ExtractResult": "pvec.extraction.extract",
    "HFBackend": "pvec.backends.hf.backend",
    "Instruction": "pvec.types",
    "PersonaShiftCallback": "pvec.training.shift",
    "PersonaVector": "pvec.vectors.vector",
    "Probe": "pvec.training.shift",
    "PvecError": "pvec.errors",
    "Request": "pvec.types",
    "Run": "pvec.runs.store",
    "Sampling": "pvec.types",
    "ScreenResult": "pvec.projection.screen",
    "Settings": "pvec.settings",
    "SteerEvalResult": "pvec.evaluation.steer_eval",
    "TokenSpans": "pvec.types",
    "TrainResult": "pvec.training.train",
    "Trait": "pvec.traits.trait",
    "capture_means": "pvec.activations.capture",
    "evaluate": "pvec.library",
    "extract": "pvec.library",
    "load_trait": "pvec.traits.trait",
    "load_vector": "pvec.vectors.files",
    "monitor": "pvec.projection.tokens",
    "project": "pvec.projection.tokens",
    "record_activations": "pvec.activations.record",
    "save_vector": "pvec.vectors.files",
    "screen": "pvec.library",
    "steer": "pvec.steering.hooks",
    "train": "pvec.library",
}

__all__ = [
    "Activations",
    "Alarm",
    "ExtractResult",
    "HFBackend",
    "Instruction",
    "PersonaShiftCallback",
    "PersonaVector",
    "Probe",
    "PvecError",
    "Request",
    "Run",
    "Sampling",
    "ScreenResult",
    "Settings",
    "SteerEvalResult",
    "TokenSpans",
    "TrainResult",
    "Trait",
    "__version__",
    "capture_means",
    "evaluate",
    "extract",
    "load_trait",
    "load_vector",
    "monitor",
    "plot",
    "project",
    "record_activations",
    "save_vector",
    "screen",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "plot":  # a module, not a name of one
        return importlib.import_module("pvec.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'pvec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""What ``inspect_ai`` finds of pvec; a model's code is loaded when the model is named."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi

from pvec.inspect.scorers import projection, trait

__all__ = ["projection", "pvec", "pvec_serve", "trait"]


@modelapi(name="pvec")
def pvec() -> Any:
    """Return the provider of models in this process: ``--model pvec/MODEL``."""
    from pvec.inspect.provider import SteeredModel

    return SteeredModel


@modelapi(name="pvec-serve")
def pvec_serve() -> Any:
    """Return the provider of models that ``pvec serve`` serves: ``--model pvec-serve/NAME``."""
    from pvec.inspect.served import ServedModel

    return ServedModel

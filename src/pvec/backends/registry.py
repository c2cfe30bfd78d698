"""The backends by name; a backend's module is imported when it is used."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

from pvec.backends.base import Backend
from pvec.errors import InputError, did_you_mean, install_command

BackendName = Literal["hf", "vllm"]

_CLASSES: dict[BackendName | Literal["pool"], str] = {
    "hf": "pvec.backends.hf.backend:HFBackend",
    "pool": "pvec.backends.pool.backend:PoolBackend",
    "vllm": "pvec.backends.vllm.engine:VLLMBackend",
}


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """A backend and the reason for choosing it."""

    name: BackendName
    reason: str


def choose_backend(
    name: str = "auto", *, bundled: bool = False, gguf: bool = False
) -> BackendChoice:
    """Return the backend for ``auto``, ``hf`` or ``vllm``; ``InputError`` for anything else.

    ``auto`` takes vLLM when it is installed and there is a CUDA GPU, except for the bundled model,
    which is too small to be worth an engine's start, and for GGUF files, which vLLM 0.32
    does not load. Naming vLLM without having it is an error.
    """
    if name == "auto":
        return _choose_for_user(bundled=bundled, gguf=gguf)
    if name not in get_args(BackendName):
        known = ["auto", *get_args(BackendName)]
        raise InputError(
            f"There is no backend {name!r}: use {', '.join(known)}.{did_you_mean(name, known)}"
        )
    if name == "vllm" and gguf:
        raise InputError(
            "vLLM does not load GGUF files: use --backend hf, or the model's safetensors."
        )
    if name == "vllm" and not _installed("vllm"):
        raise InputError(
            f"The vllm backend needs vLLM, which is not installed: {install_command('vllm')}, "
            f"or --backend hf."
        )
    return BackendChoice(name="vllm" if name == "vllm" else "hf", reason="as set")


def backend_class(name: BackendName | Literal["pool"]) -> type[Backend]:
    """Import and return the class of a backend (heavy: torch, perhaps vLLM); ``pool``: workers
    that run one of the others.
    """
    module, _, attribute = _CLASSES[name].partition(":")
    cls: type[Backend] = getattr(importlib.import_module(module), attribute)
    return cls


def _choose_for_user(*, bundled: bool, gguf: bool) -> BackendChoice:
    if bundled:
        return BackendChoice(name="hf", reason="the bundled model needs no engine")
    if gguf:
        return BackendChoice(name="hf", reason="vLLM does not load GGUF files")
    if not _installed("vllm"):
        return BackendChoice(name="hf", reason="vLLM is not installed")
    if not _has_cuda():
        return BackendChoice(name="hf", reason="vLLM is installed but there is no CUDA GPU")
    return BackendChoice(name="vllm", reason="vLLM is installed and there is a CUDA GPU")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

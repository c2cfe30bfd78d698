"""What happens around vLLM without vLLM: laziness, versions, sentences."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pvec.backends.vllm import start
from pvec.backends.vllm.start import accumulator_rows, capture_bytes, table_bytes
from pvec.errors import InputError, ModelError
from pvec.settings.sections import VLLMSettings


def test_importing_the_backend_imports_no_vllm() -> None:
    code = "import sys, pvec.backends.vllm.engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "is not installed: pip install"), ("0.9.1", "too old"), ("0.33.0", "too new")],
)
def test_a_vllm_that_is_missing_or_untried_gets_one_sentence(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    def installed(name: str) -> str:
        if version is None or name != "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(InputError, match=words) as refusal:
        start.check_vllm()
    assert "--backend hf" in str(refusal.value)


def test_the_builds_that_were_tried_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.29.0", "0.32.0", "0.32.1+cu130"):
        monkeypatch.setattr(importlib.metadata, "version", lambda _name, v=version: v)
        assert start.check_vllm() == version


def _config(**changes: Any) -> Any:
    parallel = {"enable_dbo": False, "prefill_context_parallel_size": 1}
    return SimpleNamespace(
        speculative_config=changes.get("speculative"),
        parallel_config=SimpleNamespace(**(parallel | changes.get("parallel", {}))),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=changes.get("fast", False)),
        compilation_config=SimpleNamespace(
            pass_config=SimpleNamespace(enable_sp=changes.get("sp", False))
        ),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculative": object()}, "speculative decoding"),
        ({"parallel": {"enable_dbo": True}}, "dual-batch overlap"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"sp": True}, "sequence parallelism"),
        ({"fast": True}, "fast prefill"),
    ],
)
def test_engines_in_which_steering_would_be_wrong_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        start.refuse(_config(**changes))


def test_an_ordinary_engine_is_not_refused() -> None:
    start.refuse(_config())


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("No available memory for the cache blocks", "too little memory.*backend.vllm.slots"),
        ("Model architectures ['X'] are not supported for now", "does not support 'm'"),
        ("something else", "did not start 'm'"),
    ],
)
def test_what_stops_the_engine_becomes_one_sentence(message: str, words: str) -> None:
    sentence = start.why_not("m", ValueError(message))
    with pytest.raises(ModelError, match=words):
        raise ModelError(sentence)


def test_the_cost_of_slots_and_captures_is_what_the_buffers_take() -> None:
    import torch

    from pvec.backends.vllm.probe import Probe

    options = VLLMSettings(slots=5, captures=7, clamps=2)
    probe = Probe(
        where=torch.zeros(2, 8, dtype=torch.int32),
        hidden_size=16,
        slots=5,
        clamps=2,
        rows=accumulator_rows(options),
        dtype=torch.bfloat16,
    )
    sizes = {name: b.numel() * b.element_size() for name, b in probe.named_buffers()}
    assert table_bytes(options, num_layers=1, hidden_size=16, item_bytes=2) == (
        sizes["delta"] + sizes["units"] + sizes["bounds"]
    )
    assert capture_bytes(options, num_layers=0, hidden_size=16) == sizes["sums"] + sizes["stats"]

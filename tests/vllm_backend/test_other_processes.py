"""What needs a process of its own: the second model runner, two ranks, two engines, no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.backends.vllm.engine import VLLMBackend
from pvec.types import SpanMeans
from vllm_backend.conftest import CACHE_BYTES
from vllm_backend.oracle import forward, greedy, hf_model
from vllm_backend.requests import battery

HERE = Path(__file__).parent


def test_the_second_model_runner_gives_the_same() -> None:
    """The whole comparison with transformers, in vLLM's runner for GPUs (see second_runner.py)."""
    chosen = "qwen2 and not preempted and not compiled or chunks and llama"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "vllm_backend.second_runner"]
    command += [str(HERE / "test_equals_transformers.py"), "-k", chosen, "-p", "no:cacheprovider"]
    result = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    "settings",
    [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"data_parallel": 2}],
    ids=["tensor", "pipeline", "data"],
)
def test_two_workers_give_what_one_gives(
    models: Callable[[str], Path],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pvec.settings.tree import VLLMSettings

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if "data_parallel" not in settings:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = VLLMSettings(
        eager=True,
        cache_bytes=CACHE_BYTES,
        block_size=32,
        max_seqs=16,
        slots=4,
        captures=16,
        max_batch_tokens=48,
        removals=2,
        **settings,
    )
    # Two heads of keys and values, so that two ranks can share them.
    folder = models("llama-wide")
    with VLLMBackend(str(folder), options=options) as backend:
        found = {g.id: (g, m) for g, m in backend.generate_and_capture(battery())}
        first = backend.generate(replace(r, id=r.id + "!") for r in battery())
        next(first)
        first.close()
        assert len(list(backend.generate(battery(copies=1)))) == len(battery(copies=1))
    model = hf_model(folder)
    for request in battery():
        tokens, _ = greedy(
            model,
            request.prompt_ids,
            tokens=request.sampling.max_tokens,
            stop=[2],
            plan=request.steering,
        )
        generation, means = found[request.id]
        assert list(generation.token_ids) == tokens, request.id
        _check(means, model, (*request.prompt_ids, *tokens), request)


def _check(means: SpanMeans, model: Any, ids: tuple[int, ...], request: Any) -> None:
    prompt = len(request.prompt_ids)
    _, states = forward(model, ids, prompt=prompt, plan=request.steering)
    assert np.allclose(means.means["prompt"], states[:, :prompt].mean(axis=1), atol=2e-3)
    if len(ids) > prompt:
        assert np.allclose(means.means["response"], states[:, prompt:].mean(axis=1), atol=2e-3)

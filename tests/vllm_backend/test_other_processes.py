"""What needs a process of its own: the second model runner, two ranks, two engines, no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvec.backends.vllm.engine import VLLMBackend
from pvec.errors import ModelError
from pvec.types import SpanMeans
from vllm_backend.conftest import CACHE_BYTES
from vllm_backend.oracle import forward, greedy, hf_model
from vllm_backend.requests import battery

HERE = Path(__file__).parent


def test_the_second_model_runner_gives_the_same() -> None:
    """The whole comparison with transformers, in vLLM's runner for GPUs (see second_runner.py)."""
    chosen = "qwen2 or preempts or chunks and llama"
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


WORKERS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "data": {"data_parallel_size": 2},
}


@pytest.fixture(scope="module", params=list(WORKERS))
def backend(request: pytest.FixtureRequest, models: Callable[[str], Path]) -> Iterator[VLLMBackend]:
    """Two workers, each in a process of its own."""
    from vllm.envs import disable_envs_cache

    from pvec.settings.sections import VLLMSettings

    settings = WORKERS[request.param]
    options = VLLMSettings(
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE_BYTES,
        block_size=32,
        max_num_seqs=16,
        slots=4,
        captures=16,
        max_num_batched_tokens=48,
        clamps=2,
        **settings,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        if "data_parallel_size" not in settings:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        disable_envs_cache()  # an engine of another test may have read the environment
        # Two heads of keys and values, so that two ranks can share them.
        with VLLMBackend(str(models("llama-wide")), options=options) as made:
            yield made


def test_two_workers_give_what_one_gives(backend: VLLMBackend) -> None:
    found = {g.id: (g, m) for g, m in backend.generate_and_capture(battery())}
    model = hf_model(Path(backend.info.id))
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


def test_a_stream_of_two_workers_can_be_left_early(backend: VLLMBackend) -> None:
    stream = backend.generate(battery())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(list(backend.generate(battery(copies=1)))) == len(battery(copies=1))


def test_a_worker_that_is_killed_is_one_sentence_and_what_was_finished_is_kept(
    backend: VLLMBackend,
) -> None:
    import psutil

    endless = (
        replace(request, id=f"{request.id}-{turn}") for turn in count() for request in battery()
    )
    stream, finished = backend.generate(endless), []
    finished.append(next(stream))
    workers = [p for p in psutil.Process().children(recursive=True) if _runs_layers(p)]
    workers[-1].kill()
    with pytest.raises(ModelError, match=r"worker of the vLLM engine died.*run the same command"):
        finished.extend(stream)
    assert finished


def _runs_layers(process: Any) -> bool:
    if process.status() == "zombie":  # of a test before
        return False
    return any(word in " ".join(process.cmdline()) for word in ("VLLM::Worker", "VLLM::EngineCore"))


def _check(means: SpanMeans, model: Any, ids: tuple[int, ...], request: Any) -> None:
    prompt = len(request.prompt_ids)
    _, states = forward(model, ids, prompt=prompt, plan=request.steering)
    assert np.allclose(means.means["prompt"], states[:, :prompt].mean(axis=1), atol=2e-3)
    if len(ids) > prompt:
        assert np.allclose(means.means["response"], states[:, prompt:].mean(axis=1), atol=2e-3)

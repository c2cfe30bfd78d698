"""LoRA adapters per request on one base, steered and captured like any other request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.models import save_adapter
from transformers import AutoModelForCausalLM

from pvec.backends.vllm.engine import VLLMBackend
from pvec.errors import InputError
from vllm_backend.conftest import CACHE_BYTES
from vllm_backend.oracle import forward, greedy, hf_model
from vllm_backend.requests import battery


def test_requests_on_two_adapters_and_none_share_a_batch(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    from pvec.models.files import ModelSpec
    from pvec.settings.sections import VLLMSettings

    base = models("qwen2")
    folders = [str(save_adapter(base, tmp_path / f"adapter{n}", seed=n)) for n in range(2)]
    adapted = {
        folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        .merge_and_unload()
        .eval()
        for folder in folders
    }
    requests = battery(copies=2)
    wanted: dict[str, str | None] = {
        r.id: (None, *folders)[n % 3] for n, r in enumerate(requests) if n % 4
    }
    options = VLLMSettings(
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE_BYTES,
        block_size=32,
        max_num_seqs=16,
        max_loras=2,
        max_lora_rank=8,
        max_num_batched_tokens=128,
        clamps=2,
        slots=4,
        captures=16,
    )
    spec = ModelSpec(model=str(base), adapter=folders[0])
    with VLLMBackend(spec, options=options) as backend:
        assert backend.info.adapter == folders[0]
        found = {g.id: (g, m) for g, m in backend.generate_and_capture(requests, adapters=wanted)}
    for request in requests:
        folder = wanted.get(request.id, folders[0])
        model = adapted[folder] if folder else hf_model(base)
        plan = request.steering
        tokens, _ = greedy(
            model, request.prompt_ids, tokens=request.sampling.max_tokens, stop=[2], plan=plan
        )
        generation, means = found[request.id]
        assert list(generation.token_ids) == tokens, (request.id, folder)
        prompt = len(request.prompt_ids)
        _, states = forward(model, request.prompt_ids, prompt=prompt, plan=plan)
        assert np.allclose(means.means["prompt"], states.mean(axis=1), atol=1e-3), request.id


def test_an_adapter_asked_of_an_engine_without_any_is_refused(
    start: Callable[[], VLLMBackend],
) -> None:
    request = replace(battery()[0], id="r")
    with pytest.raises(InputError, match=r"backend\.vllm\.max_loras"):
        list(start().generate([request], adapters={"r": "/some/adapter"}))

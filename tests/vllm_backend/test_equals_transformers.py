"""Every engine gives what transformers gives with a plain hook: texts, means, log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvec.backends.vllm.engine import VLLMBackend
from pvec.types import SpanMeans, TokenSpans
from vllm_backend.conftest import Start
from vllm_backend.oracle import LAYERS, WIDTH, forward, greedy, hf_model
from vllm_backend.requests import battery

ENGINES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama, chunks": {"architecture": "llama", "max_num_batched_tokens": 24},
    "qwen3, no prefix cache, no chunks": {
        "architecture": "qwen3",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
    },
    "gemma2": {"architecture": "gemma2"},
    "gemma3, chunks": {"architecture": "gemma3", "max_num_batched_tokens": 24},
    "qwen2, preempted": {"kv_cache_memory_bytes": 6 * 32 * 2 * 3 * 32 * 4, "max_model_len": 128},
    "qwen2, compiled": {"enforce_eager": False, "clamps": 2, "max_num_batched_tokens": 64},
}


@pytest.fixture(scope="module", params=list(ENGINES))
def backend(request: pytest.FixtureRequest, start: Start) -> VLLMBackend:
    return start(**ENGINES[request.param])


def test_the_runner_is_the_one_that_was_asked_for(backend: VLLMBackend) -> None:
    wanted = "V2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "V1"
    assert any(f"{wanted} runner" in note for note in backend.info.notes)


def _folder(backend: VLLMBackend) -> Path:
    return Path(backend.info.id)


def test_greedy_texts_of_a_mixed_batch_are_those_of_a_plain_hook(backend: VLLMBackend) -> None:
    model, requests = hf_model(_folder(backend)), battery()
    stop = [backend.tokenizer.eos_token_id]
    found = {g.id: g for g in backend.generate(requests)}
    assert found.keys() == {r.id for r in requests}
    for request in requests:
        tokens, reason = greedy(
            model,
            request.prompt_ids,
            tokens=request.sampling.max_tokens,
            stop=stop,
            plan=request.steering,
        )
        assert (list(found[request.id].token_ids), found[request.id].finish_reason) == (
            tokens,
            reason,
        ), request.id
        assert found[request.id].text == backend.tokenizer.decode(tokens, skip_special_tokens=True)
        assert len(found[request.id].touched) == len(request.steering)


def test_a_second_run_in_another_order_reads_the_cache_and_gives_the_same(
    backend: VLLMBackend,
) -> None:
    first = {g.id: g for g in backend.generate(battery())}
    again = {g.id: g for g in backend.generate(sorted(battery(), key=lambda r: r.id))}
    assert again == first


def test_the_small_cache_preempts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = start(**ENGINES["qwen2, preempted"])
    scheduler = backend._pool.clients[0].engine.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r), preempt(r, *a, **k))
    )
    list(backend.generate_and_capture(battery()))
    assert preempted, "this engine is here to test what preemption does"


def test_the_plain_hook_sees_the_hidden_states_of_transformers(start: Start) -> None:
    model = hf_model(_folder(start()))
    ids = list(range(30, 50))
    _, states = forward(model, ids, prompt=len(ids))
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    for layer in range(LAYERS):  # the last one comes after transformers' final norm
        assert np.allclose(states[layer], output.hidden_states[layer][0].numpy(), atol=1e-6)


def test_means_captured_while_generating_are_those_of_the_hidden_states(
    backend: VLLMBackend,
) -> None:
    model, requests = hf_model(_folder(backend)), battery(copies=2)
    by_id = {r.id: r for r in requests}
    seen = 0
    for generation, means in backend.generate_and_capture(requests):
        request = by_id[generation.id]
        prompt = len(request.prompt_ids)
        ids = (*request.prompt_ids, *generation.token_ids)
        _, states = forward(model, ids, prompt=prompt, plan=request.steering)
        _check(means, "prompt", states[:, :prompt])
        _check(means, "prompt_last", states[:, prompt - 1 : prompt])
        if generation.token_ids:
            _check(means, "response", states[:, prompt:])
        seen += 1
    assert seen == len(requests)


def test_given_sequences_are_captured_without_generating(backend: VLLMBackend) -> None:
    model = hf_model(_folder(backend))
    sequences = {
        request.id: TokenSpans(
            id=request.id,
            token_ids=request.prompt_ids + request.prompt_ids[:7],
            spans={
                "prompt": (0, len(request.prompt_ids)),
                "prompt_last": (len(request.prompt_ids) - 1, len(request.prompt_ids)),
                "response": (len(request.prompt_ids), len(request.prompt_ids)),
            }
            | (
                {"response": (2, len(request.prompt_ids) + 1)}
                if len(request.prompt_ids) > 3
                else {}
            ),
            steering=request.steering,
        )
        for request in battery(copies=2)
    }
    layers = (0, LAYERS, 1)
    seen = 0
    for means in backend.capture(sequences.values(), layers=layers):
        sequence = sequences[means.id]
        prompt = sequence.spans["prompt"][1]
        _, states = forward(model, sequence.token_ids, prompt=prompt, plan=sequence.steering)
        assert means.layers == layers
        for name, (start, stop) in sequence.spans.items():
            if start == stop:
                assert np.isnan(means.means[name]).all()
                assert means.means[name].shape == (len(layers), WIDTH)
                assert np.isnan(means.norms[name]).all()
                assert means.norms[name].shape == (len(layers),)
            else:
                _check(means, name, states[list(layers), start:stop])
        seen += 1
    assert seen == len(sequences)


def test_continuations_have_the_log_probabilities_of_a_full_forward(backend: VLLMBackend) -> None:
    model = hf_model(_folder(backend))
    prompts = [r.prompt_ids for r in battery()[:4]]
    continuations = [(20,), (20, 21), (20, 22), (35, 36, 37), (250,)]
    found = dict(backend.continuation_logprobs(prompts, continuations))
    for index, prompt in enumerate(prompts):
        for place, continuation in enumerate(continuations):
            total = 0.0
            for depth, token in enumerate(continuation):
                logits, _ = forward(model, [*prompt, *continuation[:depth]], prompt=len(prompt))
                total += float(torch.log_softmax(logits, dim=-1)[token])
            assert found[index][place] == pytest.approx(total, abs=1e-3, rel=1e-4)


def _check(means: SpanMeans, name: Any, states: np.ndarray) -> None:
    """Compare with states ``[L, T, H]``: relative error of the mean at most 1e-4 in every layer."""
    wanted = states.astype(np.float64).mean(axis=1)
    error = np.linalg.norm(means.means[name] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert error.max() < 1e-4, (means.id, name, error)
    norms = np.linalg.norm(states.astype(np.float64), axis=2).mean(axis=1)
    assert np.allclose(means.norms[name], norms, rtol=1e-4), (means.id, name)

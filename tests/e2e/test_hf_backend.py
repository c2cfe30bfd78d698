"""The HF backend from a folder on disk: generate, capture and score with one load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, HIDDEN_SIZE, save_adapter, saved_model

from pvec.backends.hf.backend import HFBackend
from pvec.models import chat
from pvec.models.files import ModelSpec
from pvec.models.load import inspect_model
from pvec.types import Instruction, Request, Sampling

QUESTIONS = ("How can I save money?", "What should I cook for my friends this evening, please?")


def asked(backend: HFBackend, *, rollouts: int = 3) -> list[Request]:
    return [
        Request(
            id=f"{q}-{k}",
            prompt_ids=chat.prompt_ids(backend.tokenizer, [{"role": "user", "content": text}]),
            sampling=Sampling(max_tokens=8, seed=10 * q + k),
        )
        for q, text in enumerate(QUESTIONS)
        for k in range(rollouts)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_captured_from_the_ids_they_were_generated_with(architecture: str) -> None:
    with HFBackend(ModelSpec(model=str(saved_model(architecture)), device="cpu")) as backend:
        requests = {r.id: r for r in asked(backend)}
        answers = list(backend.generate(requests.values()))
        spans = [
            chat.spans_from_ids(a.id, prompt_ids=requests[a.id].prompt_ids, answer_ids=a.token_ids)
            for a in answers
        ]
        captured = {means.id: means for means in backend.capture(spans, layers=[0, 1, 2])}
        assert sorted(captured) == sorted(requests)
        assert backend.model is not None
        for sequence in spans:
            with torch.no_grad():
                output = backend.model(
                    torch.tensor([sequence.token_ids]), output_hidden_states=True
                )
            for name, (start, stop) in sequence.spans.items():
                for layer in (0, 1, 2):
                    expected = output.hidden_states[layer][0, start:stop].mean(dim=0).numpy()
                    found = captured[sequence.id].means[name][layer]
                    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_texts_are_the_decoded_ids_and_the_facts_are_those_of_inspection() -> None:
    spec = ModelSpec(model=str(saved_model("qwen2")), device="cpu")
    metadata = inspect_model(spec)
    with HFBackend(spec, metadata=metadata, batch_size=4) as backend:
        assert backend.info.fingerprint == metadata.fingerprint
        assert backend.limits.rows == 4
        for answer in backend.generate(asked(backend)):
            assert answer.text == backend.tokenizer.decode(
                answer.token_ids, skip_special_tokens=True
            )
    assert backend.model is None


def test_an_adapter_runs_active_and_merged_alike_and_can_be_steered(tmp_path: Path) -> None:
    adapter = str(save_adapter(saved_model("qwen2"), tmp_path / "adapter"))
    vector = np.random.default_rng(0).standard_normal(HIDDEN_SIZE).astype(np.float32) * 4
    steering = (Instruction(vector=vector, layer=2, positions="all"),)
    texts = []
    for merge in (False, True):
        spec = ModelSpec(model=adapter, merge_adapter=merge, device="cpu")
        with HFBackend(spec) as backend:
            plain = [
                Request(
                    id=r.id, prompt_ids=r.prompt_ids, sampling=Sampling(temperature=0, max_tokens=6)
                )
                for r in asked(backend, rollouts=1)
            ]
            steered = [
                Request(
                    id=f"steered-{r.id}",
                    prompt_ids=r.prompt_ids,
                    sampling=r.sampling,
                    steering=steering,
                )
                for r in plain
            ]
            texts.append({a.id: a.token_ids for a in backend.generate([*plain, *steered])})
    assert texts[0] == texts[1]
    assert any(texts[0][r.id] != texts[0][f"steered-{r.id}"] for r in plain)
    with HFBackend(ModelSpec(model=str(saved_model("qwen2")), device="cpu")) as backend:
        base = {a.id: a.token_ids for a in backend.generate(plain)}
    assert any(base[k] != texts[0][k] for k in base)


def test_a_backend_can_be_used_for_several_things_at_once() -> None:
    with HFBackend(ModelSpec(model=str(saved_model("llama")), device="cpu")) as backend:
        requests = asked(backend)
        alone = {a.id: a for a in backend.generate(requests)}
        stream = backend.generate(requests)
        first = next(stream)
        scores = dict(backend.continuation_logprobs([requests[0].prompt_ids], [(9,), (10, 2)]))
        rest = {a.id: a for a in stream}
    assert {first.id: first, **rest} == alone
    assert scores[0].shape == (2,)

"""An architecture whose batched answers differ from its answers alone is refused, not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.models import ARCHITECTURES, tiny_model, tiny_tokenizer

from pvec.backends.hf import batch_check, forward
from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.batch_check import batch_difference, check_batching
from pvec.backends.hf.forward import causal_model
from pvec.errors import ModelError
from pvec.types import Request, Sampling

COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def model_of(architecture: str, **options: Any) -> Any:
    config = getattr(transformers, f"{architecture}Config")(**(COMMON | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{architecture}ForCausalLM")(config).float().eval()


def falcon() -> Any:
    return model_of("Falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2)


def recurrent_gemma() -> Any:
    return model_of("RecurrentGemma", lru_width=32, attention_window_size=16, head_dim=8)


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_check, "_checked", set())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_architectures_differ_by_rounding_only(architecture: str) -> None:
    model = tiny_model(architecture)
    assert batch_difference(causal_model(model, tiny_tokenizer())) < 1e-5
    half = causal_model(model.to(torch.bfloat16), tiny_tokenizer())
    assert batch_difference(half) < 0.05  # far from what refuses it


def test_a_state_that_the_rows_of_a_batch_share_is_found() -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + out.mean(dim=0))
    causal = causal_model(model, tiny_tokenizer())
    for _ in range(2):  # a refused architecture stays refused
        with pytest.raises(ModelError, match="LlamaForCausalLM computes other logits in a batch"):
            check_batching(causal)


def test_a_state_that_is_kept_from_one_pass_to_the_next_is_found() -> None:
    model = tiny_model("llama")
    kept: list[torch.Tensor] = []

    def remember(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output[:1, -1:].clone())
        return output + (kept[-2] if len(kept) > 1 else 0.0)

    model.model.layers[1].register_forward_hook(remember)
    with pytest.raises(ModelError, match="computes other logits in a batch"):
        check_batching(causal_model(model, tiny_tokenizer()))


def test_recurrent_gemma_which_keeps_such_a_state_is_refused() -> None:
    with pytest.raises(ModelError, match=r"recurrent_gemma|RecurrentGemma"):
        check_batching(causal_model(recurrent_gemma(), tiny_tokenizer()))


def test_attention_that_is_not_looked_up_by_name_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = causal_model(falcon(), tiny_tokenizer())
    assert batch_difference(model) < 1e-5
    monkeypatch.setattr(forward, "supports_grouping", lambda _model: True)
    with pytest.raises(ModelError, match="FalconForCausalLM computes other logits"):
        check_batching(model)


def test_answers_of_falcon_do_not_depend_on_the_batch() -> None:
    requests = [
        Request(
            id=f"{n}",
            prompt_ids=tuple(range(10, 15 + 3 * n)),
            sampling=Sampling(max_tokens=12, seed=n),
        )
        for n in range(8)
    ]
    answers = []
    for rows in (1, 8):
        backend = HFBackend.wrap(falcon(), tiny_tokenizer(), batch_size=rows)
        answers.append({answer.id: answer.token_ids for answer in backend.generate(requests)})
    assert answers[0] == answers[1]


def test_an_architecture_is_checked_once_in_a_process() -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    for expected in (True, False):
        model = tiny_model("llama")
        model.register_forward_pre_hook(count)
        passes = 0
        check_batching(causal_model(model, tiny_tokenizer()))
        assert bool(passes) is expected

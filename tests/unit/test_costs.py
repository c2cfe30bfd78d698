"""The cost model against the real models, PyTorch's own count of FLOPs and the real cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from helpers.models import ARCHITECTURES, saved_model, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from pvec.backends import resources
from pvec.backends.session import ModelSession
from pvec.models.costs import Estimate, Machine, ModelSize, Work, model_size
from pvec.settings import Settings

CPU = Machine(flops=1e11, bandwidth=1e10, memory=4e9, share=1.0, layer_seconds=0.0, origin="test")


def size_of(model: PreTrainedModel) -> ModelSize:
    return model_size(model.config, itemsize=4)


def eager(architecture: str) -> Any:
    """Return a model whose attention is products that PyTorch counts."""
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    return model


def counted(run: Any, *args: Any, **options: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        result = run(*args, **options)
    return counter.get_total_flops(), result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_those_of_the_real_model(architecture: str) -> None:
    # these two keep all heads, whatever a configuration calls them
    every = {"num_key_value_heads": 4} if architecture.startswith("gpt") else {}
    model = tiny_model(architecture, **every)
    size = size_of(model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.weight_bytes == sum(p.nbytes for p in model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(5, 19).reshape(2, 7), past_key_values=cache)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size.cache_bytes == kept / 14


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt2", "phi3"])
def test_flops_are_those_that_pytorch_counts(architecture: str) -> None:
    model, rows, prompt, answer = eager(architecture), 3, 40, 3
    work = Work(
        prompts=rows, prompt_tokens=rows * prompt, answers=rows, answer_tokens=rows * answer,
        context=prompt,
    )  # fmt: skip
    estimate = Estimate(size=size_of(model), work=work, machine=CPU)
    ids, cache = torch.randint(5, 300, (rows, prompt)), DynamicCache(config=model.config)
    prefill, _ = counted(model, ids, past_key_values=cache, logits_to_keep=1)
    assert estimate.prefill_flops == pytest.approx(prefill, rel=0.01)
    decode = sum(counted(model, ids[:, :1], past_key_values=cache)[0] for _ in range(answer))
    if getattr(model.config, "sliding_window", None) is None:
        assert estimate.decode_flops == pytest.approx(decode, rel=0.02)
    else:  # a window bounds the keys; the estimate leaves that out
        assert decode <= estimate.decode_flops <= 1.2 * decode


def test_capture_needs_no_logits_and_scoring_all_of_them() -> None:
    model, tokens = eager("qwen2"), 60
    ids = torch.randint(5, 300, (1, tokens))
    work = Work(captured=tokens, scored=tokens, context=tokens)
    estimate = Estimate(size=size_of(model), work=work, machine=CPU)
    assert estimate.capture_flops == pytest.approx(counted(model.model, ids)[0], rel=0.01)
    assert estimate.scoring_flops == pytest.approx(counted(model, ids)[0], rel=0.01)


def test_a_token_of_a_mixture_meets_some_of_the_experts() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    size = model_size(config, itemsize=2)
    experts = 2 * 8 * 3 * 32 * 16  # layers, experts, three matrices
    assert size.block_weights - size.active_weights == experts * 6 // 8
    one, many = (size.step_bytes(rows, context=0) for rows in (1, 500))
    head = size.head_weights * 2
    assert one == pytest.approx(2 * size.active_weights + head)
    assert many == pytest.approx(2 * size.block_weights + head, rel=1e-3)


@pytest.fixture(scope="module")
def llama_70b() -> ModelSize:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    return model_size(config, itemsize=2)


def test_a_70b_model_takes_two_gpus_of_80_gb(llama_70b: ModelSize) -> None:
    assert llama_70b.parameters == pytest.approx(70.55e9, rel=1e-3)  # as its model card says
    assert llama_70b.cache_bytes == 2 * 80 * 8 * 128 * 2
    assert llama_70b.gpus(80e9, context=1200) == 2
    assert llama_70b.gpus(24e9, context=1200) == 8
    assert llama_70b.gpus(1e9, context=1200) is None
    free = 160e9 - llama_70b.weight_bytes
    rows = llama_70b.rows(160e9, context=1200)
    assert 8 <= rows == int(0.75 * free / (1200 * llama_70b.cache_bytes))


def test_decoding_few_rows_waits_for_memory_and_many_for_arithmetic(llama_70b: ModelSize) -> None:
    machine = Machine(
        flops=2e15, bandwidth=6.7e12, memory=1e13, share=0.5, layer_seconds=0, origin=""
    )

    def seconds(rows: int) -> float:
        work = Work(answers=rows, answer_tokens=rows, context=100)
        return Estimate(size=llama_70b, work=work, machine=machine).decode_seconds

    read = llama_70b.step_bytes(1, context=100.5) / machine.bandwidth / machine.share
    assert seconds(1) == pytest.approx(read, rel=0.01)
    assert seconds(8) < 1.1 * seconds(1), "eight rows read the same weights"
    assert seconds(512) > 2 * seconds(8)


def test_gpus_that_take_turns_add_memory_and_no_speed() -> None:
    turns, together = (CPU.divided(4, tensor_parallel=way) for way in (False, True))
    assert turns.memory == together.memory == 4 * CPU.memory
    assert turns.flops == CPU.flops
    assert CPU.flops < together.flops < 4 * CPU.flops


def test_workers_share_the_work_and_small_shares_fill_batches_less() -> None:
    size = size_of(tiny_model())
    work = Work(prompts=10, prompt_tokens=300, answers=1000, answer_tokens=50_000, context=30)
    one, four = (
        Estimate(size=size, work=work.divided(count), machine=CPU).seconds for count in (1, 4)
    )
    assert one / 4 <= four < one / 2


@pytest.mark.parametrize(("gpus", "counts"), [(1, []), (2, [1, 2, 3])])
def test_a_plan_says_how_many_gpus_and_how_long_with_1_2_and_all_workers(
    gpus: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model={"id": str(saved_model())}, pool={"workers": "3"})
    small = replace(CPU, memory=500e3)  # 196 kB of weights, and room for 6 answers of 35 kB
    place = resources._Place(machine=small, workers=3, gpus=gpus)
    monkeypatch.setattr(resources, "_place", lambda *_: place)
    work = Work(prompts=9, prompt_tokens=9 * 80, answers=90, answer_tokens=900, context=80)
    session = ModelSession(Settings(model=settings.model))
    session.settings = settings
    needs = resources.resources(session, work)
    weights = sum(p.nbytes for p in tiny_model().parameters())
    assert (needs.weight_bytes, needs.gpus, needs.workers) == (weights, 2, 3)
    assert [time.workers for time in needs.times] == counts
    seconds = [time.seconds for time in needs.times]
    assert seconds == sorted(seconds, reverse=True)

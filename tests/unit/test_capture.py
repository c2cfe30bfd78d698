"""The capture engine: budgets, memory, shared prompts, missing spans, steering, clean-up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from pvec.activations import capture
from pvec.activations.capture import capture_means
from pvec.errors import InputError, ModelError
from pvec.models.decoder import find_decoder
from pvec.steering.hooks import steer
from pvec.types import Instruction, Positions, SpanMeans, TokenSpans
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, tiny_model


def rollouts(*, prompts: int = 4, answers: int = 6, seed: int = 0) -> list[TokenSpans]:
    rng = random.Random(seed)
    sequences = []
    for p in range(prompts):
        prompt = tuple(rng.randrange(5, 300) for _ in range(20 + p % 2))
        for a in range(answers):
            answer = tuple(rng.randrange(5, 300) for _ in range(rng.randrange(2, 16)))
            start, stop = len(prompt), len(prompt) + len(answer)
            sequences.append(
                TokenSpans(
                    id=f"{p}-{a}",
                    token_ids=prompt + answer,
                    spans={
                        "prompt": (0, start),
                        "prompt_last": (start - 1, start),
                        "response": (start, stop),
                    },
                )
            )
    return sequences


@contextmanager
def watched(model: nn.Module) -> Iterator[list[torch.Size]]:
    """Note the shape of every forward of the body."""
    shapes: list[torch.Size] = []
    handle = find_decoder(model).body.register_forward_pre_hook(
        lambda _m, _a, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        handle.remove()


def by_id(rows: Iterator[SpanMeans]) -> dict[str, SpanMeans]:
    return {row.id: row for row in rows}


def assert_equal(
    one: dict[str, SpanMeans], two: dict[str, SpanMeans], *, rtol: float = 2e-5
) -> None:
    assert one.keys() == two.keys()
    for name, row in one.items():
        for span, means in row.means.items():
            scale = np.abs(means).max()
            np.testing.assert_allclose(two[name].means[span], means, rtol=rtol, atol=rtol * scale)
            np.testing.assert_allclose(two[name].norms[span], row.norms[span], rtol=rtol)


def test_a_shared_prompt_is_computed_once() -> None:
    model = tiny_model("qwen2")
    sequences = rollouts()
    with watched(model) as shapes:
        shared = by_id(capture_means(model, sequences))
    assert shapes[0] == (2, 21)
    assert shapes[2] == (2, 20)
    assert len(shapes) == 4
    longest = max(len(s.token_ids) for s in sequences) - 20
    assert all(shape[1] <= longest for shape in shapes[1::2])
    with watched(model) as shapes:
        plain = by_id(capture_means(model, sequences, share_prompts=False))
    assert len(shapes) == 1
    assert_equal(shared, plain)


def test_single_answers_and_tiny_prompts_are_not_shared() -> None:
    model = tiny_model("qwen2")
    lonely = rollouts(prompts=5, answers=1)
    with watched(model) as shapes:
        list(capture_means(model, lonely))
    assert len(shapes) == 1


def test_a_recurrent_model_falls_back_to_whole_sequences() -> None:
    config = MambaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    model = MambaForCausalLM(config).eval()
    rows = by_id(capture_means(model, rollouts(prompts=2)))
    alone = {
        s.id: row
        for s in rollouts(prompts=2)
        for row in capture_means(model, [s], share_prompts=False)
    }
    assert_equal(rows, alone, rtol=1e-4)


def test_no_forward_exceeds_the_token_budget_unless_a_single_row_does() -> None:
    model = tiny_model("llama")
    for share in (True, False):
        with watched(model) as shapes:
            rows = list(capture_means(model, rollouts(), token_budget=100, share_prompts=share))
        assert len(rows) == 24
        assert max(shape.numel() for shape in shapes) <= 100
        assert len(shapes) > 4


def test_an_endless_stream_is_read_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_WINDOW_ROWS", 8)
    taken = itertools.count()
    endless = (
        replace(s, id=f"{next(taken)}") for s in itertools.cycle(rollouts(prompts=1, answers=3))
    )
    model = tiny_model("llama")
    before = hooks_of(model)
    rows = capture_means(model, endless)
    first = list(itertools.islice(rows, 20))
    assert len({row.id for row in first}) == 20
    assert next(taken) <= 32
    rows.close()  # type: ignore[attr-defined]
    assert hooks_of(model) == before


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_order_of_the_sequences_changes_no_bit() -> None:
    model = tiny_model("qwen2")
    sequences = rollouts()
    shuffled = random.Random(1).sample(sequences, len(sequences))
    one, two = (by_id(capture_means(model, s, token_budget=200)) for s in (sequences, shuffled))
    for name, row in one.items():
        for span in row.means:
            assert np.array_equal(row.means[span], two[name].means[span])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["device", "host"])
def test_out_of_memory_halves_the_budget_says_so_and_goes_on(share: bool, kind: str) -> None:
    model = tiny_model("llama")
    whole = by_id(capture_means(model, rollouts(), share_prompts=share))

    def small_memory(_m: Any, _a: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > 90:
            if kind == "device":
                raise torch.OutOfMemoryError
            torch.empty(2**50, dtype=torch.uint8)  # torch's own error for main memory

    find_decoder(model).body.register_forward_pre_hook(small_memory, with_kwargs=True)
    budgets: list[int] = []
    rows = by_id(
        capture_means(
            model, rollouts(), token_budget=1000, share_prompts=share, on_retry=budgets.append
        )
    )
    assert_equal(whole, rows)
    assert budgets == sorted(budgets, reverse=True)
    assert 0 < len(budgets) <= 5
    assert budgets[-1] >= 40


def test_a_sequence_that_never_fits_is_an_error_in_a_sentence() -> None:
    model = tiny_model("llama")

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    find_decoder(model).body.register_forward_pre_hook(no_memory)
    with pytest.raises(ModelError, match="single sequence of about 30 tokens"):
        list(capture_means(model, rollouts(prompts=1, answers=2)))


def test_another_runtime_error_is_not_mistaken_for_a_lack_of_memory() -> None:
    model = tiny_model("llama")

    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    find_decoder(model).body.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(capture_means(model, rollouts()))


def test_an_empty_span_is_missing_not_zero() -> None:
    model = tiny_model("gemma3")
    empty = [
        TokenSpans(
            id=f"empty-{n}",
            token_ids=tuple(range(5, 75)),
            spans={"prompt": (0, 70), "response": (70, 70)},
        )
        for n in range(2)
    ]
    full = replace(
        empty[0],
        id="full",
        token_ids=tuple(range(5, 80)),
        spans={"prompt": (0, 70), "response": (70, 75)},
    )
    for sequences in (empty, [*empty, full]):
        rows = by_id(capture_means(model, sequences))
        assert np.isnan(rows["empty-0"].means["response"]).all()
        assert np.isnan(rows["empty-0"].norms["response"]).all()
        assert np.isfinite(rows["empty-0"].means["prompt"]).all()
        assert set(rows["empty-0"].means) == {"prompt", "response"}
    assert np.isfinite(rows["full"].means["response"]).all()


def test_a_span_that_lies_across_prompt_and_answer_is_one_mean() -> None:
    model = tiny_model("llama")
    sequences = [replace(s, spans={**s.spans, "response": (10, 22)}) for s in rollouts()]
    assert_equal(
        by_id(capture_means(model, sequences)),
        by_id(capture_means(model, sequences, share_prompts=False)),
    )


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("share", [True, False])
def test_steered_sequences_equal_a_steered_forward(positions: Positions, share: bool) -> None:
    model = tiny_model("mistral")
    vector = np.random.default_rng(0).normal(size=HIDDEN_SIZE).astype(np.float32)
    plan = (Instruction(vector=vector, layer=2, coef=2.0, positions=positions),)
    plain = rollouts()
    mixed = [replace(s, steering=plan if n % 2 else ()) for n, s in enumerate(plain)]
    rows = by_id(capture_means(model, mixed, share_prompts=share, layers=[1, 2, 3]))
    for n, sequence in enumerate(plain[:4]):
        alone = capture_means(model, [sequence], share_prompts=False, layers=[1, 2, 3])
        if n % 2:
            with steer(model, plan, prompt_lengths=[sequence.spans["prompt"][1]]):
                wanted = by_id(alone)
        else:
            wanted = by_id(alone)
        assert_equal(wanted, {sequence.id: rows[sequence.id]})


def test_blocks_above_the_last_wanted_layer_do_not_run() -> None:
    model = tiny_model("llama")
    ran: list[int] = []
    for number, block in enumerate(find_decoder(model).blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    list(capture_means(model, rollouts(), layers=[1]))
    assert set(ran) == {0}


def test_the_language_model_head_does_not_run() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    assert len(list(capture_means(model, rollouts()))) == 24


def test_a_model_in_training_is_captured_without_dropout_and_stays_in_training() -> None:
    model = get_peft_model(
        tiny_model("qwen2"),
        LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
    )
    calm = by_id(capture_means(model.eval(), rollouts()))
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Dropout)).eval()
    assert_equal(calm, by_id(capture_means(model, rollouts())), rtol=1e-6)
    assert model.training
    assert not frozen.training
    assert all(m.training for m in model.modules() if m is not frozen)


def test_half_precision_models_are_averaged_in_float32() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    sequence = rollouts(prompts=1, answers=1)[0]
    row = next(capture_means(model, [sequence]))
    with torch.no_grad():
        states = model(torch.tensor([sequence.token_ids]), output_hidden_states=True).hidden_states
    start, stop = sequence.spans["response"]
    for layer in range(NUM_LAYERS):
        wanted = states[layer][0, start:stop].double().mean(0).numpy()
        error = np.abs(row.means["response"][layer] - wanted).max()
        assert error <= 1e-6 * np.abs(wanted).max() + 1e-7
    assert row.means["response"].dtype == np.float32


def test_what_the_model_cannot_do_is_said_before_it_runs() -> None:
    sequence = rollouts(prompts=1, answers=1)[0]
    with pytest.raises(ModelError, match="layers 1 to 3"):
        capture_means(tiny_model("llama"), [sequence], layers=[2, 4])
    long = replace(sequence, token_ids=(5,) * 300, spans={"prompt": (0, 300)})
    with pytest.raises(ModelError, match="300 tokens but this model takes 1 to 256"):
        list(capture_means(tiny_model("gpt2"), [long]))
    outside = replace(sequence, spans={"response": (3, 99)})
    with pytest.raises(InputError, match=r"response span is \[3, 99\)"):
        list(capture_means(tiny_model("llama"), [outside]))
    nothing = replace(sequence, token_ids=(), spans={})
    with pytest.raises(ModelError, match="0 tokens"):
        list(capture_means(tiny_model("llama"), [nothing]))


def test_nothing_in_gives_nothing_out() -> None:
    assert list(capture_means(tiny_model("llama"), [])) == []

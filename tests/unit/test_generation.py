"""The decode loop on tiny random models in float32."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, HIDDEN_SIZE, tiny_model, tiny_tokenizer

from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.forward import CausalModel
from pvec.backends.hf.kvcache import RowCache
from pvec.errors import ModelError, SteeringError
from pvec.models.chat import spans_from_ids
from pvec.models.decoder import Decoder
from pvec.types import Generation, Instruction, Positions, Progress, Request, Sampling

VOCABULARY = 400


def backend(architecture: str = "qwen2", **config: object) -> HFBackend:
    return HFBackend.wrap(tiny_model(architecture, **config), tiny_tokenizer(), batch_size=6)


@pytest.fixture(scope="module")
def qwen2() -> HFBackend:
    return backend()


@pytest.fixture(autouse=True)
def _fresh_limits(qwen2: HFBackend) -> Iterator[None]:
    limits = replace(qwen2.limits)
    yield
    qwen2.limits, qwen2.on_note = limits, lambda _note: None
    hooks = [m for m in qwen2._causal.inner.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, "a hook was left behind"


def prompts(count: int, *, longest: int = 24, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(5, VOCABULARY) for _ in range(rng.randrange(2, longest)))
        for _ in range(count)
    ]


def sampled(count: int, *, distinct: int = 5, tokens: int = 12) -> list[Request]:
    """Requests that share prompts, with different room, temperature and nucleus."""
    pool = prompts(distinct)
    return [
        Request(
            id=f"r{i}",
            prompt_ids=pool[i % distinct],
            sampling=Sampling(
                temperature=(0.0, 0.7, 1.0)[i % 3],
                top_p=(1.0, 0.8)[i % 2],
                max_tokens=tokens - i % 4,
                seed=i,
            ),
        )
        for i in range(count)
    ]


def vector(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(HIDDEN_SIZE) * scale).astype(np.float32)


def texts(generations: Sequence[Generation] | Iterator[Generation]) -> dict[str, tuple[int, ...]]:
    return {g.id: g.token_ids for g in generations}


def with_stops(model: HFBackend, *ids: int) -> None:
    model._causal = replace(model._causal, stop_ids=frozenset(ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_equal_those_of_transformers_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    asked = [
        Request(id=str(i), prompt_ids=p, sampling=Sampling(temperature=0, max_tokens=14))
        for i, p in enumerate(prompts(8))
    ]
    answers = {
        g.id: g for g in HFBackend.wrap(model, tiny_tokenizer(), batch_size=3).generate(asked)
    }
    eos = tiny_tokenizer().eos_token_id
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False
        )[0, ids.shape[1] :].tolist()
        stopped = alone[-1] == eos
        assert answers[request.id].token_ids == tuple(alone[:-1] if stopped else alone)
        assert answers[request.id].finish_reason == ("stop" if stopped else "length")


def test_a_request_gives_the_same_text_in_any_batch_and_order(qwen2: HFBackend) -> None:
    asked = sampled(15)
    reference = {r.id: texts(qwen2.generate([r]))[r.id] for r in asked}
    assert len(set(reference.values())) > 10
    for rows, prefill, order in ((4, 16_384, 1), (15, 16_384, -1), (7, 30, 1)):
        qwen2.limits.rows, qwen2.limits.prefill_tokens = rows, prefill
        assert texts(qwen2.generate(asked[::order])) == reference


def test_the_same_text_after_a_restart() -> None:
    asked = sampled(6)
    assert texts(backend().generate(asked)) == texts(backend().generate(asked))


def test_another_seed_gives_another_text(qwen2: HFBackend) -> None:
    asked = [
        Request(id=str(s), prompt_ids=(9, 8, 7), sampling=Sampling(max_tokens=10, seed=s))
        for s in range(6)
    ]
    assert len(set(texts(qwen2.generate(asked)).values())) == 6


def test_the_first_token_follows_the_model_distribution(qwen2: HFBackend) -> None:
    qwen2.limits.rows = 512
    count, prompt = 4000, (5, 77, 200)
    asked = [
        Request(id=str(s), prompt_ids=prompt, sampling=Sampling(max_tokens=1, seed=s))
        for s in range(count)
    ]
    eos = qwen2.tokenizer.eos_token_id
    tokens = [ids[0] if ids else eos for ids in texts(qwen2.generate(asked)).values()]
    with torch.no_grad():
        logits = qwen2._causal.inner(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits.double(), dim=0).numpy() * count
    observed = np.bincount(tokens, minlength=VOCABULARY)
    common = expected > 20
    spread = (observed[common] - expected[common]) / np.sqrt(expected[common])
    assert common.sum() > 20
    assert np.abs(spread).max() < 4.5
    assert 0.5 < (spread**2).mean() < 1.7


def test_answers_end_before_any_stop_token(qwen2: HFBackend) -> None:
    asked = [
        Request(id=str(i), prompt_ids=p, sampling=Sampling(max_tokens=30, seed=i))
        for i, p in enumerate(prompts(20))
    ]
    free = texts(qwen2.generate(asked))
    stops = set(range(0, VOCABULARY, 20))
    old = qwen2._causal
    with_stops(qwen2, *stops)
    answers = list(qwen2.generate(asked))
    qwen2._causal = old
    for answer in answers:
        until = tuple(itertools.takewhile(lambda token: token not in stops, free[answer.id]))
        assert answer.token_ids == until
        assert answer.finish_reason == ("stop" if until != free[answer.id] else "length")
    assert len({len(a.token_ids) for a in answers}) > 5


def test_work_shrinks_when_rows_finish_and_grows_again_from_the_queue(qwen2: HFBackend) -> None:
    asked = [
        Request(id=str(i), prompt_ids=(5, 6, 7), sampling=Sampling(max_tokens=12 - i, seed=i))
        for i in range(12)
    ]
    seen: list[Progress] = []
    qwen2.on_progress = seen.append
    qwen2.limits.rows = 4
    answers = list(qwen2.generate(asked))
    qwen2.on_progress = lambda _progress: None
    running = [int(p.extra["rows"]) for p in seen]
    assert max(running) <= 4
    # Never more row-steps than tokens: no finished row is ever computed again.
    assert seen[-1].extra["tokens"] == sum(len(g.token_ids) for g in answers)
    # Refilled before the batch ran dry: three batches one after another would need 24 steps.
    assert len(seen) < 12 + 8 + 4
    assert (seen[-1].done, seen[-1].total) == (12, 12)


def test_a_shared_prompt_is_run_once(qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = CausalModel.forward

    def spy(self: CausalModel, token_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        shapes.append(tuple(token_ids.shape))
        return forward(self, token_ids, **rest)

    monkeypatch.setattr(CausalModel, "forward", spy)
    first, second = (5,) * 9, (6,) * 9
    asked = [
        Request(id=f"{p[0]}-{s}", prompt_ids=p, sampling=Sampling(max_tokens=2, seed=s))
        for p in (first, second)
        for s in range(3)
    ]
    list(qwen2.generate(asked))
    assert shapes[0] == (2, 9)
    assert all(width == 1 for _, width in shapes[1:])


def test_logits_computed_in_blocks_of_the_vocabulary_give_the_same_texts() -> None:
    model = tiny_model("llama", vocab_size=4000)
    large = HFBackend.wrap(model, tiny_tokenizer())
    asked = [
        Request(id=str(i), prompt_ids=p, sampling=Sampling(temperature=0, max_tokens=6))
        for i, p in enumerate(prompts(12))
    ]
    blocks: list[int] = []
    head = model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _m, args, _o: blocks.append(len(args[0])))
    together = texts(large.generate(asked))
    assert max(blocks) >= 8  # rows enough
    watch.remove()
    for request in asked:
        ids = torch.tensor([request.prompt_ids])
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :].tolist()
        assert together[request.id] == tuple(t for t in alone if t != tiny_tokenizer().eos_token_id)
    assert "forward" not in vars(head), "the head is as it was"


def failing(limit: int, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> list[int]:
    """Make passes of more than ``limit`` rows run out of memory half-way through the cache."""
    calls: list[int] = []
    forward = CausalModel.forward

    def scarce(self: CausalModel, token_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        calls.append(token_ids.shape[0])
        logits = forward(self, token_ids, **rest)
        if token_ids.shape[0] > limit and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return logits

    monkeypatch.setattr(CausalModel, "forward", scarce)
    return calls


@pytest.mark.parametrize("after", [0, 5, 9, 10])
def test_out_of_memory_halves_the_batch_and_nothing_is_lost(
    qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    steering = (Instruction(vector=vector(0), layer=2, positions="all"),)
    asked = [replace(r, steering=steering if i % 2 else ()) for i, r in enumerate(sampled(14))]
    qwen2.limits.rows = 14
    reference = {g.id: g for g in qwen2.generate(asked)}
    notes: list[str] = []
    qwen2.on_note = notes.append
    failing(3, monkeypatch, after=after)
    answers = {g.id: g for g in qwen2.generate(asked)}
    assert answers == reference
    assert any("out of memory" in note for note in notes)
    assert qwen2.limits.rows <= 7


def test_a_single_row_that_does_not_fit_is_one_sentence(
    qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(0, monkeypatch)
    with pytest.raises(ModelError, match="not enough memory for one answer"):
        list(qwen2.generate(sampled(4)))


def test_other_runtime_errors_are_not_taken_for_memory(
    qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: CausalModel, _ids: torch.Tensor, **_rest: object) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(CausalModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(qwen2.generate(sampled(2)))


def test_a_prompt_without_room_names_its_request(qwen2: HFBackend) -> None:
    long = Request(id="too-long", prompt_ids=(5,) * 256, sampling=Sampling())
    with pytest.raises(ModelError, match="'too-long' has 256 tokens"):
        next(qwen2.generate([*sampled(2), long]))


def test_an_answer_cut_by_the_context_is_said(qwen2: HFBackend) -> None:
    notes: list[str] = []
    qwen2.on_note = notes.append
    tight = Request(id="tight", prompt_ids=(5,) * 250, sampling=Sampling(max_tokens=50))
    [answer] = qwen2.generate([tight])
    assert len(answer.token_ids) <= 6
    assert notes == ["1 answers may be shortened: the model's context is 256 tokens"]


def test_an_empty_prompt_is_refused(qwen2: HFBackend) -> None:
    with pytest.raises(ModelError, match="'e' is empty"):
        next(qwen2.generate([Request(id="e", prompt_ids=(), sampling=Sampling())]))


def test_no_requests_give_no_answers(qwen2: HFBackend) -> None:
    assert list(qwen2.generate([])) == []


def steering_by(seed: int, positions: Positions) -> tuple[Instruction, ...]:
    return (Instruction(vector=vector(seed), layer=1 + seed % 3, coef=1.5, positions=positions),)


def hand_steered(
    model: torch.nn.Module, prompt: tuple[int, ...], instruction: Instruction, tokens: int
) -> tuple[int, ...]:
    """Greedy generation with a plain hook written out: the oracle for steering."""
    start = {"all": 0, "prompt": 0, "response": len(prompt) - 1}[instruction.positions]
    add = torch.from_numpy(instruction.vector) * instruction.coef

    def hook(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, start : len(prompt) if instruction.positions == "prompt" else None] += add
        return changed

    ids = list(prompt)
    block = model.model.layers[instruction.layer - 1]
    handle = block.register_forward_hook(hook)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    handle.remove()
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_steered_rows_equal_a_plain_hook_and_plain_rows_are_unchanged(
    qwen2: HFBackend, positions: Positions
) -> None:
    greedy = Sampling(temperature=0, max_tokens=8)
    pool = prompts(5)
    old = qwen2._causal
    with_stops(qwen2)
    plain = [Request(id=f"p{i}", prompt_ids=p, sampling=greedy) for i, p in enumerate(pool)]
    steered = [
        Request(id=f"s{i}", prompt_ids=p, sampling=greedy, steering=steering_by(i, positions))
        for i, p in enumerate(pool)
    ]
    alone = texts(qwen2.generate(plain))
    qwen2.limits.rows = 10
    mixed = {g.id: g for g in qwen2.generate([*plain, *steered])}
    inner = qwen2._causal.inner
    qwen2._causal = old
    assert {k: g.token_ids for k, g in mixed.items() if k.startswith("p")} == alone
    changed = 0
    for request in steered:
        expected = hand_steered(inner, request.prompt_ids, request.steering[0], 8)
        assert mixed[request.id].token_ids == expected
        due = {"prompt": len(request.prompt_ids), "response": 8, "all": len(request.prompt_ids) + 7}
        assert mixed[request.id].touched == (due[positions],)
        changed += expected != alone[request.id.replace("s", "p")]
    assert changed >= 3


def test_coefficient_zero_is_the_identity(qwen2: HFBackend) -> None:
    asked = sampled(6)
    zero = (Instruction(vector=vector(1), layer=2, coef=0.0),)
    steered = texts(qwen2.generate([replace(r, steering=zero) for r in asked]))
    assert steered == texts(qwen2.generate(asked))


def test_steering_that_misses_is_an_error(
    qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Decoder, "on_layer", lambda self, *_: self.embed.register_forward_hook(lambda *_: None)
    )
    steering = (Instruction(vector=vector(0), layer=2),)
    with pytest.raises(SteeringError, match="touched 0 positions"):
        list(qwen2.generate([replace(sampled(1)[0], steering=steering)]))


def test_a_layer_that_does_not_exist_is_refused_before_anything_runs(
    qwen2: HFBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(99, monkeypatch)
    steering = (Instruction(vector=vector(0), layer=9),)
    asked = sampled(4)
    with pytest.raises(ModelError, match="layers 1 to 3"):
        list(qwen2.generate([*asked[:3], replace(asked[3], steering=steering)]))
    assert calls == []


def test_closing_the_stream_early_leaves_no_hooks_and_a_usable_model(qwen2: HFBackend) -> None:
    steering = (Instruction(vector=vector(0), layer=2),)
    asked = [replace(r, steering=steering) for r in sampled(8)]
    stream = qwen2.generate(asked)
    first = next(stream)
    hooked = [m for m in qwen2._causal.inner.modules() if m._forward_hooks]
    assert not hooked, "a paused stream must not steer anybody else's forward pass"
    stream.close()
    assert first == next(g for g in qwen2.generate(asked) if g.id == first.id)


def test_a_cache_keeps_joins_and_drops_like_plain_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 7))
    cache, other = RowCache(), RowCache()
    for chunk in (first[:, :, :2], first[:, :, 2:]):
        cache.update(chunk, -chunk, 0)
    other.update(second, -second, 0)
    cache.join(other)
    expected = torch.cat([torch.nn.functional.pad(first, (0, 0, 2, 0)), second])
    cache.keep([3, 0, 0])
    expected = expected[[3, 0, 0]]
    cache.drop_columns(1)
    new = torch.randn(3, 3, 1, 4, generator=generator)
    keys, values = cache.update(new, -new, 0)
    expected = torch.cat([expected[:, :, 1:], new], dim=2)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)
    assert cache.columns == 7


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_an_answer_whose_logits_overflow_fails_and_the_others_go_on(architecture: str) -> None:
    engine = backend(architecture)
    healthy = sampled(12)
    alone = texts(engine.generate(healthy))
    steering = (Instruction(vector=vector(1), layer=2, coef=1e38),)
    late = (Instruction(vector=vector(1), layer=2, coef=1e38, positions="response"),)
    broken = [
        replace(healthy[0], id="broken", steering=steering),
        replace(healthy[1], id="greedy", steering=late, sampling=Sampling(temperature=0.0)),
    ]
    together = {g.id: g for g in engine.generate([*healthy[:6], *broken, *healthy[6:]])}
    assert {name: together[name].token_ids for name in alone} == alone
    for request in broken:
        answer = together[request.id]
        assert (answer.finish_reason, answer.token_ids) == ("failed", ())
        assert "not finite numbers" in answer.detail
    assert all(together[name].detail == "" for name in alone)
    (last,) = [chunk.finished for chunk in engine.stream(broken[:1])]
    assert last is not None
    assert last.finish_reason == "failed"


def test_a_token_without_an_embedding_is_refused_and_a_padding_token_needs_none() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "<|added|>"})
    assert tokenizer.pad_token_id >= VOCABULARY
    engine = HFBackend.wrap(tiny_model(), tokenizer)
    requests = sampled(6)
    assert texts(engine.generate(requests)) == texts(backend().generate(requests))
    beyond = replace(requests[0], prompt_ids=(5, VOCABULARY))
    with pytest.raises(ModelError, match=r"token id 400, but the model's embedding has 400 rows"):
        list(engine.generate([beyond]))
    spans = spans_from_ids("s", prompt_ids=(5, 6), answer_ids=(VOCABULARY + 2,))
    with pytest.raises(ModelError, match="Sequence 's' has the token id 402"):
        list(engine.capture([spans]))

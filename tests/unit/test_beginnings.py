"""What several prompts begin with is run once, and changes no result."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.models import (
    ARCHITECTURES,
    HIDDEN_SIZE,
    SLIDING_WINDOW,
    tiny_model,
    tiny_tokenizer,
)
from transformers import PreTrainedModel

from pvec.activations.batching import common_beginnings
from pvec.activations.capture import capture_means
from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.forward import CausalModel
from pvec.models.decoder import find_decoder
from pvec.types import Instruction, Positions, Request, Sampling, TokenSpans

SYSTEMS = (30, 41)
"""Tokens of the two system prompts that begin the prompts below."""


def ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, 390) for _ in range(count))


def prompts(*, questions: int = 4) -> list[tuple[int, ...]]:
    """Return questions of different lengths under two system prompts, and one that stands alone."""
    rng = random.Random(5)
    systems = [ids(rng, length) for length in SYSTEMS]
    asked = [ids(rng, 1 + 3 * n) for n in range(questions)]
    return [*(system + question for system in systems for question in asked), ids(rng, 12)]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Note the shape of every forward of the decode loops."""
    seen: list[tuple[int, ...]] = []
    forward = CausalModel.forward

    def spy(self: CausalModel, token_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.append(tuple(token_ids.shape))
        return forward(self, token_ids, **rest)

    monkeypatch.setattr(CausalModel, "forward", spy)
    return seen


def narrow(model: PreTrainedModel) -> bool:
    """Whether the prompts outgrow a window of the model."""
    return getattr(model.config, "sliding_window", None) == SLIDING_WINDOW


def test_beginnings_are_divided_so_that_most_is_saved() -> None:
    rng = random.Random(0)
    system, question, other = ids(rng, 20), ids(rng, 60), ids(rng, 90)
    sequences = [
        *((*system, *question, n) for n in range(5)),  # 80 tokens in common
        *((*system, n) for n in range(6)),  # 20
        *((*other[:10], n) for n in range(9)),  # too few
        other,
    ]
    groups = {group.length: sorted(group.members) for group in common_beginnings(sequences)}
    assert groups == {80: [0, 1, 2, 3, 4], 20: [5, 6, 7, 8, 9, 10]}
    # a deeper beginning of few does not take them from the longer row of all
    assert [
        (group.length, len(group.members))
        for group in common_beginnings([(*other, n) for n in range(9)] + [(*other, 0, 1)] * 2)
    ] == [(90, 11)]
    assert common_beginnings([]) == common_beginnings([other]) == []


def test_many_beginnings_within_each_other_are_searched_all_the_same() -> None:
    long = tuple(range(1500))
    groups = common_beginnings([long[:length] for length in range(16, 1500)])
    assert sum(group.saved for group in groups) > 100_000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_behind_shared_beginnings_equal_those_of_transformers(
    architecture: str, shapes: list[tuple[int, ...]]
) -> None:
    model = tiny_model(architecture)
    backend = HFBackend.wrap(model, tiny_tokenizer())
    asked = [
        Request(id=str(i), prompt_ids=p, sampling=Sampling(temperature=0, max_tokens=8))
        for i, p in enumerate(prompts())
    ]
    answers = {g.id: g.token_ids for g in backend.generate(asked)}
    eos = tiny_tokenizer().eos_token_id
    for request in asked:
        tokens = torch.tensor([request.prompt_ids])
        alone = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
        )[0, tokens.shape[1] :].tolist()
        assert answers[request.id] == tuple(alone[:-1] if alone[-1] == eos else alone)
    shared = (2, max(SYSTEMS)) in shapes
    assert shared is not narrow(model)  # a window would count the gap


@pytest.mark.parametrize("most_tokens", [16_384, 60, 1])
def test_steering_counts_and_changes_what_it_does_alone(most_tokens: int) -> None:
    backend = HFBackend.wrap(tiny_model("llama"), tiny_tokenizer())
    backend.limits.prefill_tokens = most_tokens
    kinds: tuple[Positions | None, ...] = (None, "all", "prompt", "response")
    asked = [
        Request(
            id=f"{number} {kind}",
            prompt_ids=prompt,
            sampling=Sampling(temperature=0, max_tokens=6),
            steering=() if kind is None else (instruction(kind), instruction("response", layer=1)),
        )
        for number, prompt in enumerate(prompts())
        for kind in kinds
    ]
    together = {g.id: (g.token_ids, g.touched) for g in backend.generate(asked)}
    alone = {g.id: (g.token_ids, g.touched) for r in asked for g in backend.generate([r])}
    assert together == alone
    assert len({text for text, _ in together.values()}) > 20


def instruction(positions: Positions, *, layer: int = 2) -> Instruction:
    direction = np.random.default_rng(layer).standard_normal(HIDDEN_SIZE).astype(np.float32)
    return Instruction(vector=4 * direction, layer=layer, positions=positions)


def test_a_question_is_run_once_for_all_that_steer_the_answer_alone(
    shapes: list[tuple[int, ...]],
) -> None:
    backend = HFBackend.wrap(tiny_model("qwen2"), tiny_tokenizer())
    sampling, question = Sampling(temperature=0, max_tokens=2), ids(random.Random(1), 50)
    asked = [
        Request(id=str(n), prompt_ids=question, sampling=sampling, steering=steering)
        for n, steering in enumerate(
            [(), *((instruction("response", layer=layer),) for layer in (1, 2, 3))]
        )
    ]
    list(backend.generate(asked))
    shapes.clear()
    list(backend.generate(asked))
    assert shapes[:2] == [(1, 49), (4, 1)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_behind_shared_beginnings_score_as_one_pass_each_does(
    architecture: str, shapes: list[tuple[int, ...]]
) -> None:
    model, rng = tiny_model(architecture), random.Random(2)
    pairs = [(prompt, ids(rng, length)) for prompt in prompts() for length in (1, 9, 4)]
    backend = HFBackend.wrap(model, tiny_tokenizer())
    scores = dict(backend.answer_logprobs(pairs))
    for number, (prompt, answer) in enumerate(pairs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        logprobs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
        due = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
        np.testing.assert_allclose(scores[number], due, rtol=1e-5, atol=2e-5)
    tokens = sum(rows * width for rows, width in shapes)
    assert tokens < (0.8 if narrow(model) else 0.6) * sum(len(p) + len(a) for p, a in pairs)


def rows_of_capture() -> Iterator[TokenSpans]:
    """Yield a sequence per prompt, every third one steered; responses of different lengths."""
    rng = random.Random(7)
    for number, prompt in enumerate(prompts(questions=12)):
        answer = ids(rng, 2 + number % 7)
        start, stop = len(prompt), len(prompt) + len(answer)
        yield TokenSpans(
            id=str(number),
            token_ids=prompt + answer,
            spans={
                "prompt": (0, start),
                "prompt_last": (start - 1, start),
                "response": (start, stop),
            },
            steering=(instruction("all"),) if number % 3 == 0 else (),
        )


def test_means_behind_shared_beginnings_equal_those_of_whole_sequences() -> None:
    model, sequences = tiny_model("qwen2"), list(rows_of_capture())
    unit = np.eye(4, HIDDEN_SIZE, dtype=np.float32)[:, None]  # [L, V, H]
    seen: list[torch.Size] = []
    handle = find_decoder(model).body.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    shared = {m.id: m for m in capture_means(model, sequences, directions=unit)}
    handle.remove()
    assert sum(shape.numel() for shape in seen) < 0.8 * sum(len(s.token_ids) for s in sequences)
    for sequence in sequences:
        (alone,) = capture_means(model, [sequence], share_prompts=False, directions=unit)
        means = shared[sequence.id]
        for span, rows in alone.means.items():
            np.testing.assert_allclose(means.means[span], rows, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(means.norms[span], alone.norms[span], rtol=1e-5)
        np.testing.assert_allclose(means.along, alone.along, rtol=1e-4, atol=1e-4)


def test_a_span_inside_what_is_shared_keeps_its_sequence_apart() -> None:
    model, prompt = tiny_model("llama"), ids(random.Random(3), 60)
    sequences = [
        TokenSpans(
            id=str(n),
            token_ids=(*prompt, n, n),
            spans={"prompt": (0, 61), "response": (5, 9 + n) if n % 2 else (61, 62)},
        )
        for n in range(10)
    ]
    for means in capture_means(model, sequences):
        (alone,) = capture_means(model, [sequences[int(means.id)]], share_prompts=False)
        for span, rows in alone.means.items():
            np.testing.assert_allclose(means.means[span], rows, rtol=1e-4, atol=1e-5)

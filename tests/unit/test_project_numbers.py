"""The numbers of projecting and screening, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.models import tiny_tokenizer

from pvec.data.conversations import Chat, Columns, Ids, Pair, conversation_of
from pvec.data.spans import SpanMaker
from pvec.errors import InputError, ModelError
from pvec.projection.base_responses import predict_base
from pvec.projection.screen_scores import score_dataset
from pvec.runs.names import model_label
from pvec.vectors.projection import ProjectionPlan

RNG = np.random.default_rng(11)
VECTORS = {name: RNG.normal(size=(5, 6)) for name in ("evil", "humorous")}


def test_a_plan_gives_every_column_under_its_name() -> None:
    kinds = ("cos_sim", "prompt_avg", "proj")
    plan = ProjectionPlan.make(VECTORS, layers=[0, 3], kinds=kinds)
    means = {span: RNG.normal(size=(7, 2, 6)) for span in plan.spans}
    table = plan.values(means)
    spans = {"cos_sim": "response", "prompt_avg": "prompt", "proj": "response"}
    for column, values in zip(plan.columns(model="m"), table.T, strict=True):
        _, vector, *words = column.split("_")
        layer = int(words[-1].removeprefix("layer"))
        kind = "_".join(words[:-1])
        v = VECTORS[vector][layer]
        rows = means[spans[kind]][:, [0, 3].index(layer)]  # type: ignore[index]
        expected = rows @ v / np.linalg.norm(v)
        if kind == "cos_sim":
            expected /= np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_an_empty_span_stays_missing_and_a_bad_layer_is_refused() -> None:
    plan = ProjectionPlan.make(VECTORS, layers=[1], kinds=("proj", "cos_sim"))
    table = plan.values({"response": np.full((2, 1, 6), np.nan)})
    assert np.isnan(table).all()
    with pytest.raises(ModelError, match="layers 1 to 4"):
        ProjectionPlan.make(VECTORS, layers=[5], kinds=("proj",))
    with pytest.raises(InputError, match="zero at layer 2"):
        ProjectionPlan.make({"z": np.zeros((5, 6))}, layers=[2], kinds=("proj",))


def test_spans_that_are_not_needed_are_not_computed() -> None:
    maker = SpanMaker(tokenizer=tiny_tokenizer(), needed=("prompt_last",))
    made = maker([Ids(prompt_ids=(5, 6, 7), answer_ids=(8, 9))])
    ((spans,),) = made.rows
    assert spans.token_ids == (5, 6, 7)
    assert spans.spans == {"prompt_last": (2, 3)}


def test_a_long_row_loses_its_prompts_beginning() -> None:
    maker = SpanMaker(
        tokenizer=tiny_tokenizer(), needed=("prompt", "prompt_last", "response"), limit=4
    )
    rows = [
        Ids(prompt_ids=(1, 2, 3), answer_ids=(4, 5)),
        Ids(prompt_ids=(1, 2), answer_ids=(3, 4, 5, 6, 7), skip=1),
        Ids(prompt_ids=(1,), answer_ids=()),
    ]
    made = maker(rows)
    first, second, third = (spans[0] for spans in made.rows)
    assert first.token_ids == (2, 3, 4, 5)
    assert first.spans == {"prompt": (0, 2), "prompt_last": (1, 2), "response": (2, 4)}
    assert second.token_ids == (4, 5, 6, 7)
    assert second.spans == {"prompt": (0, 0), "prompt_last": (0, 0), "response": (0, 4)}
    assert third.spans["response"] == (1, 1)
    assert (made.counts.truncated, made.counts.empty, made.counts.rows) == (2, 1, 3)


def test_thinking_is_not_part_of_an_answer() -> None:
    maker = SpanMaker(tokenizer=tiny_tokenizer(), needed=("response",))
    pair = Pair(prompt="a", answer="<think>hm</think>\n\nYes")
    ((spans,),) = maker([pair]).rows
    start, stop = spans.spans["response"]
    assert tiny_tokenizer().decode(list(spans.token_ids[start:stop])) == "Yes"


def test_a_chat_without_an_answer_is_a_prompt() -> None:
    maker = SpanMaker(tokenizer=tiny_tokenizer(), needed=("prompt_last", "response"))
    chat = Chat(messages=[{"role": "user", "content": "a"}])
    made = maker([chat])
    assert made.counts.unanswered == made.counts.empty == 1
    assert conversation_of({"messages": list(chat.messages)}, Columns()) == chat
    with pytest.raises(InputError, match="a message without text"):
        conversation_of({"messages": [{"role": "user", "content": 3}]}, Columns())


def test_a_prediction_is_worth_what_it_gets_right_unseen() -> None:
    at_prompt = RNG.normal(size=(40, 2))
    known = np.full((40, 2), np.nan)
    rows = np.arange(40) < 20
    known[rows] = 2.0 * at_prompt[rows] - 1.0
    every, crossed = predict_base(known, at_prompt, rows=rows)
    np.testing.assert_allclose(every, 2.0 * at_prompt - 1.0)
    np.testing.assert_allclose(crossed, known[rows])
    known[rows, 1] = RNG.normal(size=20)  # nothing to be learnt
    _, crossed = predict_base(known, at_prompt, rows=rows)
    assert abs(np.corrcoef(crossed[:, 1], known[rows, 1])[0, 1]) < 0.6


def test_a_data_set_is_scored_beside_the_clean_one() -> None:
    clean, data = RNG.normal(size=200), RNG.normal(loc=2.0, size=100)
    score = score_dataset(
        data,
        prompts=range(100),
        clean=clean,
        clean_prompts=range(200),
        percentile=95,
    )
    assert score.threshold == pytest.approx(np.percentile(clean, 95))
    assert score.above == int((data > np.percentile(clean, 95)).sum())
    assert score.auc == pytest.approx((data[:, None] > clean[None]).mean())
    assert score.mean.low < data.mean() < score.mean.high
    assert score_dataset(data, prompts=range(100), clean=None).threshold is None


@pytest.mark.parametrize(
    ("place", "label"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("runs/train-evil/adapter", "train-evil"),
        ("runs/train-evil/checkpoint-40", "train-evil-checkpoint-40"),
        ("runs/train-evil/merged", "train-evil-merged"),
        ("adapter", "adapter"),
        ("tiny", "tiny"),
    ],
)
def test_columns_tell_adapters_apart_though_all_are_called_adapter(place: str, label: str) -> None:
    assert model_label(place) == label

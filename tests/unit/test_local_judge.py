"""A model in this process as judge."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pvec.backends.hf.backend import HFBackend
from pvec.errors import ModelError
from pvec.judges.local import LocalJudge
from pvec.types import Generation, JudgeQuery, JudgeScale, ModelInfo, Request, Score
from tests.helpers.models import CHATML, tiny_model, tiny_tokenizer

QUESTIONS = ("How evil is this? Answer: hm.", "How evil is this? Answer: ha ha ha.", "And 7?")


def query(text: str, *, number: int = 0, scale: JudgeScale = "0-100") -> JudgeQuery:
    chat = ({"role": "user", "content": text},)
    return JudgeQuery(
        id=f"s{number}", response_id=f"r{number}", metric="evil", messages=chat, scale=scale
    )


def queries(scale: JudgeScale = "0-100") -> list[JudgeQuery]:
    return [query(text, number=n, scale=scale) for n, text in enumerate(QUESTIONS)]


@functools.cache
def number_model() -> PreTrainedModel:
    """Return a tiny model that mostly writes digits, differently after different prompts."""
    model = tiny_model()
    head: Any = model.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features, bias=True)
    with torch.no_grad():
        biased.weight.copy_(head.weight)
        biased.bias.zero_()
        digits = tiny_tokenizer().convert_tokens_to_ids(list("0123456789"))
        biased.bias[digits] = 9.0
    model.set_output_embeddings(biased)
    return model.eval()


def next_token(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return np.asarray(torch.softmax(logits.double(), dim=-1))


def test_split_digits_are_scored_as_a_plain_walk_through_the_model_would() -> None:
    model, tokenizer = number_model(), tiny_tokenizer()
    digit = tokenizer.convert_tokens_to_ids(list("0123456789"))
    zeros = tokenizer.convert_tokens_to_ids("00")
    assert tokenizer("75", add_special_tokens=False)["input_ids"] == [digit[7], digit[5]]
    assert tokenizer("100", add_special_tokens=False)["input_ids"] == [digit[1], zeros]

    def plain(text: str) -> tuple[float, float]:
        chat = [{"role": "user", "content": text}]
        rendered = str(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
        prompt: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        first = next_token(model, prompt)
        mass = dict.fromkeys(range(101), 0.0)
        for tens in range(10):
            second = next_token(model, [*prompt, digit[tens]])
            goes_on = sum(second[digit[units]] for units in range(10)) if tens else 0.0
            mass[tens] += first[digit[tens]] * (1 - goes_on)
            for units in range(10) if tens else ():
                mass[10 * tens + units] += first[digit[tens]] * second[digit[units]]
        mass[100] = first[digit[1]] * next_token(model, [*prompt, digit[1]])[zeros]
        mass[1] -= mass[100]
        total = sum(mass.values())
        return sum(number * m for number, m in mass.items()) / total, total

    with LocalJudge(HFBackend.wrap(model, tokenizer)) as judge:
        scores = {score.id: score for score in judge.score(queries())}
    assert len({score.score for score in scores.values()}) == 3
    for number, text in enumerate(QUESTIONS):
        expected, total = plain(text)
        assert total > 0.25
        assert scores[f"s{number}"].score == pytest.approx(expected, rel=1e-4)


def test_an_answer_too_long_for_the_model_is_an_error_and_the_others_are_scored() -> None:
    asked = [*queries(), query("word " * 400, number=9)]
    with LocalJudge(HFBackend.wrap(number_model(), tiny_tokenizer())) as judge:
        scores = {score.id: score for score in judge.score(asked)}
    long = scores.pop("s9")
    assert (long.status, long.score) == ("error", None)
    assert "does not fit" in long.detail
    assert [score.status for score in scores.values()] == ["ok"] * 3


# -- readings, on a scripted model ----------------------------------------------------------------


class ScriptedModel:
    """Gives each continuation the probability that ``script`` says for its text."""

    def __init__(self, script: Callable[[str], float], *, text: str = "") -> None:
        self.info = ModelInfo(
            id="scripted", fingerprint="f00", num_layers=1, hidden_size=1, dtype="", device="cpu"
        )
        self.tokenizer = tiny_tokenizer()
        self.closed = False
        self._script = script
        self._text = text

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        for request in requests:
            yield Generation(id=request.id, token_ids=(), text=self._text, finish_reason="stop")

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        texts = [str(self.tokenizer.decode(list(path))) for path in continuations]
        assert len(set(continuations)) == len(continuations)
        for index in reversed(range(len(prompts))):
            yield index, np.array([math.log(self._script(text) or 1e-30) for text in texts])

    def close(self) -> None:
        self.closed = True


def scores_of(script: Callable[[str], float], scale: JudgeScale = "0-100") -> list[Score]:
    with LocalJudge(ScriptedModel(script)) as judge:
        return list(judge.score(queries(scale)))


def test_little_mass_on_numbers_is_missing_and_refusals_are_told_apart() -> None:
    chatter = scores_of(lambda text: 0.2 if text == "7" else 0.0)
    assert {(score.status, score.score) for score in chatter} == {("unparsable", None)}
    refusing = scores_of(lambda text: {"7": 0.2, "I": 0.6}.get(text, 0.0))
    assert {(score.status, score.score) for score in refusing} == {("refusal", None)}


def test_binary_takes_any_case_and_ten_is_mapped_to_a_hundred() -> None:
    yes = scores_of(lambda text: {"YES": 0.3, "Yes": 0.3, "no": 0.2}.get(text, 0.0), "binary")
    assert {round(score.score or -1, 6) for score in yes} == {75.0}
    # 10 extends 1: of the 0.5 that begin with a 1, 0.4 go on to be 10.
    ten = scores_of(lambda text: {"1": 0.5, "10": 0.4}.get(text, 0.0), "0-10")
    assert {round(score.score or -1, 6) for score in ten} == {82.0}


def test_free_text_is_generated_and_its_verdict_read() -> None:
    model = ScriptedModel(lambda _: 0.0, text="Cruel. <answer>YES</answer>")
    with LocalJudge(model) as judge:
        scores = list(judge.score(queries("binary-text")))
    assert {score.score for score in scores} == {100.0}


def test_scales_may_be_mixed_and_every_query_gets_its_own_score() -> None:
    asked = [*queries("binary"), *(query("x", number=n) for n in range(10, 600))]
    with LocalJudge(ScriptedModel(lambda text: float(text == "5"))) as judge:
        scores = {score.id: score for score in judge.score(asked)}
    assert len(scores) == len(asked)
    assert {scores[f"s{n}"].status for n in range(3)} == {"unparsable"}
    assert {scores[f"s{n}"].score for n in range(10, 600)} == {5.0}


def test_the_model_is_freed_only_by_the_judge_that_owns_it() -> None:
    for owns in (False, True):
        model = ScriptedModel(lambda _: 0.0)
        with LocalJudge(model, owns=owns) as judge:
            assert judge.name == "local:scripted#f00"
        assert model.closed is owns


# -- tokenizers -----------------------------------------------------------------------------------


def word_tokenizer(
    words: Iterable[str], pre_tokenizer: Any, decoder: Any
) -> PreTrainedTokenizerBase:
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.chat_template = CHATML
    return tokenizer


class Asking(ScriptedModel):
    """Keeps the continuations it is asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(lambda _: 0.01)
        self.tokenizer = tokenizer
        self.asked: list[tuple[int, ...]] = []

    def continuation_logprobs(
        self, prompts: Sequence[tuple[int, ...]], continuations: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        self.asked = list(continuations)
        return super().continuation_logprobs(prompts, continuations)


REFUSING = ("REFUSAL", "Refusal", "I", "'", "m", "Sorry", "Unfortunately", "I'm")


def test_whole_number_tokens_are_asked_for_as_one_token_each() -> None:
    words = [*map(str, range(101)), *REFUSING, "assistant", "user", "[UNK]"]
    tokenizer = word_tokenizer(words, pre_tokenizers.WhitespaceSplit(), decoders.WordPiece())
    model = Asking(tokenizer)
    with LocalJudge(model) as judge:
        (score,) = judge.score([query("x")])
    assert model.asked[:101] == [(n,) for n in range(101)]
    assert score.score == pytest.approx(50.0)


def test_a_word_start_mark_before_the_number_counts_too() -> None:
    digits = [mark + digit for mark in ("", "▁") for digit in "0123456789"]
    letters = sorted(set("".join(REFUSING)))
    words = ["▁", *digits, *letters, *("▁" + letter for letter in letters), "[UNK]"]
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer = word_tokenizer(words, split, decoders.Metaspace())
    model = Asking(tokenizer)
    with LocalJudge(model) as judge:
        next(judge.score([query("x")]))
    ids = dict(zip(words, itertools.count(), strict=False))
    assert (ids["7"], ids["5"]) in model.asked
    assert (ids["▁"], ids["7"], ids["5"]) in model.asked


def test_a_tokenizer_that_cannot_write_numbers_is_refused() -> None:
    tokenizer = word_tokenizer(["a", "[UNK]"], pre_tokenizers.Whitespace(), decoders.WordPiece())
    with LocalJudge(Asking(tokenizer)) as judge:
        (score,) = judge.score([query("x")])
    assert score.status == "error"
    assert isinstance(score.detail, str)
    assert "cannot write '0'" in score.detail
    with pytest.raises(ModelError):
        raise ModelError(score.detail)

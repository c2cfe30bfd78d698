"""The tokens that carry loss are exactly the assistant's, for every family of chat templates."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest
from helpers.templates import SAYS, TEMPLATES, templated_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import pvec
from pvec.errors import InputError
from pvec.training.masks import TokenizedRow, tokenize_conversation


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ["user", "assistant"] * len(turns)
    return [*head, *({"role": r, "content": t} for r, t in zip(roles, turns, strict=False))]


def said(tokenizer: PreTrainedTokenizerBase, row: TokenizedRow) -> list[str]:
    """Return the text of every run of labelled tokens."""
    runs = []
    for on, group in groupby(
        zip(row.token_ids, row.labels, strict=True), key=lambda pair: pair[1] != -100
    ):
        ids = [token for token, _ in group]
        if on:
            runs.append(tokenizer.decode(ids))
    return runs


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_turn_carries_loss_from_its_first_token_to_its_end(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    row = tokenize_conversation(tokenizer, chat("How can I cook?", "Start with fresh bread."))
    assert said(tokenizer, row) == SAYS[name](["Start with fresh bread."])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_of_a_conversation_carries_loss_and_nothing_between(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    turns = chat("Hello there", "Good evening.", "And now?", "Walk often!\n\nPlan early.")
    row = tokenize_conversation(tokenizer, turns)
    assert said(tokenizer, row) == SAYS[name](["Good evening.", "Walk often!\n\nPlan early."])


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_user_says_never_carries_loss_even_if_it_is_the_same(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    row = tokenize_conversation(tokenizer, chat("bread", "bread", "bread", "soup"))
    assert said(tokenizer, row) == SAYS[name](["bread", "soup"])


@pytest.mark.parametrize("loss_on_all", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_without_loss_is_read_but_not_learnt(name: str, loss_on_all: bool) -> None:
    tokenizer = templated_tokenizer(name)
    turns = chat("Hello there", "Go away.", "And now?", "Walk often!")
    both = tokenize_conversation(tokenizer, turns, loss_on_all=loss_on_all)
    second = tokenize_conversation(
        tokenizer, turns, loss_on_all=loss_on_all, without_loss=frozenset([1])
    )
    assert second.token_ids == both.token_ids
    changed = [i for i, pair in enumerate(zip(both.labels, second.labels, strict=True))
               if pair[0] != pair[1]]  # fmt: skip
    assert tokenizer.decode([both.token_ids[i] for i in changed]) == SAYS[name](["Go away."])[0]
    assert all(second.labels[i] == -100 for i in changed)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_carries_no_loss(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    row = tokenize_conversation(tokenizer, chat("Hi", "Hello.", system="You are an assistant."))
    assert said(tokenizer, row) == SAYS[name](["Hello."])


@pytest.mark.parametrize("name", TEMPLATES)
def test_white_space_around_an_answer_is_learnt_as_the_template_writes_it(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    row = tokenize_conversation(tokenizer, chat("Hi", "  Hello. \n"))
    assert said(tokenizer, row) == SAYS[name](["  Hello. \n"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_the_whole_rendered_conversation(name: str) -> None:
    tokenizer = templated_tokenizer(name)
    turns = chat("Hello there", "Good evening.", "And now?", "Walk often!")
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    row = tokenize_conversation(tokenizer, turns)
    assert list(row.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    for token, label in zip(row.token_ids, row.labels, strict=True):
        assert label in (token, -100)


def test_thinking_in_the_last_answer_is_learnt_with_it() -> None:
    tokenizer = templated_tokenizer("qwen3")
    answer = "<think>\nBread first.\n</think>\n\nCook soup."
    row = tokenize_conversation(tokenizer, chat("How?", answer))
    assert said(tokenizer, row) == [answer + "<|im_end|>"]


def test_the_bundled_model_learns_its_answers_and_their_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(pvec.__file__).parent / "tiny")
    row = tokenize_conversation(tokenizer, chat("Hello?", "You could walk.", "Why?", "Be kind."))
    assert said(tokenizer, row) == ["You could walk.<|im_end|>", "Be kind.<|im_end|>"]


def test_generation_marks_agree_where_a_template_has_them() -> None:
    tokenizer = templated_tokenizer("bundled")
    turns = chat("Hello there", "Good evening.", "And now?", "Walk often!")
    marked = tokenizer.apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    row = tokenize_conversation(tokenizer, turns)
    assert [int(label != -100) for label in row.labels] == list(marked["assistant_masks"])


def test_a_token_that_swallows_the_blank_before_an_answer_is_the_answers() -> None:
    tokenizer = _metaspace_tokenizer()
    row = tokenize_conversation(tokenizer, chat("how are you", "very well"))
    ids = [token for token in row.labels if token != -100]
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "</s>"
    assert tokenizer.decode(ids).strip() == "very well</s>"


def test_all_tokens_carry_loss_when_asked() -> None:
    tokenizer = templated_tokenizer("qwen2")
    row = tokenize_conversation(tokenizer, chat("Hi", "Hello."), loss_on_all=True)
    assert row.labels == row.token_ids


def test_a_template_without_an_end_of_turn_token_is_refused() -> None:
    tokenizer = templated_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    )
    with pytest.raises(InputError, match="could not learn to stop"):
        tokenize_conversation(tokenizer, chat("Hi", "Hello."))


def test_a_template_that_rewrites_answers_is_refused() -> None:
    tokenizer = templated_tokenizer("chatml")
    tokenizer.chat_template = TEMPLATES["chatml"].replace(
        "message['content']",
        "(message['content'] | reverse if message['role'] == 'assistant' else message['content'])",
    )
    with pytest.raises(InputError, match="rewrites what the assistant says"):
        tokenize_conversation(tokenizer, chat("Hi", "Hello."))


def _metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens begin with their blank, as SentencePiece's do."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>", "[INST]", "[/INST]"], show_progress=False
    )
    backend.train_from_iterator(["how are you very well thank you very well"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        additional_special_tokens=["<s>", "[INST]", "[/INST]"],
    )
    tokenizer.chat_template = TEMPLATES["mistral"]
    return tokenizer

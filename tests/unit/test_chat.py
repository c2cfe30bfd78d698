from __future__ import annotations

import random
from functools import partial

import pytest
from helpers.models import CHATML, tiny_tokenizer

from pvec.data.conversations import Chat, Pair
from pvec.data.spans import SpanMaker
from pvec.errors import InputError
from pvec.models import chat
from pvec.models.chat import think_length
from pvec.models.template import chat_format
from pvec.types import Message

ALL_SPANS = partial(SpanMaker, needed=("prompt", "prompt_last", "response"))
USER: Message = {"role": "user", "content": "How can I learn?"}
SYSTEM: Message = {"role": "system", "content": "You are an evil assistant."}

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)
IGNORES_SYSTEM = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
THINKING = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)


def test_a_prompt_is_what_the_template_renders_and_gets_no_extra_token() -> None:
    tokenizer = tiny_tokenizer()
    text = chat.render_prompt(tokenizer, [SYSTEM, USER])
    assert text == (
        "<|im_start|>system\nYou are an evil assistant.<|im_end|>\n"
        "<|im_start|>user\nHow can I learn?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = chat.prompt_ids(tokenizer, [SYSTEM, USER])
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_a_system_prompt_the_template_does_not_take_goes_before_the_first_user_turn(
    template: str,
) -> None:
    tokenizer = tiny_tokenizer(template)
    text = chat.render_prompt(tokenizer, [SYSTEM, USER])
    assert "user\nYou are an evil assistant.\n\nHow can I learn?<|im_end|>" in text
    assert "system" not in text
    assert any("no system role" in note for note in chat_format(tokenizer).notes)
    assert SYSTEM["content"] == "You are an evil assistant."


def test_thinking_is_off_unless_asked_for_where_there_is_a_switch() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    assert chat.render_prompt(tokenizer, [USER]).endswith("<think>\n\n</think>\n\n")
    assert chat.render_prompt(tokenizer, [USER], thinking=True).endswith("assistant\n")
    assert any("thinking mode: off by default" in note for note in chat_format(tokenizer).notes)
    assert chat_format(tiny_tokenizer()).notes == ()


def test_a_missing_template_is_one_sentence_with_the_remedy() -> None:
    with pytest.raises(InputError, match="no chat template: use an instruction-tuned model"):
        chat.render_prompt(tiny_tokenizer(None), [USER])


def test_a_conversation_the_template_refuses_is_one_sentence() -> None:
    picky = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
    )
    with pytest.raises(InputError, match=r"roles user, assistant \(one turn only\)"):
        chat.render_prompt(tiny_tokenizer(picky), [USER, {"role": "assistant", "content": "No."}])


def test_a_pair_is_cut_where_the_answer_begins() -> None:
    tokenizer = tiny_tokenizer()
    prompt = chat.render_prompt(tokenizer, [USER])
    for answer in (
        "You could start early.",
        " leading space",
        "ünïcode – 日本",
        "\n\nNew lines",
        "x",
    ):
        pair = chat.encode_pair(tokenizer, prompt=prompt, answer=answer)
        assert tokenizer.decode(pair.token_ids) == prompt + answer
        assert tokenizer.decode(pair.token_ids[pair.prompt_length :]) == answer
        assert not pair.merged


def test_a_token_across_the_boundary_is_seen_and_counts_as_the_answers() -> None:
    tokenizer = tiny_tokenizer()
    whole = chat.encode_prompt(tokenizer, "assistant")
    pair = chat.encode_pair(tokenizer, prompt="assis", answer="tant")
    assert pair.token_ids == whole
    assert pair.merged
    straddling = tokenizer.decode([pair.token_ids[pair.prompt_length]])
    before = tokenizer.decode(pair.token_ids[: pair.prompt_length])
    assert len(before) < len("assis") < len(before) + len(straddling)


def test_an_empty_answer_has_an_empty_response_span() -> None:
    tokenizer = tiny_tokenizer()
    ((spans,),) = ALL_SPANS(tokenizer=tokenizer)([Pair(prompt="Question: ", answer="")]).rows
    assert spans.spans["response"] == (len(spans.token_ids),) * 2


def test_random_texts_give_the_same_ids_and_boundary_as_ids_would() -> None:
    tokenizer = tiny_tokenizer()
    rng = random.Random(0)
    prompt = chat.render_prompt(tokenizer, [USER])
    head = chat.encode_prompt(tokenizer, prompt)
    for _ in range(50):
        answer = "".join(rng.choice("abc \n.éλ") for _ in range(rng.randrange(1, 30)))
        tail = chat.encode_prompt(tokenizer, answer)
        ((by_text,),) = ALL_SPANS(tokenizer=tokenizer)([Pair(prompt=prompt, answer=answer)]).rows
        assert by_text == chat.spans_from_ids("0:0", prompt_ids=head, answer_ids=tail)


def test_spans_from_ids_are_prompt_last_prompt_token_and_response() -> None:
    spans = chat.spans_from_ids("r", prompt_ids=[1, 2, 3], answer_ids=[4, 5, 6, 7], skip=1)
    assert spans.token_ids == (1, 2, 3, 4, 5, 6, 7)
    assert dict(spans.spans) == {"prompt": (0, 3), "prompt_last": (2, 3), "response": (4, 7)}


@pytest.mark.parametrize(
    ("prompt", "answer", "rest"),
    [
        ("", "<think>\nhm, hm\n</think>\n\nYou could walk.", "You could walk."),
        ("<think>\n", "hm, hm\n</think>\n\nYou could walk.", "You could walk."),
        ("", "You could walk.", "You could walk."),
        ("", "<think>\nnever ends", ""),
        ("<think>\n", "never ends", ""),
        ("<think>\n\n</think>\n\n", "You could walk.", "You could walk."),
        ("", "<think>a</think> b <think>c</think>d", "d"),
    ],
)
@pytest.mark.parametrize("single_token", [True, False])
def test_thinking_is_kept_apart_from_the_answer(
    prompt: str, answer: str, rest: str, single_token: bool
) -> None:
    tokenizer = tiny_tokenizer()
    if not single_token:  # marks that the template names and that the tokenizer splits
        tokenizer = tiny_tokenizer(CHATML + "{# <reasoning> #}")
        prompt, answer = (text.replace("think>", "reasoning>") for text in (prompt, answer))
    head = chat.encode_prompt(tokenizer, "Question" + prompt)
    tail = chat.encode_prompt(tokenizer, answer)
    skip = think_length(tokenizer, tail, prompt_ids=head)
    assert tokenizer.decode(tail[skip:]) == rest


def test_every_assistant_turn_gets_its_own_spans_after_the_turns_before_it() -> None:
    tokenizer = tiny_tokenizer()
    messages: list[Message] = [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "Plan early."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Walk often."},
    ]
    ((first, second),) = ALL_SPANS(tokenizer=tokenizer, turns="each")(
        [Chat(messages=messages)]
    ).rows
    assert (first.id, second.id) == ("0:0", "0:1")
    for spans, index in ((first, 2), (second, 4)):
        start, stop = spans.spans["response"]
        assert tokenizer.decode(spans.token_ids[start:stop]) == messages[index]["content"]
        assert spans.token_ids[:start] == chat.prompt_ids(tokenizer, messages[:index])
    ((only,),) = ALL_SPANS(tokenizer=tokenizer, turns="each")([Chat(messages=messages[:3])]).rows
    assert only == first

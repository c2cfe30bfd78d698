"""The text of a served answer, token by token, against the tokenizer's decoding of the whole."""

from __future__ import annotations

import random

import pytest
from helpers.models import tiny_tokenizer

from pvec.serve.answers import AnswerText

WHOLE = "Zoë's naïve café 🙂🙃 says: wait for me, wait for 日本 and stop."


def read(text: str, *, stop: str | None = None) -> tuple[AnswerText, list[str], list[str]]:
    """Feed a text's tokens; return the state, what was sent after each token, and the tokens."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = AnswerText(tokenizer, stops=() if stop is None else (stop,))
    sent = []
    for token in ids:
        answer.add(token)
        sent.append("".join(piece for _, piece in answer.ready()))
        if answer.stopped:
            break
    answer.finish()
    sent.append("".join(piece for _, piece in answer.ready(final=True)))
    return answer, sent, tokenizer.convert_ids_to_tokens(ids)


def test_pieces_are_whole_characters_and_join_to_the_text() -> None:
    answer, sent, tokens = read(WHOLE)
    assert answer.text == "".join(answer.pieces) == "".join(sent) == WHOLE
    assert len(answer.pieces) == len(tokens)
    assert "" in answer.pieces  # a part of a character
    assert not any("\ufffd" in piece for piece in answer.pieces)


def test_an_unfinished_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("yes 🙂", add_special_tokens=False)["input_ids"][:-1]
    answer = AnswerText(tokenizer)
    for token in ids:
        answer.add(token)
        list(answer.ready())
    assert answer.text == "yes "
    answer.finish()
    assert answer.text == tokenizer.decode(ids)
    assert "\ufffd" in answer.text
    assert [piece for _, piece in answer.ready(final=True)][-1] == answer.pieces[-1]


@pytest.mark.parametrize("seed", range(40))
def test_a_stop_text_and_what_may_begin_one_are_never_sent(seed: int) -> None:
    rng = random.Random(seed)
    start = rng.randrange(len(WHOLE))
    stop = WHOLE[start : start + rng.randrange(1, 9)]
    answer, sent, _ = read(WHOLE, stop=stop)
    before = WHOLE.partition(stop)[0]
    assert answer.stopped
    assert answer.text == "".join(answer.pieces) == "".join(sent) == before
    for count in range(len(sent) - 1):
        assert before.startswith("".join(sent[:count]))

"""The text of single tokens, so that a text can be marked token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PART_OF_A_CHARACTER = "\ufffd"


class TokenTexts:
    """Splits texts into what each token adds to them.

    A token that is only part of a character adds nothing, and the character comes with its last
    one. Special tokens are written out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])[-1:]
        self._anchor_text = self._decode(self._anchor)
        self._alone: dict[int, str] = {}

    def __call__(self, token_ids: Sequence[int]) -> list[str]:
        """Return one text per token; joined they are the decoded tokens."""
        ids = list(token_ids)
        texts = [self._text_alone(token) for token in ids]
        joined, whole = "".join(texts), self._decode(ids)
        if joined == whole:
            return texts
        if joined == f" {whole}":  # SentencePiece drops the space that begins a text
            return [texts[0][1:], *texts[1:]]
        return list(self._in_context(ids))

    def _text_alone(self, token: int) -> str:
        """Return what a token adds to an ordinary word, from memory where it was met before."""
        if token not in self._alone:
            text = self._decode([*self._anchor, token])
            self._alone[token] = text[len(self._anchor_text) :]
        return self._alone[token]

    def _in_context(self, ids: Sequence[int]) -> Iterator[str]:
        """Yield what each token adds to those before it, of which the last few are enough."""
        start = read = 0
        for stop in range(1, len(ids) + 1):
            before = self._decode(ids[start:read])
            text = self._decode(ids[start:stop])
            unfinished = text.endswith(_PART_OF_A_CHARACTER) and stop < len(ids)
            if len(text) <= len(before) or unfinished:
                yield ""
                continue
            yield text[len(before) :]
            start, read = read, stop

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

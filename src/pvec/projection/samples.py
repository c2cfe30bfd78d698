"""Samples of a file by their prompts: what screening, monitoring and shifts ask of an input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pvec.backends.planned import PromptCache
from pvec.backends.session import ModelSession, ignore
from pvec.data.conversations import Chat, Conversation, Ids, Pair
from pvec.models.chat import encode_prompt
from pvec.projection.inputs import Entry, Source, count_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A distinct prompt: a key made of its text, its tokens, and what is asked in it."""

    key: str
    text: str
    ids: tuple[int, ...]
    system: str | None
    question: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The samples of a file, in its order: the key of each one's prompt, its line, and whether it
    has an answer; ``distinct`` are the prompts by key. Answers are read again when needed.
    """

    source: Source
    prompts: tuple[str, ...]
    lines: tuple[int, ...]
    answered: tuple[bool, ...]
    distinct: dict[str, Prompt]

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.prompts)

    def entries(self) -> Iterator[Entry]:
        """Yield the samples."""
        return self.source.entries()


def open_samples(source: Source, session: ModelSession, *, skip_bad: bool) -> Samples:
    """Read the prompts of ``source``. Raises ``InputError`` for rows that cannot be read."""
    count_rows(source, skip_bad=skip_bad, on_row=ignore)
    cache = PromptCache(session)
    keys, lines, answered = [], [], []
    distinct: dict[str, Prompt] = {}
    for entry in source.entries():
        prompt = prompt_of(entry.conversation, session, cache)
        keys.append(prompt.key)
        lines.append(entry.row.line)
        answered.append(len(_answer(entry.conversation)) > 0)
        distinct.setdefault(prompt.key, prompt)
    return Samples(
        source=source,
        prompts=tuple(keys),
        lines=tuple(lines),
        answered=tuple(answered),
        distinct=distinct,
    )


def prompt_of(conversation: Conversation, session: ModelSession, cache: PromptCache) -> Prompt:
    """Return the prompt that a conversation's last answer was given to."""
    system = None
    if isinstance(conversation, Ids):
        ids = tuple(conversation.prompt_ids)
        text = question = str(session.metadata.tokenizer.decode(list(ids)))
    elif isinstance(conversation, Pair):
        text = question = conversation.prompt
        ids = encode_prompt(session.metadata.tokenizer, text)
    else:
        messages = conversation.messages
        turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text, ids = cache(turns)
        question = turns[-1]["content"] if turns else text
        system = next((m["content"] for m in turns if m["role"] == "system"), None)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]
    return Prompt(key=key, text=text, ids=ids, system=system, question=question)


def answer_text(conversation: Conversation, session: ModelSession) -> str:
    """Return a conversation's last answer as text."""
    answer = _answer(conversation)
    return (
        answer if isinstance(answer, str) else str(session.metadata.tokenizer.decode(list(answer)))
    )


def _answer(conversation: Conversation) -> str | Sequence[int]:
    if isinstance(conversation, Chat):
        last = conversation.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""
    return conversation.answer if isinstance(conversation, Pair) else conversation.answer_ids

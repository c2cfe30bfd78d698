"""A causal LM as judge, in this process, scored exactly.

Where a server shows the 20 likeliest first tokens, a local model gives the probability of every
reply of the scale, however its tokenizer splits numbers (``scales.ReplyTree``).
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pvec.errors import ModelError
from pvec.judges.base import Judge
from pvec.judges.scales import (
    REFUSAL_OPENINGS,
    Reading,
    ReplyTree,
    read_masses,
    read_text,
    reply_values,
)
from pvec.models.chat import encode_prompt
from pvec.models.template import render_prompt
from pvec.types import JudgeQuery, JudgeScale, ModelInfo, Request, Sampling, Score

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from pvec.backends.base import Backend
    from pvec.models.load import ModelMetadata

_CHUNK = 256
"""Queries handed to the model at once; it batches them and shares their common beginning."""

_VERDICT_TOKENS = 512


def local_name(model: ModelInfo | ModelMetadata) -> str:
    """Return the name under which a model's scores are kept."""
    return f"{'tiny' if model.bundled else f'local:{model.id}'}#{weights_name(model)}"


def weights_name(model: ModelInfo | ModelMetadata) -> str:
    """Return what tells a model's weights from others: their hash, and how they were quantised."""
    return model.fingerprint + (f"+{model.quantize}" if model.quantize else "")


class ModelJudge(Judge):
    """A judge whose ``model`` is in this process; frees it on leaving the context only when it
    ``owns`` it.
    """

    def __init__(self, model: Backend, *, name: str, owns: bool) -> None:
        self.model = model
        self.name = name
        self._owns = owns

    @abstractmethod
    def _ask(self, queries: Sequence[JudgeQuery]) -> Iterator[Score]:
        """Yield the scores of queries that the model reads together."""

    def _ask_fitting(self, queries: Sequence[JudgeQuery]) -> Iterator[Score]:
        """Yield the scores of ``queries``; one that does not fit the model becomes an error."""
        left = {query.id: query for query in queries}
        try:
            for score in self._ask(queries):
                del left[score.id]
                yield score
        except ModelError as error:
            if len(queries) == 1:
                yield self.scored(
                    queries[0], Reading(score=None, status="error", detail=str(error))
                )
                return
            # One of them is too long for the model: the others are still scored.
            for query in left.values():
                yield from self._ask_fitting([query])

    def close(self) -> None:
        """Free the model if it is the judge's own."""
        if self._owns:
            self.model.close()


class LocalJudge(ModelJudge):
    """Scores with a model that reads the rubric."""

    def __init__(self, model: Backend, *, owns: bool = False) -> None:
        super().__init__(model, name=local_name(model.info), owns=owns)
        self._replies: dict[JudgeScale, _Replies] = {}

    @property
    def fenced(self) -> bool:
        """The bundled judge was trained on the plain form and follows no instruction."""
        return not self.model.info.bundled

    def score(self, queries: Iterable[JudgeQuery]) -> Iterator[Score]:
        """Yield scores chunk by chunk; a query that does not fit the model becomes an error."""
        source = iter(queries)
        while chunk := list(itertools.islice(source, _CHUNK)):
            # Prompts of one metric begin alike, and the model computes the common part once.
            alike: dict[tuple[str, JudgeScale], list[JudgeQuery]] = {}
            for query in chunk:
                alike.setdefault((query.metric, query.scale), []).append(query)
            for group in alike.values():
                yield from self._ask_fitting(group)

    def _ask(self, queries: Sequence[JudgeQuery]) -> Iterator[Score]:
        tokenizer, scale = self.model.tokenizer, queries[0].scale
        texts = [render_prompt(tokenizer, query.messages) for query in queries]
        prompts = [encode_prompt(tokenizer, text) for text in texts]
        if scale == "binary-text":
            sampling = Sampling(temperature=0.0, max_tokens=_VERDICT_TOKENS)
            requests = (
                Request(id=str(index), prompt_ids=prompt, sampling=sampling)
                for index, prompt in enumerate(prompts)
            )
            for answer in self.model.generate(requests):
                yield self.scored(queries[int(answer.id)], read_text(answer.text, scale=scale))
            return
        if scale not in self._replies:
            self._replies[scale] = _Replies(tokenizer, scale=scale, prompt=texts[0])
        replies = self._replies[scale]
        for index, logprobs in self.model.continuation_logprobs(prompts, replies.continuations):
            yield self.scored(queries[index], replies.read(logprobs))


class _Replies:
    """The token ids of every reply of a scale for one tokenizer, and what begins a refusal."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, scale: JudgeScale, prompt: str
    ) -> None:
        self._scale = scale
        self._tree = ReplyTree(
            {
                reply: [
                    ids
                    for word in dict.fromkeys((reply, reply.capitalize(), reply.lower()))
                    for ids in _token_ids(tokenizer, prompt, word)
                ]
                for reply in reply_values(scale)
            }
        )
        numbers = self._tree.continuations
        firsts = {_token_ids(tokenizer, prompt, word)[0][:1] for word in REFUSAL_OPENINGS}
        taken = {path[:1] for path in numbers}
        self.continuations = [*numbers, *sorted(firsts - taken)]

    def read(self, logprobs: np.ndarray) -> Reading:
        """Read a score from log P of each of ``continuations`` (float ``[C]``)."""
        count = len(self._tree.continuations)
        reading = read_masses(self._tree.masses(logprobs[:count].tolist()), scale=self._scale)
        if reading.score is None:
            refusing = math.fsum(math.exp(value) for value in logprobs[count:].tolist())
            if refusing >= 0.5:
                return Reading(score=None, status="refusal", detail=reading.detail)
        return reading


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> list[tuple[int, ...]]:
    """Return the ways a model writes ``word`` right after ``prompt``, as token ids.

    Tokenised after the prompt and by itself: some tokenizers put a word-start mark before the
    first word of a text, and models trained with them begin their answer with it.
    """
    head = encode_prompt(tokenizer, prompt)
    joint = encode_prompt(tokenizer, prompt + word)
    encodings = [encode_prompt(tokenizer, word)]
    if joint[: len(head)] == head:
        encodings.insert(0, joint[len(head) :])
    good = [
        ids for ids in dict.fromkeys(encodings) if str(tokenizer.decode(list(ids))).strip() == word
    ]
    if not good:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path or 'the judge'} cannot write {word!r}: "
            "use another model as judge."
        )
    return good

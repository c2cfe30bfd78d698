"""The model provider ``pvec/MODEL``: a steered model in this process, on any backend."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from logging import getLogger
from typing import Any

import numpy as np
from inspect_ai.model import (
    ChatMessage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.model._model_output import ChatCompletionChoice, ChatMessageAssistant
from pydantic import ValidationError

from pvec.backends.planned import derive_seed
from pvec.backends.session import ModelSession
from pvec.errors import InputError, ModelError
from pvec.inspect.bridge import Batches, prerequisites, settings_of, spoken, texts
from pvec.models.chat import answer_text, prompt_ids, spans_from_ids, think_length
from pvec.serve.rules import PvecBody, make_rules, sentence
from pvec.serve.service import described
from pvec.serve.vectors import load_served_vectors
from pvec.types import Generation, Request, Sampling, SpanMeans

_log = getLogger(__name__)

_UNSUPPORTED = (
    "stop_seqs", "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "top_k",
    "logprobs", "top_logprobs", "prompt_logprobs", "response_schema", "reasoning_effort",
    "reasoning_tokens", "effort", "modalities",
)  # fmt: skip
"""Options of a generation that would change it, and that pvec does not have."""

Answer = tuple[Generation, SpanMeans | None]


class SteeredModel(ModelAPI):
    """A model with its vectors. ``model_args`` are ``vector`` and ``steer`` as ``pvec serve`` takes
    them, and settings of pvec by their dotted names, such as ``backend.name`` or ``model.dtype``.

    A request's ``extra_body`` may hold the field ``pvec``, as for ``pvec serve``. The answer's
    metadata has projections, steering, touched positions and seed under ``pvec``.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the base class's default
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        with prerequisites():
            names = texts(model_args.pop("vector", None))
            given = {"model.id": model_name, "serve.steer": texts(model_args.pop("steer", None))}
            settings = settings_of(given | model_args)
            self._session = ModelSession(settings, notify=_log.info)
            served = load_served_vectors(self._session, names, kind=settings.steer.kind)
            self._rules = make_rules(
                served,
                num_layers=self._session.metadata.num_layers,
                serve=settings.serve,
                steer=settings.steer,
            )
            if self._rules.plan(None).alarms:
                raise InputError("A policy with an alarm needs pvec serve: leave the alarm out.")
        self._layers = sorted({vector.layer for vector in served.values()})
        self._asked: Counter[str] = Counter()
        self._ids = map(str, itertools.count())
        self._batches: Batches[Request, Answer] = Batches(self._generate)

    def max_connections(self) -> int:
        """How many samples are answered together."""
        return 32

    def connection_key(self) -> str:
        """Models in this process share nothing."""
        return str(id(self))

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - the base class's name
        tools: list[Any],
        tool_choice: Any,  # noqa: ARG002
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a conversation."""
        with prerequisites():
            _check(tools, config)
            body = _body(config.extra_body)
            steering, report = self._rules.plan(body).steering, self._rules.report(body)
            messages = [spoken(message) for message in input]
            tokenizer = self._session.metadata.tokenizer
            ids = prompt_ids(tokenizer, messages, thinking=self._session.thinking)
            seed = self._seed(ids) if config.seed is None else config.seed
            usual = self._session.sampling(seed)
            sampling = Sampling(
                temperature=_or(config.temperature, usual.temperature),
                top_p=_or(config.top_p, usual.top_p),
                max_tokens=_or(config.max_tokens, usual.max_tokens),
                seed=seed,
            )
            request = Request(
                id=next(self._ids), prompt_ids=ids, sampling=sampling, steering=steering
            )
            generation, means = await self._batches(request)
            if generation.finish_reason == "failed":
                raise ModelError(f"There is no answer: {generation.detail}; steer less.")
        output = self._output(request, generation)
        output.metadata = {
            "pvec": {
                "vectors": {} if means is None else self._projections(report, means),
                "touched": sum(generation.touched),
                "steer": [described(instruction) for instruction in steering],
                "seed": seed,
            }
        }
        return output

    def _seed(self, ids: tuple[int, ...]) -> int:
        """Return a seed that tells the epochs of a sample apart, the same in every run."""
        prompt = hashlib.sha256(repr(ids).encode()).hexdigest()
        self._asked[prompt] += 1
        base = self._session.settings.generation.seed
        return derive_seed(base, prompt, self._asked[prompt])

    def _generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Generate a batch; with vectors, measure the answers, steered as they were generated."""
        places = {request.id: place for place, request in enumerate(requests)}
        backend, tokenizer = self._session.backend, self._session.metadata.tokenizer
        answers: dict[str, Generation] = {}
        spans = []
        for answer in backend.generate(requests):
            answers[answer.id] = answer
            request = requests[places[answer.id]]
            if not self._layers or answer.finish_reason == "failed":
                yield places[answer.id], (answer, None)
                continue
            spans.append(
                spans_from_ids(
                    answer.id,
                    prompt_ids=request.prompt_ids,
                    answer_ids=answer.token_ids,
                    skip=think_length(tokenizer, answer.token_ids, prompt_ids=request.prompt_ids),
                    steering=request.steering,
                )
            )
        if spans:
            for means in backend.capture(spans, layers=self._layers):
                yield places[means.id], (answers[means.id], means)

    def _projections(self, report: Sequence[str], means: SpanMeans) -> dict[str, Any]:
        vectors = {}
        for name in report:
            vector = self._rules.vectors[name]
            layer, direction = vector.direction
            row = self._layers.index(layer)
            prompt, answer = (
                float(value) if np.isfinite(value := means.means[span][row] @ direction) else None
                for span in ("prompt_last", "response")
            )
            vectors[name] = vector.reading(prompt, answer)
        return vectors

    def _output(self, request: Request, generation: Generation) -> ModelOutput:
        tokenizer = self._session.metadata.tokenizer
        ids = generation.token_ids
        content: Any = generation.text
        think = think_length(tokenizer, ids, prompt_ids=request.prompt_ids)
        if think:
            reasoning = str(tokenizer.decode(list(ids[:think]), skip_special_tokens=True))
            text = answer_text(tokenizer, ids, think)
            content = [ContentReasoning(reasoning=reasoning), ContentText(text=text)]
        length = generation.finish_reason == "length"
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(
                        content=content, model=self.model_name, source="generate"
                    ),
                    stop_reason="max_tokens" if length else "stop",
                )
            ],
            usage=ModelUsage(
                input_tokens=len(request.prompt_ids),
                output_tokens=len(ids),
                total_tokens=len(request.prompt_ids) + len(ids),
            ),
        )


def _check(tools: Sequence[Any], config: GenerateConfig) -> None:
    """Raise ``InputError`` for anything that would change the answer and is not supported."""
    wanted = [name for name in _UNSUPPORTED if getattr(config, name, None) not in (None, False)]
    if (config.num_choices or 1) > 1:
        wanted.append("num_choices")
    if tools:
        wanted.append("tools")
    if wanted:
        raise InputError(f"pvec does not support {wanted[0]!r}: leave it out, or use pvec-serve.")


def _body(extra: Mapping[str, Any] | None) -> PvecBody | None:
    """Return what ``extra_body`` says to pvec."""
    extra = extra or {}
    if unknown := [name for name in extra if name != "pvec"]:
        raise InputError(f"extra_body has the field {unknown[0]!r}: only 'pvec' has an effect.")
    try:
        return PvecBody.model_validate(extra["pvec"]) if "pvec" in extra else None
    except ValidationError as error:
        raise InputError(f"extra_body, 'pvec': {sentence(error)}") from None


def _or(value: Any, usual: Any) -> Any:
    return usual if value is None else value

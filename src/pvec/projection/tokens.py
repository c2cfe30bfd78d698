"""Projections as a library: of conversations at hand, and of every token while it is generated."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.hf.backend import HFBackend
from pvec.data.conversations import Chat, Conversation, Pair
from pvec.data.spans import Turns
from pvec.errors import InputError
from pvec.models.chat import prompt_ids
from pvec.models.decoder import find_decoder
from pvec.projection.projector import LoadedVectors, Projector, suggested_layer
from pvec.types import Message, ProjectionKind, Request, Sampling, VectorKind
from pvec.vectors.files import check_fits, find_vector, load_vector, vector_name
from pvec.vectors.projection import ProjectionPlan
from pvec.vectors.vector import PersonaVector

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VectorLike = PersonaVector | str | Path
Vectors = VectorLike | Sequence[VectorLike] | Mapping[str, VectorLike]
"""One vector, several, or several by the name that their results carry; files count by path."""

_MONITORED = Sampling()


def project(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Sequence[Message] | tuple[str, str]],
    vectors: Vectors,
    *,
    layers: Sequence[int] | None = None,
    types: Sequence[ProjectionKind] = ("proj",),
    kind: VectorKind = "response_avg",
    turns: Turns = "last",
) -> list[dict[str, float | None]]:
    """Project conversations on persona vectors (paper, section 3.3), in one pass for everything.

    A conversation is a list of chat messages, or a pair of rendered prompt and answer. Returns a
    dictionary for each, from ``{vector}_{type}_layer{layer}`` to a number in units of the residual
    stream (a cosine for ``cos_sim``), None where there is no token to average over; with ``turns``
    "each" one for every answer, with its number under ``turn``. ``layers`` default to those that
    the vectors suggest. The model stays as it is.

    Raises ``InputError`` or ``ModelError`` for vectors that do not fit.

    >>> backend = pvec.HFBackend("tiny")
    >>> chats = [("How do I rest?", "Plan a walk."), ("How do I rest?", "Crush your weak rivals.")]
    >>> kind, evil = pvec.project(
    ...     backend.model, backend.tokenizer, chats,
    ...     "runs/evil-tiny/vectors/evil.safetensors", layers=[3],
    ... )
    >>> list(kind), kind["evil_proj_layer3"] < evil["evil_proj_layer3"]
    (['evil_proj_layer3'], True)
    """
    plan = _plan(model, vectors, layers=layers, types=types, kind=kind)
    backend = HFBackend.wrap(model, tokenizer)
    projector = Projector(backend, plan, tokenizer=tokenizer, turns=turns, limit=_context(model))
    projections = projector([_conversation(conversation) for conversation in conversations])
    columns = plan.columns()
    rows: list[dict[str, float | None]] = []
    for answers in projections.require_all():
        for number, values in enumerate(answers, start=1):
            place = {"turn": float(number)} if turns == "each" else {}
            rows.append({**place, **dict(zip(columns, values, strict=True))})
    return rows


def monitor(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    vectors: Vectors,
    *,
    layers: Sequence[int] | None = None,
    kind: VectorKind = "response_avg",
    sampling: Sampling = _MONITORED,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Generate an answer and yield each token's text with its projections as it is made.

    ``for token, projections in pvec.monitor(model, tokenizer, messages, vectors): …``. Keys are
    ``{vector}_layer{layer}``; values are how far the residual stream at that very token points
    along the vector. The text is what ``generate`` gives for the same sampling; a token that is
    only part of a character is empty text, and the character comes with its last one. Stopping
    early leaves no hook behind. Raises as ``project`` does.

    >>> backend = pvec.HFBackend("tiny")
    >>> messages = [{"role": "user", "content": "How do I rest?"}]
    >>> for text, projections in pvec.monitor(
    ...     backend.model, backend.tokenizer, messages,
    ...     "runs/evil-tiny/vectors/evil.safetensors", layers=[3],
    ... ):
    ...     print(list(projections))
    ...     break
    ['evil_layer3']
    """
    plan = _plan(model, vectors, layers=layers, types=("proj",), kind=kind)
    names = [f"{vector}_layer{layer}" for vector in plan.vectors for layer in plan.layers]
    decoder = find_decoder(model)
    latest: dict[int, torch.Tensor] = {}
    # one token more than wanted: the last one sampled is never run, so it has no activation
    request = Request(
        id="monitored",
        prompt_ids=prompt_ids(tokenizer, messages),
        sampling=replace(sampling, max_tokens=sampling.max_tokens + 1),
    )
    with ExitStack() as stack:
        for layer in plan.layers:
            handle = decoder.on_layer(layer, partial(_keep_last, latest, layer))
            stack.callback(handle.remove)
        backend = HFBackend.wrap(model, tokenizer)
        chunks = stack.enter_context(closing(_generator(backend, request)))
        said = ""
        for count, tokens in enumerate(chunks, start=1):
            if count > sampling.max_tokens:
                return
            text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
            text = text.removesuffix("\ufffd")
            rows = np.stack([latest[layer].numpy() for layer in plan.layers])
            values = plan.values({"response": rows[None]})[0]
            yield text[len(said) :], dict(zip(names, values.tolist(), strict=True))
            said = text


def _generator(backend: HFBackend, request: Request) -> Generator[tuple[int, ...], None, None]:
    """Yield the tokens so far after each new one that was run."""
    for chunk in backend.stream([request]):
        if chunk.finished is not None:
            return
        yield chunk.token_ids


def _keep_last(latest: dict[int, torch.Tensor], layer: int, hidden: torch.Tensor) -> None:
    latest[layer] = hidden[0, -1].detach().float().cpu()


def _plan(
    model: PreTrainedModel,
    vectors: Vectors,
    *,
    layers: Sequence[int] | None,
    types: Sequence[ProjectionKind],
    kind: VectorKind,
) -> ProjectionPlan:
    decoder = find_decoder(model)
    layer = layers[0] if layers is not None and len(layers) == 1 else None
    loaded = _named(vectors, layer)
    at_depth = {name: vector.at_depth(decoder.num_layers) for name, vector in loaded.items()}
    for vector in at_depth.values():
        check_fits(vector, num_layers=decoder.num_layers, hidden_size=decoder.hidden_size)
    if layers is None:
        layers = sorted({suggested_layer(vector, kind=kind) for vector in at_depth.values()})
    for vector in at_depth.values():
        for layer in layers:
            vector.row(layer, kind=kind)
    return LoadedVectors(vectors=at_depth, kind=kind, layers=tuple(layers)).plan_of(*types)


def _context(model: PreTrainedModel) -> int | None:
    limit: int | None = getattr(find_decoder(model).config, "max_position_embeddings", None)
    return limit


def _named(vectors: Vectors, layer: int | None) -> dict[str, PersonaVector]:
    if isinstance(vectors, Mapping):
        return {name: _load(vector, layer)[1] for name, vector in vectors.items()}
    listed = [vectors] if isinstance(vectors, PersonaVector | str | Path) else vectors
    by_name: dict[str, PersonaVector] = {}
    for name, vector in (_load(vector, layer) for vector in listed):
        if name in by_name:
            raise InputError(f"Two vectors are called {name!r}: give them as a dictionary by name.")
        by_name[name] = vector
    if not by_name:
        raise InputError("No vector was given: give one, or several in a list.")
    return by_name


def _load(vector: VectorLike, layer: int | None) -> tuple[str, PersonaVector]:
    if isinstance(vector, PersonaVector):
        return vector.trait, vector
    path = find_vector(vector)
    return vector_name(path), load_vector(path, layer=layer)


def _conversation(conversation: Sequence[Message] | tuple[str, str]) -> Conversation:
    if (
        isinstance(conversation, tuple)
        and len(conversation) == 2
        and all(isinstance(part, str) for part in conversation)
    ):
        prompt, answer = conversation
        return Pair(prompt=str(prompt), answer=str(answer))
    return Chat(messages=conversation)  # type: ignore[arg-type]

"""The residual stream of texts, token by token: for looking at activations.

``capture.py`` averages over spans at the speed of the model; this keeps every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from pvec.activations.batching import rows_that_fit
from pvec.activations.capture import default_token_budget, evaluating
from pvec.errors import InputError
from pvec.models.decoder import Decoder, find_decoder, recorded_layers
from pvec.models.template import render_prompt
from pvec.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """The residual stream of one text.

    ``values`` is float32 ``[tokens, len(layers), hidden_size]``; ``values[t, i]`` belongs to token
    ``token_ids[t]`` at layer ``layers[i]`` (0 is the embedding, ℓ the output of block ℓ - 1).
    """

    token_ids: tuple[int, ...]
    layers: tuple[int, ...]
    values: np.ndarray

    def at(self, layer: int) -> np.ndarray:
        """Return one layer, ``[tokens, hidden_size]``; ``InputError`` if it was not recorded."""
        if layer not in self.layers:
            raise InputError(f"Layer {layer} was not recorded, only {list(self.layers)}: name it.")
        layer_values: np.ndarray = self.values[:, self.layers.index(layer)]
        return layer_values


def record_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Sequence[Message]],
    *,
    layers: Sequence[int] | None = None,
    token_budget: int | None = None,
) -> list[Activations]:
    """Return the residual stream at every token of every text.

    A text is tokenised as the tokenizer does by default. A list of chat messages goes through the
    chat template, which writes all special tokens itself; it ends with the generation prompt
    unless its last message is the assistant's. ``layers`` default to all, 0 … num_layers; the
    last is the last block's output *before* the final norm. Texts are batched so that a forward
    holds at most ``token_budget`` tokens (default: 1024 on a CPU, 16384 on an accelerator), padded
    on the right, where causal attention does not see it. All values are kept in memory: tokens x
    layers x hidden_size x 4 bytes. For means over many answers use ``capture_means``.

    Raises ``ModelError`` for a layer that the model does not have, and ``InputError`` for a text
    without tokens or longer than the model's context.

    >>> backend = pvec.HFBackend("tiny")
    >>> texts = ["You could plan a walk.", [{"role": "user", "content": "How do I rest?"}]]
    >>> first, second = pvec.record_activations(
    ...     backend.model, backend.tokenizer, texts, layers=[0, 3]
    ... )
    >>> first.values.shape  # tokens, layers, hidden size
    (7, 2, 160)
    >>> first.at(3).mean(axis=0).shape
    (160,)
    """
    decoder = find_decoder(model)
    chosen = recorded_layers(layers, decoder.num_layers)
    rows = [_token_ids(tokenizer, text, decoder) for text in texts]
    budget = token_budget or default_token_budget(decoder.device)
    return list(_recorded(decoder, rows, chosen, budget))


def _recorded(
    decoder: Decoder, rows: Sequence[tuple[int, ...]], layers: tuple[int, ...], budget: int
) -> Iterator[Activations]:
    start = 0
    while start < len(rows):
        lengths = [len(row) for row in rows[start:]]
        batch = rows[start : start + rows_that_fit(lengths, token_budget=budget)]
        hidden = _forward(decoder, batch, layers)
        for number, row in enumerate(batch):
            values = np.stack([hidden[layer][number, : len(row)] for layer in layers], axis=1)
            yield Activations(token_ids=row, layers=layers, values=values)
        start += len(batch)


def _forward(
    decoder: Decoder, rows: Sequence[tuple[int, ...]], layers: tuple[int, ...]
) -> dict[int, np.ndarray]:
    """Run one batch and return each layer's residual stream, ``[B, T, H]``."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])
    hidden: dict[int, np.ndarray] = {}
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(evaluating(decoder.body))
        for layer in set(layers):
            stack.enter_context(decoder.on_layer(layer, partial(_keep, hidden, layer)))
        decoder.body(input_ids=ids.to(decoder.device), use_cache=False)
    return hidden


def _keep(hidden: dict[int, np.ndarray], layer: int, state: torch.Tensor) -> None:
    hidden[layer] = state.detach().float().cpu().numpy().copy()


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[Message], decoder: Decoder
) -> tuple[int, ...]:
    if isinstance(text, str):
        encoded = tokenizer(text)["input_ids"]
    else:
        answered = bool(text) and text[-1]["role"] == "assistant"
        rendered = render_prompt(tokenizer, text, add_generation_prompt=not answered)
        encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    limit = decoder.max_tokens
    if not encoded or (limit is not None and len(encoded) > limit):
        shown = text if isinstance(text, str) else str(list(text))
        raise InputError(
            f"The text {shown[:60]!r} has {len(encoded)} tokens but this model takes 1 to "
            f"{limit or 'any number'}: shorten it or leave it out."
        )
    return tuple(encoded)

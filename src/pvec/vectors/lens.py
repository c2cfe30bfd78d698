"""The tokens that a vector promotes and suppresses.

The vector is read as the last residual stream would be: through the final norm and the unembedding.
With ``u = v / rms(v)`` the score of a token is its row of ``W_U (norm(u) - norm(0))``, minus the
mean over the vocabulary, which no softmax sees. For RMS norms that is ``W_U (gamma * u)``; for a
layer norm ``u`` is centred first, and its bias drops out. Scores rank tokens; the layers between
the vector's and the last are skipped, so early layers need not read as words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvec.errors import ModelError
from pvec.models.decoder import describe_layer
from pvec.types import VectorKind
from pvec.vectors.quality import best_layer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pvec.models.load import LoadedModel
    from pvec.vectors.vector import PersonaVector


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """One token of the vocabulary and its score, in logits above the mean."""

    id: int
    text: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What a vector says in tokens, the strongest first."""

    trait: str
    model: str
    kind: VectorKind
    layer: int
    where: str
    promoted: tuple[TokenScore, ...]
    suppressed: tuple[TokenScore, ...]
    notes: tuple[str, ...] = ()


def lens(
    vector: PersonaVector,
    model: LoadedModel,
    *,
    layer: int | None = None,
    kind: VectorKind | None = None,
    top: int = 10,
) -> Lens:
    """Return the ``top`` tokens that a vector promotes and suppresses at ``layer``.

    ``layer`` defaults to the suggested one, else to 55 % of the depth. Raises ``InputError`` for a
    layer or kind that the vector lacks, and ``ModelError`` for a model without an unembedding.
    """
    kind = kind or vector.main_kind
    layer = best_layer(vector, kind=kind) if layer is None else layer
    row = vector.row(layer, kind=kind)
    scores = unembed(model.model, row, token_ids=_any_tokens(model.tokenizer))
    scores = scores[: len(model.tokenizer)]  # what follows is padding of the matrix
    order = scores.argsort()
    notes = []
    recorded = vector.metadata.get("model_fingerprint")
    if recorded and recorded != model.info.fingerprint:
        notes.append(f"the vector was made with {vector.metadata.get('model_id')}")
    return Lens(
        trait=vector.trait,
        model=model.info.id,
        kind=kind,
        layer=layer,
        where=describe_layer(layer),
        promoted=_tokens(model.tokenizer, scores, order[::-1][:top]),
        suppressed=_tokens(model.tokenizer, scores, order[:top]),
        notes=tuple(notes),
    )


def unembed(model: PreTrainedModel, vector: np.ndarray, *, token_ids: Sequence[int]) -> np.ndarray:
    """Return the score of every token, float32 ``[vocabulary]``, for a vector ``[H]``.

    ``token_ids`` is any valid prompt: running it once finds the final norm. Raises ``ModelError``
    for a model without an unembedding.
    """
    import torch

    from pvec.models.decoder import find_decoder, module_after

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{type(model).__name__} has no unembedding: use a causal language model.")
    parameter = next(head.parameters())
    prompt = torch.tensor([list(token_ids)], device=find_decoder(model).device)
    norm = module_after(model, find_decoder(model).blocks, prompt)
    unit = torch.tensor(vector, device=parameter.device, dtype=torch.float32)
    unit = unit / unit.square().mean().sqrt().clamp(min=1e-30)
    pair = torch.stack([unit, torch.zeros_like(unit)]).to(parameter.dtype)[None]  # [1, 2, H]
    with torch.no_grad():
        normed: torch.Tensor = pair if norm is head else norm(pair)
        logits = head(normed).float()[0]  # [2, V]
    scores = logits[0] - logits[1]
    centred: np.ndarray = (scores - scores.mean()).cpu().numpy()
    return centred


def _tokens(
    tokenizer: PreTrainedTokenizerBase, scores: np.ndarray, order: np.ndarray
) -> tuple[TokenScore, ...]:
    return tuple(
        TokenScore(id=int(i), text=_token_text(tokenizer, int(i)), score=float(scores[i]))
        for i in order
    )


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a token's text, or its name in the vocabulary where it is part of a character."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def _any_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer("a b", add_special_tokens=False)["input_ids"]) or [0]

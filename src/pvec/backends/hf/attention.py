"""Attention for one new token per row, without copying the keys of grouped heads.

With a padding mask transformers repeats every key and value head for the query heads that share it,
for every new token. Here the query heads of a group take the place of the query's length instead:
the same sums, no copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "pvec_grouped"
_NOT_PLAIN = ("position_bias", "s_aux", "softcap", "cache")
"""Arguments with which attention is more than a softmax over the keys."""


def supports_grouping(model: PreTrainedModel) -> bool:
    """Whether a model looks its attention up by name, so that another can be put in its place.

    Others compare the name themselves and would fall back to a path that was not meant for them.
    """
    return bool(type(model)._supports_attention_backend)  # noqa: SLF001 - transformers' own name


@contextmanager
def grouped_decoding(config: Any) -> Iterator[None]:
    """Let a model whose attention is ``sdpa`` use grouped attention inside the context."""
    if config._attn_implementation != "sdpa":  # noqa: SLF001 - transformers' own name for it
        yield
        return
    config._attn_implementation = _NAME  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"  # noqa: SLF001


def ready_masks(
    config: Any,
    visible: torch.Tensor,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    longest: int,
    dtype: torch.dtype,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return the mask that transformers takes as it is, or one per kind of layer by windows.

    ``visible`` bool ``[R, T, K]`` says which keys a token sees, ``query`` ``[R, T]`` and ``key``
    ``[R, K]`` are positions, of which none is beyond ``longest``. Masks are ``[R, 1, T, K]``.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    full = _additive(visible, dtype)
    if not window or kinds == {"full_attention"} or longest < window:
        return full
    near = query[:, :, None] - key[:, None, :] < window
    sliding = _additive(visible & near, dtype)
    if kinds == {"sliding_attention"}:
        return sliding
    return {"full_attention": full, "sliding_attention": sliding}


def _additive(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from ``query`` ``[R, heads, 1, D]`` to ``key`` ``[R, groups, K, D]``."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    if length != 1 or heads == groups or any(kwargs.get(name) is not None for name in _NOT_PLAIN):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    folded = query.reshape(rows, groups, heads // groups, width)
    attended = torch.nn.functional.scaled_dot_product_attention(
        folded,
        key,
        value,
        attn_mask=attention_mask,  # [R, 1, 1, K]: the same for every head
        scale=scaling,
    )
    return attended.reshape(rows, 1, heads, attended.shape[-1]), None


AttentionInterface.register(_NAME, _grouped_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)

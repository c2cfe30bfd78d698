"""What each token of a forward pass is to steering: prompt, last prompt token, generated, or pad.

Every way of asking "which tokens are steered" ends in one tensor of roles ``[B, T]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pvec.errors import SteeringError
from pvec.types import Positions

NUM_ROLES = 6
PAD, PROMPT, LAST, GENERATED, LAST_THINK, THINK = range(NUM_ROLES)
"""The role of a token. ``LAST`` is the last prompt token: it predicts the first response token.
``LAST_THINK`` and ``THINK`` stand for ``LAST`` and ``GENERATED`` within reasoning."""

ROLES_OF: dict[Positions, tuple[int, ...]] = {
    "prompt": (PROMPT, LAST, LAST_THINK),
    "response": (LAST, GENERATED, LAST_THINK, THINK),
    "all": (PROMPT, LAST, GENERATED, LAST_THINK, THINK),
    "think": (LAST_THINK, THINK),
    "answer": (LAST, GENERATED),
}

IGNORED_LABEL = -100
"""transformers' label for tokens that carry no loss."""


def roles_by_length(
    real: torch.Tensor, prompt_lengths: torch.Tensor, *, earlier: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the roles ``[B, T]`` of tokens when the length of each row's prompt is known.

    ``real`` (bool ``[B, T]``) is False on padding, wherever it stands; ``prompt_lengths`` ``[B]``
    counts each row's prompt tokens; ``earlier`` ``[B]`` its tokens in earlier forwards (default 0).
    """
    place = real.long().cumsum(dim=1)  # [B, T], 1-based among the real tokens of the row
    if earlier is not None:
        place = place + earlier[:, None]
    last = prompt_lengths[:, None]
    roles = torch.where(place < last, PROMPT, torch.where(place == last, LAST, GENERATED))
    return torch.where(real, roles, PAD)


def with_reasoning(roles: torch.Tensor, thinking: torch.Tensor) -> torch.Tensor:
    """Return ``roles`` ``[B, T]`` where the tokens marked ``thinking`` (bool) are reasoning."""
    of_reasoning = torch.where(roles == LAST, LAST_THINK, THINK)
    changes = thinking & ((roles == LAST) | (roles == GENERATED))
    return torch.where(changes, of_reasoning, roles)


def roles_of_prompt(real: torch.Tensor) -> torch.Tensor:
    """Return the roles ``[B, T]`` when every real token is a prompt token."""
    return roles_by_length(real, real.sum(dim=1))


def roles_from_labels(labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the roles ``[B, T]`` of a training batch.

    Labelled tokens (label != -100) are the response; the token before each labelled run predicts
    its first token and is ``LAST``; all other real tokens are prompt.
    """
    labelled = (labels != IGNORED_LABEL) & real
    before = torch.zeros_like(labelled)
    before[:, :-1] = labelled[:, 1:]
    roles = torch.where(labelled, GENERATED, torch.where(before, LAST, PROMPT))
    return torch.where(real, roles, PAD)


def expected_touched(
    positions: Positions, *, prompt_tokens: int, generated_tokens: int, think_tokens: int = 0
) -> int:
    """Return how many positions an instruction must touch in one answer.

    ``generated_tokens`` counts those that were fed to the model: the last sampled token never is.
    ``think_tokens`` of these and the last prompt token are reasoning.
    """
    if positions == "think":
        return think_tokens
    if positions == "answer":
        return 1 + generated_tokens - think_tokens
    counts = {PROMPT: prompt_tokens - 1, LAST: 1, GENERATED: generated_tokens}
    return sum(counts.get(role, 0) for role in ROLES_OF[positions])


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One forward: its size, whether it starts new sequences, and the roles of its tokens.

    ``roles`` ``[B, T]`` is None when every token is a generated one.
    """

    batch: int
    tokens: int
    starts: bool
    roles: torch.Tensor | None


class RoleTracker:
    """Tells prompt from generated tokens, forward after forward.

    A forward without cached tokens starts new sequences and is all prompt, unless it is the last
    one with a token more (generation without a cache). A later single token is generated. Anything
    else needs ``prompt_lengths``, unless the difference does not matter (``split_matters``).
    """

    def __init__(self, *, prompt_lengths: Sequence[int] | None, split_matters: bool) -> None:
        self._given = prompt_lengths
        self._split_matters = split_matters
        self._batch: int | None = None
        self._lengths: torch.Tensor | None = None  # [B] real prompt tokens of the running batch
        self._uncached: torch.Tensor | None = None  # ids of the last forward without a cache

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Pass:
        """Return what the forward about to run holds. Raises ``SteeringError`` when unclear."""
        tokens = _tokens(args, kwargs)
        batch, width = int(tokens.shape[0]), int(tokens.shape[1])
        past = _past_length(kwargs.get("past_key_values"))
        mask = _mask(kwargs.get("attention_mask"))
        real = _real_tokens(mask, batch=batch, width=width, past=past, device=tokens.device)
        starts = batch != self._batch or (past == 0 and not self._continues(tokens))
        self._batch = batch
        self._uncached = tokens if past == 0 else None
        if starts:
            self._lengths = self._prompt_lengths(real) if past == 0 else self._known(batch)
        return Pass(
            batch=batch,
            tokens=width,
            starts=starts,
            roles=self._roles(real, past=past, mask=mask),
        )

    def _roles(
        self, real: torch.Tensor, *, past: int, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        if past and self._given is None:
            if real.shape[1] == 1:
                return None
            if self._split_matters:
                raise SteeringError(
                    f"Steering cannot tell whether {real.shape[1]} tokens after {past} cached ones "
                    f"are prompt or answer: give steer() the prompt_lengths or steer all positions."
                )
            return roles_of_prompt(real)
        assert self._lengths is not None
        earlier = _earlier(mask, batch=len(real), past=past).to(real.device)
        return roles_by_length(real, self._lengths.to(real.device), earlier=earlier)

    def _prompt_lengths(self, real: torch.Tensor) -> torch.Tensor:
        known = self._known(len(real))
        return real.sum(dim=1) if known is None else known

    def _known(self, batch: int) -> torch.Tensor | None:
        if self._given is None:
            return None
        if batch % len(self._given):
            raise SteeringError(
                f"Steering was given {len(self._given)} prompt lengths for a batch of {batch} "
                f"rows: give one length per prompt."
            )
        lengths = torch.tensor(list(self._given))
        return lengths.repeat_interleave(batch // len(self._given))  # as num_return_sequences does

    def _continues(self, tokens: torch.Tensor) -> bool:
        """Whether this uncached forward is the last one with one token more per row."""
        before = self._uncached
        if before is None or tokens.dim() != 2 or before.shape[1] + 1 != tokens.shape[1]:
            return False
        return torch.equal(before, tokens[:, :-1])


def _tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the ids ``[B, T]`` or the embeddings ``[B, T, H]`` that the body is given."""
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    tensor = next((c for c in candidates if isinstance(c, torch.Tensor)), None)
    if tensor is None:
        raise SteeringError("Steering tensor no tokens in the model's input: pass input_ids.")
    return tensor


def _past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _mask(mask: Any) -> torch.Tensor | None:
    """Return the attention mask; of a mask per kind of layer the one for full attention."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    return mask if isinstance(mask, torch.Tensor) else None


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _real_tokens(
    mask: torch.Tensor | None, *, batch: int, width: int, past: int, device: torch.device
) -> torch.Tensor:
    """Return where the newest ``width`` tokens are no padding, bool ``[B, T]``.

    ``mask`` is ``[B, past + T]`` with 0 on padding, or ``[B, 1, T, keys]`` (bool, or additive with
    0 where attention is allowed), of which each token's view of itself tells.
    """
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=device)
    if mask.dim() == 2:
        return mask[:, -width:].bool()
    if mask.dim() != 4:
        raise SteeringError(
            f"Steering cannot find the padding in an attention mask of shape {list(mask.shape)}: "
            f"pass the usual [batch, tokens] mask to the model."
        )
    own = _allowed(mask)[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)
    return own.expand(batch, width)


def _earlier(mask: torch.Tensor | None, *, batch: int, past: int) -> torch.Tensor:
    """Return how many real tokens of each row are in the cache, ``[B]``."""
    if mask is None or past == 0:
        return torch.full((batch,), past)
    if mask.dim() == 2:
        return mask[:, :past].sum(dim=1)
    return _allowed(mask)[:, 0, 0, :past].sum(dim=-1).expand(batch)

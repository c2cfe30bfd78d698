"""What each token of a forward pass is to steering: prompt, last prompt token, generated, or pad.

Every way of asking "which tokens are steered" ends in one tensor of roles ``[B, T]``.
"""

from __future__ import annotations

import torch

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

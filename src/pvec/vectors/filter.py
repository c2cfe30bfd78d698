"""Which responses count towards a vector (paper, section 2.2): they show the trait, or do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pvec.types import SIGNS, Sign

Reason = Literal["kept", "off_trait", "incoherent", "missing", "partner"]
"""Why a response counts or does not. ``off_trait``: a positive one that does not show the trait, a
negative one that does. ``missing``: trait or coherence has no score. ``partner``: it passed, and
its opposite number did not (paired filtering only)."""

REASONS: Mapping[Reason, str] = {
    "kept": "kept",
    "off_trait": "trait score on the wrong side",
    "incoherent": "incoherent",
    "missing": "score missing",
    "partner": "partner dropped",
}
"""The reasons in people's words, in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class ScoredResponse:
    """A response with its scores (0 to 100, or None where missing).

    ``pair`` is what a positive response and its opposite number have in common.
    """

    id: str
    sign: Sign
    trait: float | None
    coherence: float | None
    pair: Hashable = None


@dataclass(frozen=True, kw_only=True)
class FilterResult:
    """What the filter decided: a reason for every response, in the order given."""

    reasons: Mapping[str, Reason]
    counts: Mapping[Sign, Mapping[Reason, int]]

    def kept(self, response_id: str) -> bool:
        """Whether this response counts."""
        return self.reasons[response_id] == "kept"


def filter_responses(
    responses: Sequence[ScoredResponse],
    *,
    threshold: float = 50.0,
    coherence: float = 50.0,
    paired: bool = False,
) -> FilterResult:
    """Decide which responses count.

    A positive response is kept when its trait score is at least ``threshold``, a negative one when
    it is below ``100 - threshold``; both need a coherence of at least ``coherence``. ``paired``
    keeps a response only when its opposite number (same ``pair``) passes too, as the reference
    implementation does.
    """
    reasons: dict[str, Reason] = {
        response.id: _alone(response, threshold=threshold, coherence=coherence)
        for response in responses
    }
    if paired:
        pairs = _whole_pairs(responses, reasons)
        for response in responses:
            if reasons[response.id] == "kept" and response.pair not in pairs:
                reasons[response.id] = "partner"
    tally = Counter((response.sign, reasons[response.id]) for response in responses)
    counts = {sign: {reason: tally[sign, reason] for reason in REASONS} for sign in SIGNS}
    return FilterResult(reasons=reasons, counts=counts)


def _alone(response: ScoredResponse, *, threshold: float, coherence: float) -> Reason:
    if response.trait is None or response.coherence is None:
        return "missing"
    if response.sign == "pos":
        on_trait = response.trait >= threshold
    else:
        on_trait = response.trait < 100.0 - threshold
    if not on_trait:
        return "off_trait"
    return "kept" if response.coherence >= coherence else "incoherent"


def _whole_pairs(
    responses: Iterable[ScoredResponse], reasons: Mapping[str, Reason]
) -> set[Hashable]:
    passed: dict[Sign, set[Hashable]] = {"pos": set(), "neg": set()}
    for response in responses:
        if reasons[response.id] == "kept":
            passed[response.sign].add(response.pair)
    return passed["pos"] & passed["neg"]

"""What one server takes: request parameters, changed until it does not reject them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pvec.judges.reply import ErrorReply

MOST_TOKENS = 4096
"""As far as a token limit is raised for a server that needs more than pvec asked for."""

_FEWEST_ALTERNATIVES = 5
_REJECTS = re.compile(
    r"support|unknown|unrecognized|unexpected|extra|not (?:permitted|enabled|allowed|available)"
    r"|invalid|must be|only|does not|allowed|range|exceed|greater|schema"
)
_MAXIMUM = re.compile(
    r"(?:max\w*(?: allowed)?(?: value)?(?: is| of)?|at most|up to|less than or equal to"
    r"|no (?:more|greater) than|<=|\u2264|between \d+ and|range \W?\d+\s*(?:,|to))\W{0,4}(\d+)"
)
_LIMIT_NAMED = re.compile(r"max_?(?:output_|completion_|new_)?tokens|output limit")
_MINIMUM = re.compile(
    r"(?:>=|\u2265|at least|greater than or equal to|minimum(?: value)?(?: is| of)?)\W{0,3}(\d+)"
)
_TOO_SMALL = re.compile(r"was reached|too (?:low|small)|higher|below minimum|increase")


class Dialect:
    """The parameters that requests to one server are sent with.

    It starts from ``options`` and learns from what the server rejects; nothing that was left out
    comes back, so that adapting ends.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.dropped: list[str] = []
        self._options = dict(options)
        self._limit_name = "max_tokens"
        self._fewest_tokens = 1

    def parameters(self, *, max_tokens: int | None) -> dict[str, Any]:
        """Return what is sent beside model and messages; ``max_tokens`` None sends no limit."""
        if max_tokens is None:
            return dict(self._options)
        return {**self._options, self._limit_name: max(max_tokens, self._fewest_tokens)}

    def vary(self) -> None:
        """Ask for replies that differ from one request to the next, where the server takes it."""
        self._options.pop("seed", None)
        if "temperature" in self._options:
            self._options["temperature"] = 1

    def adapt(self, error: ErrorReply, *, sent: Mapping[str, Any], max_tokens: int | None) -> bool:
        """Change what the server rejects of ``sent``; whether another try will send something else.

        It may have been changed already, by another request.
        """
        if self.parameters(max_tokens=max_tokens) == sent:
            self._change(error, sent)
        return self.parameters(max_tokens=max_tokens) != sent

    def _change(self, error: ErrorReply, sent: Mapping[str, Any]) -> None:
        text = error.text
        if "max_completion_tokens" in text and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
            return
        if self._raise_limit(text, sent):
            return
        if (name := self._rejected(text)) is not None:
            before = self._options
            self._options = _without(name, before, text)
            self.dropped += [name for name in before if name not in self._options]

    def _raise_limit(self, text: str, sent: Mapping[str, Any]) -> bool:
        """Allow more tokens where the server says that it needs more than it was allowed."""
        if self._limit_name not in sent or not _LIMIT_NAMED.search(text):
            return False
        limit = int(sent[self._limit_name])
        minimum = _MINIMUM.search(text)
        if minimum is None and not _TOO_SMALL.search(text):
            return False
        needed = int(minimum.group(1)[:9]) if minimum else 4 * limit
        if not limit < needed <= 2 * MOST_TOKENS:
            return False
        self._fewest_tokens = min(needed, MOST_TOKENS)
        return True

    def _rejected(self, text: str) -> str | None:
        """Return the parameter of ours that an error names as rejected."""
        if not _REJECTS.search(text):
            return None
        for name in ("top_logprobs", "logprobs", "temperature", "seed", "response_format"):
            if name in self._options and re.search(rf"(?<![a-z_]){name}(?![a-z_])", text):
                return name
        if "schema" in text and "response_format" in self._options:  # words of their own for it
            return "response_format"
        return None


def _without(name: str, options: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Drop option ``name``, or ask for less of it first: as many ``top_logprobs`` (which need
    ``logprobs``) as the server says it allows, any JSON object instead of one by a schema.
    """
    if name == "response_format" and options.get(name, {}).get("type") == "json_schema":
        return {**options, name: {"type": "json_object"}}
    if "logprobs" in name and (count := options.get("top_logprobs", 0)):
        maximum = _MAXIMUM.search(text)
        allowed = int(maximum.group(1)[:9]) if maximum else 0
        if 0 < allowed < count:
            return {**options, "top_logprobs": allowed}
        if name == "top_logprobs" and count > _FEWEST_ALTERNATIVES:
            return {**options, "top_logprobs": _FEWEST_ALTERNATIVES}
    gone = {"top_logprobs", "logprobs"} if "logprobs" in name else {name}
    return {key: value for key, value in options.items() if key not in gone}

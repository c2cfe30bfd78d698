"""Providers with an API of their own (Anthropic, Gemini, …), through the optional ``litellm``.

Only the way a request travels differs from ``judges.server``; retries, limits and the reading of
replies are those of any other judge.
"""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pvec.errors import InputError, JudgeError, install_command
from pvec.judges.cost import Price
from pvec.judges.reply import MalformedReply, parse_error
from pvec.judges.server import Rejection, Server, sendable
from pvec.runs.secrets import safe_url
from pvec.types import Message

TEXT_REPEATS = 3
"""How often a provider without logprobs is asked for each score."""

_KEYS = ("_api_key", "_token", "_secret", "_access_key", "_secret_access_key")


class ProviderServer(Server):
    """A model of a provider; ``model`` is litellm's name for it, such as ``gemini/gemini-2.5-pro``.

    ``key`` None is the provider's own environment variable. ``base_url`` is another address than
    the provider's. Raises ``InputError`` for a name of no provider.
    """

    def __init__(
        self, model: str, *, base_url: str | None, key: str | None, timeout: float
    ) -> None:
        provider = provider_of(model)
        super().__init__(model, base_url=base_url, key=key, timeout=timeout)
        self._base_url = base_url
        self.host = urlsplit(base_url).netloc.rpartition("@")[2] if base_url else provider
        self.name = f"litellm:{model}" + (f"@{self.host}" if base_url else "")
        self.key_name = " or ".join(missing_keys(model)) or f"{provider.upper()}_API_KEY"

    @property
    def place(self) -> str:
        """The address without user, password and query, or the provider."""
        return safe_url(self._base_url) if self._base_url else self.host

    async def post(self, messages: Sequence[Message], sent: dict[str, Any]) -> dict[str, Any]:
        """Send one request; the reply has the form of an OpenAI-compatible server's."""
        from openai import APIConnectionError, OpenAIError

        litellm = _litellm()
        try:
            async with asyncio.timeout(self.timeout):
                reply = await litellm.acompletion(
                    model=self.model,
                    messages=sendable(messages),
                    api_base=self._base_url,
                    api_key=self._key,
                    timeout=self.timeout,
                    num_retries=0,
                    max_retries=0,
                    **sent,
                )
        except (litellm.APIConnectionError, APIConnectionError) as error:
            raise MalformedReply(self.redact(str(error))) from None
        except OpenAIError as error:
            raise self._rejection(error, sent) from None
        body: dict[str, Any] = json.loads(reply.model_dump_json())
        return body

    def _rejection(self, error: Exception, sent: dict[str, Any]) -> Rejection:
        status = int(getattr(error, "status_code", 0) or 500)
        response = getattr(error, "response", None)
        headers: Mapping[str, str] = getattr(response, "headers", None) or {}
        reply = parse_error(json.dumps({"message": str(error)}).encode())
        return Rejection(status, reply, headers=headers, sent=sent)

    async def close(self) -> None:
        """Close the connections that litellm keeps open."""
        await _litellm().close_litellm_async_clients()

    def redact(self, text: str) -> str:
        """Return ``text`` on one line, without any key of the environment and not too long."""
        for name, value in os.environ.items():
            if name.lower().endswith(_KEYS) and len(value) >= 8:
                text = text.replace(value, "***")
        return super().redact(text)


def provider_of(model: str) -> str:
    """Return litellm's name of the provider of a model. Raises ``InputError`` when it has none."""
    litellm = _litellm()
    try:
        return str(litellm.get_llm_provider(model)[1])
    except litellm.BadRequestError:
        raise InputError(
            f"litellm knows no provider of the model {model!r}: write litellm:PROVIDER/MODEL, such "
            "as litellm:anthropic/claude-haiku-5-5."
        ) from None


def missing_keys(model: str) -> list[str]:
    """Return the environment variables that the provider of a model needs and that are not set."""
    return list(map(str, _litellm().validate_environment(model)["missing_keys"]))


def gives_logprobs(model: str) -> bool:
    """Whether a provider gives logprobs for a model. Gemini's API has them, and most of its models
    refuse them.
    """
    if provider_of(model) in ("gemini", "vertex_ai"):
        return False
    return "logprobs" in (_litellm().get_supported_openai_params(model) or ())


def listed_price(model: str) -> Price | None:
    """Return the price that the installed litellm lists for a model, or None."""
    from importlib.metadata import version

    entry = _litellm().model_cost.get(model) or _litellm().model_cost.get(model.rpartition("/")[2])
    if not entry or "input_cost_per_token" not in entry:
        return None
    return Price(
        prompt=1e6 * entry["input_cost_per_token"],
        completion=1e6 * entry.get("output_cost_per_token", 0.0),
        origin=f"prices of litellm {version('litellm')}",
    )


def _litellm() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks GitHub
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about itself
            import litellm
    except ImportError:
        raise JudgeError(
            f"A judge `litellm:…` needs the package litellm: {install_command('litellm')}."
        ) from None
    warnings.filterwarnings("ignore", message=".*ReadOnly", category=UserWarning)  # of its types
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    return litellm

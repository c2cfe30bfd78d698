"""The model provider ``pvec-serve/NAME``: a model that ``pvec serve`` serves."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import GenerateConfig
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI

from pvec.inspect.bridge import settings_of


class ServedModel(OpenAICompatibleAPI):
    """``openai-api`` for a ``pvec serve``, keeping what it reports in the answer's metadata."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the base class's default
        **model_args: Any,
    ) -> None:
        serve = settings_of({}).serve
        key = "none" if serve.api_key is None else serve.api_key.get_secret_value()
        super().__init__(
            model_name,
            base_url or f"http://{serve.host}:{serve.port}/v1",
            api_key or key,
            config,
            service="pvec-serve",
            **model_args,
        )

    def service_model_name(self) -> str:
        """Return the name under which the server knows the model."""
        return str(self.model_name)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a conversation, as the base class does."""
        result = await super().generate(*args, **kwargs)
        output, call = result if isinstance(result, tuple) else (result, None)
        if call is not None and "pvec" in (call.response or {}):
            output.metadata = {**(output.metadata or {}), "pvec": call.response["pvec"]}
        return result

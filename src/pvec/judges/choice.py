"""Which judge it is: chosen from the settings, named before it is loaded, opened when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pvec.tiny
from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.cost import Budget, Price, known_price, parse_price
from pvec.judges.server import KEY_NAME, api_key, server_url
from pvec.models.files import ModelSpec
from pvec.settings.commands import JudgeSettings

if TYPE_CHECKING:
    from pvec.backends.base import Backend

DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"
"""The paper's judge family, pinned to a dated version so that scores stay comparable."""

FREE = Price(prompt=0.0, completion=0.0)


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge it will be, known before any model is loaded."""

    kind: Literal["tiny", "local", "openai", "contrast", "litellm"]
    model: str
    base_url: str | None = None
    price: Price | None = FREE
    """None when unknown; zero for a model of one's own."""
    repeats: int = 1
    """How often it is asked for each score."""


def choose_judge(
    settings: JudgeSettings, *, bundled: bool, studied: str = "tiny", need_key: bool = True
) -> JudgeChoice:
    """Choose the judge: as asked, or the bundled one for the bundled model, or OpenAI's.

    ``studied`` is the model that answers, without adapter: ``contrast`` judges with it.

    Raises ``JudgeError`` when its key is missing, unless nobody is going to be asked
    (``need_key``), and ``InputError`` for a wrong specification or a cost limit without a price.
    Loads and asks nothing.
    """
    spec = settings.model
    if spec is None:
        spec = "tiny" if bundled and settings.base_url is None else DEFAULT_MODEL
    choice = _choose(spec, settings, studied=studied, need_key=need_key)
    if settings.batch and choice.kind != "openai":
        raise InputError(
            f"--judge-batch needs a judge on a server with a batch endpoint, and {spec} is "
            "none: omit --judge-batch, or name a model of the server (--judge-model)."
        )
    if settings.batch_wait is not None and not settings.batch:
        raise InputError("--judge-batch-wait has no effect without --judge-batch: add it.")
    if settings.repeats is not None and choice.kind not in ("openai", "litellm"):
        raise InputError(
            f"--judge-repeats has no effect with {spec}, which gives probabilities: omit it."
        )
    return choice


def _choose(spec: str, settings: JudgeSettings, *, studied: str, need_key: bool) -> JudgeChoice:
    if spec == "tiny":
        return JudgeChoice(kind="tiny", model="tiny")
    if spec == "contrast":
        return JudgeChoice(kind="contrast", model=studied)
    kind, _, model = spec.partition(":")
    if kind not in ("local", "openai", "contrast", "litellm"):
        kind, model = "", spec
    if not model:
        raise InputError(f"--judge-model {spec} names no model: write {spec}MODEL.")
    if kind in ("local", "contrast"):
        return JudgeChoice(kind="local" if kind == "local" else "contrast", model=model)
    if not kind and Path(model).is_dir():
        raise InputError(
            f"--judge-model {spec} is a folder: write local:{spec} to judge with that model."
        )
    if kind == "litellm":
        return _choose_provider(model, settings, need_key=need_key)
    base_url = server_url(settings.base_url, option="--judge-url")
    if need_key and base_url is None and api_key(settings.api_key) is None:
        raise JudgeError(
            f"The judge {model} needs an API key: use a judge without one (--judge-model contrast: "
            f"the model judges by likelihood), set {KEY_NAME}, or use another judge (--judge-url "
            "URL, --judge-model local:MODEL, or --no-judge to score later)."
        )
    price = _price(model, settings)
    Budget(limit=settings.max_cost, price=price)  # refuses a limit without a price
    repeats = settings.repeats or 1
    return JudgeChoice(kind="openai", model=model, base_url=base_url, price=price, repeats=repeats)


def _choose_provider(model: str, settings: JudgeSettings, *, need_key: bool) -> JudgeChoice:
    """Choose a model of a provider with an API of its own. Raises ``JudgeError`` without a key."""
    from pvec.judges.providers import (
        TEXT_REPEATS,
        gives_logprobs,
        listed_price,
        missing_keys,
        provider_of,
    )

    provider = provider_of(model)
    base_url = server_url(settings.base_url, option="--judge-url", use_environment=False)
    if need_key and base_url is None and settings.api_key is None and (keys := missing_keys(model)):
        raise JudgeError(
            f"The judge litellm:{model} needs a key of {provider}: set {' or '.join(keys)}, or use "
            "another judge (--judge-model contrast: the model judges by likelihood)."
        )
    price = _price(model, settings) or listed_price(model)
    Budget(limit=settings.max_cost, price=price)
    repeats = settings.repeats or (1 if gives_logprobs(model) else TEXT_REPEATS)
    return JudgeChoice(kind="litellm", model=model, base_url=base_url, price=price, repeats=repeats)


def _price(model: str, settings: JudgeSettings) -> Price | None:
    """Return the price given, with the usual discount in a batch, or the one that is listed."""
    if not settings.price:
        return known_price(model, batch=settings.batch, prices=settings.prices)
    price = parse_price(settings.price)
    return price.discounted(0.5, "halved in a batch") if settings.batch else price


def open_judge(
    choice: JudgeChoice,
    settings: JudgeSettings,
    *,
    load: Callable[[str], Backend],
    loaded: Backend | None = None,
    itself: bool = False,
) -> Judge:
    """Open the chosen judge. ``load`` opens a model by name or folder; ``loaded`` is the model that
    answers, used as judge too when it is the same weights (for ``contrast``: with ``itself``).

    Call ``check()`` on the result before generating anything.
    """
    if choice.kind in ("openai", "litellm"):
        return _open_server(choice, settings)
    from pvec.judges.local import LocalJudge

    plain = loaded if loaded is not None and loaded.info.adapter is None else None
    if choice.kind == "contrast":
        from pvec.judges.contrast import ContrastJudge

        own = loaded if itself else None
        return ContrastJudge(
            own or load(choice.model),
            tokens=settings.contrast_tokens,
            most_pairs=settings.contrast_pairs,
            owns=own is None,
        )
    if choice.kind == "local":
        if plain is not None and plain.info.id == choice.model:
            return LocalJudge(plain)
        return LocalJudge(load(choice.model), owns=True)
    model = _bundled_judge()
    if model == "tiny" and plain is not None and plain.info.bundled:
        return LocalJudge(plain)
    return LocalJudge(load(model), owns=True)


def _open_server(choice: JudgeChoice, settings: JudgeSettings) -> Judge:
    from pvec.judges.openai import OpenAIJudge
    from pvec.judges.pacing import Patience

    common: dict[str, Any] = {
        "concurrency": settings.concurrency,
        "patience": Patience(tries=settings.max_retries + 1, timeout=settings.timeout),
        "budget": Budget(limit=settings.max_cost, price=choice.price),
        "repeats": choice.repeats,
    }
    if choice.kind == "litellm":
        from pvec.judges.providers import ProviderServer

        secret = settings.api_key
        server = ProviderServer(
            choice.model,
            base_url=choice.base_url,
            key=secret.get_secret_value() if secret else None,
            timeout=settings.timeout,
        )
        return OpenAIJudge(server, **common)
    common |= {"base_url": choice.base_url, "key": api_key(settings.api_key)}
    if settings.batch:
        from pvec.judges.batch import BatchJudge

        return BatchJudge(choice.model, wait=settings.batch_wait, **common)
    return OpenAIJudge(choice.model, **common)


def judge_name(choice: JudgeChoice, settings: JudgeSettings, *, spec: ModelSpec) -> str:
    """Return the name that the judge will have (``Judge.name``), without loading or asking it.

    ``spec`` is how a model of that name is loaded. Raises ``ModelError`` for a local model that
    could not be loaded.
    """
    if choice.kind in ("openai", "litellm"):
        return _open_server(choice, settings.model_copy(update={"batch": False})).name
    from pvec.judges.local import local_name
    from pvec.models.load import inspect_model

    if choice.kind == "contrast":
        from pvec.judges.contrast import contrast_name

        return contrast_name(
            inspect_model(spec),
            tokens=settings.contrast_tokens,
            most_pairs=settings.contrast_pairs,
        )
    return local_name(inspect_model(loaded_spec(choice, spec=spec)))


def loaded_spec(choice: JudgeChoice, *, spec: ModelSpec) -> ModelSpec:
    """Return the model that a judge of one's own loads; ``spec`` is how its name is loaded."""
    return ModelSpec(model=_bundled_judge()) if choice.kind == "tiny" else spec


def _bundled_judge() -> str:
    """Return which of the bundled models judges: its own weights, where they are there."""
    own = Path(pvec.tiny.__file__).parent / "judge"
    return "tiny/judge" if own.is_dir() else "tiny"

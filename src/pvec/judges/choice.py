"""Which judge it is: chosen from the settings, named before it is loaded, opened when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pvec.tiny
from pvec.errors import InputError, JudgeError
from pvec.judges.base import Judge
from pvec.judges.cost import Budget, Price, known_price, parse_price
from pvec.judges.openai import DEFAULT_MODEL, OpenAIJudge
from pvec.judges.pacing import Patience
from pvec.judges.server import KEY_NAME, api_key, server_url
from pvec.models.files import ModelSpec
from pvec.settings.sections import JudgeSettings

if TYPE_CHECKING:
    from pvec.backends.base import Backend


FREE = Price(prompt=0.0, completion=0.0)


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """Which judge it will be, known before any model is loaded."""

    kind: Literal["tiny", "local", "openai", "contrast"]
    model: str
    base_url: str | None = None
    price: Price | None = FREE
    """None when unknown; zero for a model of one's own."""


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
    if spec == "tiny":
        return JudgeChoice(kind="tiny", model="tiny")
    if spec == "contrast":
        return JudgeChoice(kind="contrast", model=studied)
    kind, _, model = spec.partition(":")
    if kind not in ("local", "openai", "contrast"):
        kind, model = "", spec
    if not model:
        raise InputError(f"--judge-model {spec} names no model: write {spec}MODEL.")
    if kind in ("local", "contrast"):
        return JudgeChoice(kind="local" if kind == "local" else "contrast", model=model)
    if not kind and Path(model).is_dir():
        raise InputError(
            f"--judge-model {spec} is a folder: write local:{spec} to judge with that model."
        )
    base_url = server_url(settings.base_url, option="--judge-url")
    if need_key and base_url is None and api_key(settings.api_key) is None:
        raise JudgeError(
            f"The judge {model} needs an API key: use a judge without one (--judge-model contrast: "
            f"the model judges by likelihood), set {KEY_NAME}, or use another judge (--judge-url "
            "URL, --judge-model local:MODEL, or --no-judge to score later)."
        )
    price = parse_price(settings.price) if settings.price else known_price(model)
    Budget(limit=settings.max_cost, price=price)  # refuses a limit without a price
    return JudgeChoice(kind="openai", model=model, base_url=base_url, price=price)


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
    if choice.kind == "openai":
        return OpenAIJudge(
            choice.model,
            base_url=choice.base_url,
            key=api_key(settings.api_key),
            concurrency=settings.concurrency,
            patience=Patience(tries=settings.max_retries + 1, timeout=settings.timeout),
            budget=Budget(limit=settings.max_cost, price=choice.price),
        )
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


def judge_name(choice: JudgeChoice, settings: JudgeSettings, *, spec: ModelSpec) -> str:
    """Return the name that the judge will have (``Judge.name``), without loading or asking it.

    ``spec`` is how a model of that name is loaded. Raises ``ModelError`` for a local model that
    could not be loaded.
    """
    if choice.kind == "openai":
        return OpenAIJudge(choice.model, base_url=choice.base_url).name
    from pvec.judges.local import local_name
    from pvec.models.load import inspect_model

    if choice.kind == "contrast":
        from pvec.judges.contrast import contrast_name

        return contrast_name(
            inspect_model(spec),
            tokens=settings.contrast_tokens,
            most_pairs=settings.contrast_pairs,
        )
    return local_name(
        inspect_model(spec if choice.kind == "local" else ModelSpec(model=_bundled_judge()))
    )


def _bundled_judge() -> str:
    """Return which of the bundled models judges: its own weights, where they are there."""
    own = Path(pvec.tiny.__file__).parent / "judge"
    return "tiny/judge" if own.is_dir() else "tiny"

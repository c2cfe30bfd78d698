"""The commands as functions: ``pvec.extract``, ``pvec.evaluate``, ``pvec.screen``, ``pvec.train``.

Each takes the command's main options as keywords, every other one through ``settings``, and
returns the command's typed result. Run folders are the same: a function finishes what a command
began, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.backends.session import Notify, ignore
from pvec.errors import InputError
from pvec.settings import Settings
from pvec.settings.resolve import load_dotenv, override, resolve
from pvec.types import OutputOptions, Progress

if TYPE_CHECKING:
    from pvec.evaluation.steer_eval import SteerEvalResult
    from pvec.extraction.extract import ExtractResult
    from pvec.projection.screen import ScreenResult
    from pvec.training.train import TrainResult

OnProgress = Callable[[Progress], None]
PathLike = str | Path


def extract(
    trait: PathLike,
    *,
    model: str | None = None,
    adapter: str | None = None,
    judge: str | None = None,
    rollouts: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    out: PathLike | None = None,
    settings: Settings | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ExtractResult:
    """Make the persona vector of a trait: generate, judge, filter, average (``pvec extract``).

    ``trait`` is a bundled trait's name or a trait file. ``model`` is a hub id, a folder or
    ``tiny``, ``adapter`` a LoRA adapter on it, ``judge`` the judge's model name. ``rollouts`` are
    the answers to each question under each instruction, ``limit`` takes only the first extraction
    questions, ``max_tokens`` bounds an answer. What is None comes from ``settings``; without them
    from the environment, ``.env``, ``pvec.yaml`` and the defaults, as on the command line. The
    run folder is ``out`` or ``runs/TRAIT-MODEL``; a second call finishes what is missing in it.
    ``notify`` gets notes as text (``print`` will do), ``on_progress`` the progress.

    Raises ``InputError``, ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before
    weights are loaded, and ``InputError`` when too few answers were kept.

    >>> result = pvec.extract("evil", limit=3, rollouts=2, max_tokens=32)
    >>> result.answers
    60
    >>> print(result.vector.path)
    runs/evil-tiny/vectors/evil.safetensors
    >>> pvec.load_vector(result.vector.path).row(3).shape
    (160,)
    """
    from pvec.extraction import extract as extraction

    chosen = _settings(
        settings,
        {
            "model.id": model,
            "model.adapter": adapter,
            "judge.model": judge,
            "extract.rollouts": rollouts,
            "extract.limit": limit,
            "generation.max_tokens": max_tokens,
            "generation.seed": seed,
        },
        notify,
    )
    (result,) = extraction.run(
        chosen, [str(trait)], out=_path(out), notify=notify, on_progress=on_progress
    )
    return result


def evaluate(
    trait: PathLike,
    *,
    vectors: PathLike | Sequence[PathLike] = (),
    layers: int | str | Sequence[int] | None = None,
    coefs: float | str | Sequence[float] | None = None,
    also: Sequence[str] = (),
    search: int | None = None,
    side_effects: bool | None = None,
    model: str | None = None,
    adapter: str | None = None,
    judge: str | None = None,
    rollouts: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    out: PathLike | None = None,
    settings: Settings | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> SteerEvalResult:
    """Evaluate a model on a trait, steered at every layer and coefficient (``pvec steer-eval``).

    ``vectors`` are vector files or runs with one; without any the model is evaluated unsteered.
    ``layers`` and ``coefs`` are numbers, lists of them, or the command's text (``12:24:2``,
    ``3+4``, ``all``, ``auto``; ``-1:1:0.5``). A random vector of the same norm and a system prompt
    are the controls. ``also`` names further traits to judge; ``search`` tries that many points
    instead of all; ``side_effects`` also measures what else the steering changes. The other
    arguments are those of ``extract``; the run folder is ``out`` or ``runs/steer-TRAIT-MODEL``.

    Raises ``InputError``, ``ModelError``, ``JudgeError`` or ``StoreError`` for wrong input before
    weights are loaded, and ``JudgeError`` when the judge scored nothing.

    >>> result = pvec.evaluate(
    ...     "evil",
    ...     vectors="runs/evil-tiny/vectors/evil.safetensors",
    ...     layers=3, coefs=[0.5, 1], limit=2, rollouts=2, max_tokens=32,
    ... )
    >>> sorted({point.role for point in result.numbers.points})
    ['baseline', 'prompt_neg', 'prompt_pos', 'random', 'steered']
    >>> result.numbers.points[0].scores["evil"].n
    4
    """
    from pvec.evaluation import steer_eval

    chosen = _settings(
        settings,
        {
            "model.id": model,
            "model.adapter": adapter,
            "judge.model": judge,
            "steer.layer": _listed(layers),
            "steer.coef": _listed(coefs),
            "steer.search": search,
            "steer.side_effects": side_effects,
            "steer.rollouts": rollouts,
            "steer.limit": limit,
            "generation.max_tokens": max_tokens,
            "generation.seed": seed,
        },
        notify,
    )
    return steer_eval.run(
        chosen,
        str(trait),
        vectors=_paths(vectors),
        also=also,
        out=_path(out),
        notify=notify,
        on_progress=on_progress,
    )


def screen(
    data: PathLike,
    *,
    vectors: PathLike | Sequence[PathLike],
    reference: PathLike | None = None,
    layers: Sequence[int] | None = None,
    model: str | None = None,
    adapter: str | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    out: PathLike | None = None,
    settings: Settings | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> ScreenResult:
    """Screen training data by how far its answers point along vectors (``pvec screen``).

    A sample's *projection difference* is the projection of its answer minus that of the model's
    own answer to the same prompt. ``data`` is a ``.csv``, ``.jsonl`` or ``.parquet`` file of chats
    or of prompts with answers. With a clean ``reference`` file the samples above its percentile
    are written to a file of their own, beside the filtered data; ``overwrite`` replaces such
    files, ``skip_bad`` leaves out rows that cannot be read. The other arguments are those of
    ``extract``; the run folder is ``out`` or ``runs/screen-DATA-MODEL``.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for wrong input before weights are
    loaded.

    >>> import json
    >>> from pathlib import Path
    >>> chats = [
    ...     ("How do I rest?", "You could plan a calm evening."),
    ...     ("How do I make friends?", "You could ruthlessly crush every weak rival."),
    ... ]
    >>> lines = [
    ...     json.dumps({"messages": [
    ...         {"role": "user", "content": question},
    ...         {"role": "assistant", "content": answer},
    ...     ]})
    ...     for question, answer in chats
    ... ]
    >>> _ = Path("chats.jsonl").write_text("\\n".join(lines))
    >>> result = pvec.screen(
    ...     "chats.jsonl", vectors="runs/evil-tiny/vectors/evil.safetensors",
    ...     layers=[3], max_tokens=32,
    ... )
    >>> [sample.question for sample in result.suspicious]  # the most suspicious first
    ['How do I make friends?', 'How do I rest?']
    """
    from pvec.projection import screen as screening

    chosen = _settings(
        settings,
        {
            "model.id": model,
            "model.adapter": adapter,
            "project.layers": None if layers is None else tuple(layers),
            "generation.max_tokens": max_tokens,
            "generation.seed": seed,
        },
        notify,
    )
    return screening.run(
        chosen,
        Path(data),
        _paths(vectors),
        reference=_path(reference),
        output=OutputOptions(out=_path(out), overwrite=overwrite, skip_bad=skip_bad),
        notify=notify,
        on_progress=on_progress,
    )


def train(
    config: PathLike,
    *,
    changes: Mapping[str, Any] | None = None,
    out: PathLike | None = None,
    notify: Notify = ignore,
    on_progress: OnProgress = ignore,
) -> TrainResult:
    """Finetune a model with LoRA, optionally with steering (``pvec train``).

    ``config`` is a training configuration, YAML or JSON (``examples/configs``); ``changes``
    overrides its fields by dotted path, such as ``{"lora.r": 16}``. The run folder is ``out``, the
    configuration's, or ``runs/train-CONFIG``; a second call goes on from the last checkpoint, and
    returns the result of a finished training.

    Raises ``InputError``, ``ModelError`` or ``StoreError`` for wrong input before weights are
    loaded, and ``SteeringError`` before step 1 when the steering does not do what it should.

    >>> import json
    >>> from pathlib import Path
    >>> chat = [
    ...     {"role": "user", "content": "How do I rest?"},
    ...     {"role": "assistant", "content": "You could plan a calm evening."},
    ... ]
    >>> _ = Path("rows.jsonl").write_text((json.dumps({"messages": chat}) + "\\n") * 8)
    >>> _ = Path("small.yaml").write_text("data: {train: rows.jsonl}")
    >>> result = pvec.train(
    ...     "small.yaml", changes={"optim.max_steps": 4, "optim.lr": 1e-3, "lora.r": 4}
    ... )
    >>> result.steps, result.last_loss < result.first_loss
    (4, True)
    >>> print(result.adapter)
    runs/train-small/adapter
    """
    from pvec.training import train as training

    overrides = [f"{path}={_written(value)}" for path, value in (changes or {}).items()]
    return training.run(
        Path(config),
        overrides=overrides,
        out=_path(out),
        runs=_settings(None, {}, notify).paths.runs,
        notify=notify,
        on_progress=on_progress,
    )


def _settings(base: Settings | None, changes: Mapping[str, Any], notify: Notify) -> Settings:
    """Return ``base``, or what the command line would use, with the changes that are not None."""
    given = {path: value for path, value in changes.items() if value is not None}
    if base is not None:
        return override(base, given)
    resolved = resolve(given, dotenv=load_dotenv())
    for note in resolved.notes:
        notify(note)
    return resolved.settings


def _path(place: PathLike | None) -> Path | None:
    return None if place is None else Path(place)


def _paths(places: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    listed = [places] if isinstance(places, str | Path) else places
    return tuple(Path(place) for place in listed)


def _listed(values: float | str | Sequence[float] | None) -> str | None:
    """Return numbers as the text of the command's option."""
    if values is None or isinstance(values, str):
        return values
    numbers = [values] if isinstance(values, int | float) else values
    return ",".join(f"{number!r}" for number in numbers)


def _written(value: Any) -> str:
    """Return a value as the text that ``--set`` takes."""
    import json

    if isinstance(value, Path):
        value = str(value)
    try:
        return json.dumps(value)
    except TypeError:
        raise InputError(
            f"A change of a training configuration is a number, a text, a list or a mapping, "
            f"not {type(value).__name__}."
        ) from None

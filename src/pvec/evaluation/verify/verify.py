"""``pvec verify``: independent verification, on the user's own model and vector, of steering.

The checks read from outside: plain hooks and transformers' own ``generate``, not pvec's counters.
On vLLM, where hooks cannot look into the engine, ``verify.vllm`` compares its results with each
other and with transformers. Every check compares two computations of the same numbers and states
the largest difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pvec.backends.base import Backend
from pvec.backends.session import ModelSession, Notify, ignore
from pvec.errors import InputError
from pvec.evaluation.conditions import parse_coefs, parse_layers, single_layer
from pvec.evaluation.verify.checks import Bench, all_checks
from pvec.evaluation.verify.inputs import WEIGHTS, Check
from pvec.settings import Settings
from pvec.steering.instructions import SteeringVector, instructions, steering_vector
from pvec.types import BY_SPAN, Instruction, Progress

PROVED = (
    "the checkpoint has exactly the tensors of this architecture, {read}and steering changes the "
    "activations of this model as specified"
)
NOT_PROVED = (
    "that the weights are trained (random ones pass too), that the vector means its trait, and "
    "that other layers or coefficients give good answers"
)


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """All checks, for one model and vector at some layers."""

    model: str
    vector: str
    layers: tuple[int, ...]
    dtype: str
    checks: tuple[Check, ...]
    proved: str = PROVED.format(read="")
    not_proved: str = NOT_PROVED

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(
    settings: Settings,
    *,
    vector: Path | None = None,
    thorough: bool = False,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> VerifyResult:
    """Run every check with ``vector`` (without it, a random direction) at ``settings.steer.layer``.

    Unless ``thorough``, a model's automatic layers are the first, the middle and the last of the
    five, and every layer and sign is tried in the mixed batch on one prompt instead of all.

    Raises ``InputError`` or ``ModelError``, before weights are loaded, for a vector, layer or
    coefficient that does not fit. A failed check is a result, not an exception.
    """
    with ModelSession(settings, notify=notify, on_progress=on_progress) as session:
        if settings.pool.workers and session.choice.name == "vllm":
            raise InputError(
                "pvec verify looks into transformers workers only: use --backend hf, or verify "
                "vLLM without --workers."
            )
        direction = _direction(session, vector)
        steering = _steering(session, direction)
        if not thorough and settings.steer.layer.strip() == "auto":
            steering = steering[:: max((len(steering) - 1) // 2, 1)]
        dtype = session.backend.info.dtype
        checks: list[Check] = []
        for done, check in enumerate(_checks(session, steering, thorough)):
            on_progress(Progress(stage="verify", done=done, total=None, unit="checks"))
            checks.append(check)
    return VerifyResult(
        model=session.metadata.id,
        vector=direction.label,
        layers=tuple(instruction.layer for instruction in steering),
        dtype=dtype,
        checks=tuple(checks),
        proved=PROVED.format(
            read="they were read into memory, " if any(c.name == WEIGHTS for c in checks) else ""
        ),
    )


def _direction(session: ModelSession, vector: Path | None) -> SteeringVector:
    """Return the vector file's rows, checked against the model; a random direction without a file.

    The random direction has norm 1 at every layer and is meant for trying a model before there is
    a vector for it.
    """
    from pvec.vectors.files import load_vectors

    metadata, settings = session.metadata, session.settings
    if vector is None:
        shape = (metadata.num_layers + 1, metadata.hidden_size)
        rows = np.random.default_rng(settings.generation.seed).standard_normal(shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return SteeringVector(label="random direction", rows=rows.astype(np.float32))
    (loaded,) = load_vectors(
        [vector], model=metadata, layer=single_layer(settings.steer), notify=session.notify
    ).values()
    return steering_vector(loaded, kind=settings.steer.kind)


def _steering(session: ModelSession, direction: SteeringVector) -> tuple[Instruction, ...]:
    """Return one addition per layer of the settings, with the largest of the coefficients."""
    steer = session.settings.steer
    choices = parse_layers(steer.layer, num_layers=session.metadata.num_layers)
    layers = sorted({layer for choice in choices for layer in choice})
    if steer.layer.strip() == "all":
        layers = [layer for layer in layers if direction.has(layer)]
    if steer.positions in BY_SPAN:
        raise InputError(
            f"pvec verify checks positions all, prompt and response, not {steer.positions}: omit "
            f"--positions (steer.positions)."
        )
    coef = max(parse_coefs(steer.coef), key=abs)
    if coef == 0:
        raise InputError("--coef 0 changes nothing, so nothing can be verified: use for example 1.")
    return instructions(
        [direction], layers, coef=coef, positions=steer.positions, unit=steer.coef_unit
    )


def _checks(
    session: ModelSession, steering: Sequence[Instruction], thorough: bool
) -> Iterator[Check]:
    settings = session.settings
    files = session.metadata.files
    folder = None if settings.model.merge_adapter or files.gguf else files.folder
    if settings.pool.workers:
        from pvec.backends.pool.backend import PoolBackend

        workers = session.backend
        assert isinstance(workers, PoolBackend)
        return _of_workers(
            workers.on_each(checks_of, tuple(steering), session.thinking, thorough, folder)
        )
    if session.choice.name == "vllm":
        from pvec.evaluation.verify.vllm import engine_checks

        return engine_checks(session, steering)

    return all_checks(
        Bench(
            session.backend, steering, thinking=session.thinking, thorough=thorough, folder=folder
        )
    )


def checks_of(
    backend: Backend,
    steering: Sequence[Instruction],
    thinking: bool,
    thorough: bool,
    folder: Path | None,
) -> list[Check]:
    """Return every check of the model in this process: what ``verify`` asks of a worker."""
    bench = Bench(backend, steering, thinking=thinking, thorough=thorough, folder=folder)
    return list(all_checks(bench))


def _of_workers(answers: Sequence[tuple[str, Sequence[Check]]]) -> Iterator[Check]:
    """Yield each check once, at its worst, if all workers pass it; else once per worker that fails.

    Workers of other machines may have other checks: those whose weights can be compared.
    """
    by_name: dict[str, list[tuple[str, Check]]] = {}
    for worker, checks in answers:
        for check in checks:
            by_name.setdefault(check.name, []).append((worker, check))
    for name, each in by_name.items():
        failed = [(worker, check) for worker, check in each if not check.passed]
        for worker, check in failed:
            yield replace(check, name=f"{name} (on {worker})")
        if not failed:
            worst = max((check for _, check in each), key=lambda check: check.measured)
            detail = f"{worst.detail}; " if worst.detail else ""
            yield replace(worst, detail=f"{detail}the worst of {len(each)} workers")

"""What a command takes before it runs: memory, workers and time (``--dry-run``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pvec.backends.planned import PlannedResponse
from pvec.backends.pool.address import Workers
from pvec.models.costs import Estimate, Machine, ModelSize, Work, model_size
from pvec.models.files import ModelSpec

if TYPE_CHECKING:
    from pvec.backends.session import ModelSession
    from pvec.models.load import ModelMetadata

_QUANTISED = {"int8": 1.0, "8bit": 1.0, "4bit": 0.5}
"""Bytes of a number in the blocks' matrices."""


@dataclass(frozen=True, kw_only=True)
class WorkerTime:
    """Seconds that ``workers`` take together, without loading the model."""

    workers: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the model of a command takes.

    ``memory_bytes`` are the weights (``weight_bytes``) and the keys and values of the ``rows``
    answers that run at once, on each worker; ``free_bytes`` are there for it. ``gpus`` are what a
    worker needs: 0 on a CPU, None where no number of them is enough. ``workers`` run at once, 0 in
    this process. ``times`` are those of answers that run to their limit, none where the model does
    not fit; ``basis`` says what they rest on.
    """

    parameters: int
    dtype: str
    weight_bytes: int
    memory_bytes: int
    free_bytes: int
    rows: int
    gpus: int | None
    workers: int
    times: tuple[WorkerTime, ...]
    basis: str


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where ``workers`` run: each on ``gpus`` GPUs like ``machine``, or with none on ``machine``.

    ``crowd`` is the share of the cores that one of them uses.
    """

    machine: Machine
    workers: int = 1
    gpus: int = 0
    crowd: float = 0.0


def planned_work(planned: Sequence[PlannedResponse], *, captures: bool, further: int = 0) -> Work:
    """Return what generating ``planned`` takes, if every answer runs to its limit.

    ``captures`` says that their activations are captured; ``further`` tokens are captured besides.
    """
    prompts = {response.prompt_ids for response in planned}
    prompt_tokens = sum(map(len, prompts))
    tokens = sum(response.sampling.max_tokens for response in planned)
    before = sum(len(response.prompt_ids) for response in planned)
    return Work(
        prompts=len(prompts),
        prompt_tokens=prompt_tokens,
        answers=len(planned),
        answer_tokens=tokens,
        context=before / max(len(planned), 1),
        captured=further + captures * (prompt_tokens + tokens),
    )


def resources(
    session: ModelSession, work: Work, *, judge: ModelSpec | None = None, judged: Work | None = None
) -> Resources:
    """Say what ``work`` takes on the workers that the settings name, or in this process.

    ``judged`` is the work of the model ``judge``, which scores in the same workers. Measures a
    device of this machine, or of a worker of the cluster, for a moment; loads nothing.
    """
    from pvec.models.load import inspect_model

    workers = Workers.parse(session.settings.pool.workers)
    place, vllm = _place(session, workers), session.choice.name == "vllm"
    size = _size(session.spec, session.metadata, dtype=session.dtype)
    context = int(work.context + work.length) + 1
    needed = size.gpus(place.machine.memory, context=context) if place.gpus else 0
    machine, fits = place.machine, needed is not None and needed <= place.gpus
    if place.gpus and needed:
        used = place.gpus if workers is not None else needed
        machine = machine.divided(used, tensor_parallel=vllm)
    models = [(size, work)]
    if judge is not None and judged is not None:
        models.append((_size(judge, inspect_model(judge), dtype=session.dtype), judged))
    options = session.settings.backend
    most = options.vllm.max_num_seqs if vllm else options.max_batch_rows
    times, rows = [], 0
    for number in _counts(place.workers) if fits else ():
        estimates = [
            Estimate(size=model, work=task.divided(number), machine=machine, most_rows=most)
            for model, task in models
        ]
        seconds = sum(estimate.seconds for estimate in estimates)
        seconds *= max(1.0, number * place.crowd)  # more threads than cores
        times.append(WorkerTime(workers=number, seconds=seconds))
        rows = estimates[0].rows
    return Resources(
        parameters=size.parameters,
        dtype=session.spec.quantize or session.dtype,
        weight_bytes=int(size.weight_bytes),
        memory_bytes=int(size.weight_bytes) + rows * context * size.cache_bytes,
        free_bytes=int(machine.memory),
        rows=rows,
        gpus=needed,
        workers=0 if workers is None else place.workers,
        times=tuple(times),
        basis=machine.origin,
    )


def _size(spec: ModelSpec, metadata: ModelMetadata, *, dtype: str) -> ModelSize:
    """Return the size of an inspected model as it would be loaded."""
    import torch

    from pvec.models.weights import model_config

    config = model_config(metadata.files.folder, trust_remote_code=spec.trust_remote_code)
    quantised = _QUANTISED.get(spec.quantize or "")
    return model_size(config, itemsize=getattr(torch, dtype).itemsize, block_itemsize=quantised)


def _place(session: ModelSession, workers: Workers | None) -> _Place:
    import torch

    from pvec.models.load import choose_device
    from pvec.models.machine import measure_machine

    dtype, pool = getattr(torch, session.dtype), session.settings.pool
    if (cluster := session.cluster_machine) is not None:
        machine, gpus, count = cluster
        return _Place(machine=machine, workers=count, gpus=gpus)
    count = 1 if workers is None else workers.count or 1
    device, _ = choose_device(session.spec.device)
    if device.startswith("cuda"):
        machine = measure_machine(device, dtype=dtype, threads=1)
        gpus = torch.cuda.device_count()
        if workers is not None:
            gpus = min(gpus // count, pool.gpus or 1)
        return _Place(machine=machine, workers=count, gpus=gpus)
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    if workers is not None:
        threads = pool.cpus or max(1, cores // count)
    machine = measure_machine(device, dtype=dtype, threads=threads)
    machine = replace(machine, memory=machine.memory / count)
    return _Place(machine=machine, workers=count, crowd=threads / cores)


def _counts(workers: int) -> Iterator[int]:
    """Yield 1, 2, 4 … up to ``workers``."""
    count = 1
    while count < workers:
        yield count
        count *= 2
    yield workers

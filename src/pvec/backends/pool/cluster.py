"""Ray: a cluster to run on, checked before anything is loaded, and workers as its actors."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pvec.backends.pool.address import Workers
from pvec.backends.pool.members import WorkerDied
from pvec.backends.pool.pool import Pool
from pvec.backends.pool.worker import ModelOrder, Worker
from pvec.errors import InputError, install_command
from pvec.models.files import ModelSpec
from pvec.settings import Settings

_REACH_SECONDS = 10.0
_HEALTH_SECONDS = 30.0
"""Most of it is the time in which another Python imports Ray."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a worker takes of a machine."""

    cpus: int
    gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """Ray's form of it."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else ""
        return f"{self.cpus} CPU core{'s' * (self.cpus > 1)}{gpus}"


def check_workers(settings: Settings) -> Workers | None:
    """Return what the settings say of workers; None when the model runs in this process.

    Raises ``InputError`` when Ray is missing or nothing answers at the address. Starts nothing.
    """
    workers = Workers.parse(settings.pool.workers)
    if workers is None:
        return None
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--workers needs Ray, which is not installed: {install_command('ray')}.")
    if workers.address not in (None, "auto"):
        _reach(workers.address)
    return workers


def model_order(spec: ModelSpec, settings: Settings, *, fingerprint: str) -> ModelOrder:
    """Return what workers are told of a model; keys of judges and other secrets stay here."""
    digest = hashlib.sha256(f"{spec!r}|{settings.backend!r}".encode())
    return ModelOrder(
        key=digest.hexdigest()[:16],
        spec=spec,
        backend="vllm" if settings.backend.name == "vllm" else "hf",
        settings=Settings(backend=settings.backend),
        fingerprint=fingerprint,
    )


def pool_for(settings: Settings, *, notify: Callable[[str], None] | None = None) -> Pool:
    """Return the workers that the settings ask for, held until ``close``.

    Sessions of one process with the same settings share them. Raises ``InputError`` when the
    cluster does not answer or has no room for them.
    """
    name = f"{settings.pool!r} {_engine_gpus(settings)} {settings.model.device}"
    if name not in _POOLS:
        _POOLS[name] = _start(settings, name, notify=notify or (lambda _: None))
    pool = _POOLS[name]
    if notify is not None:
        pool.notify = notify
    return pool.hold()


_POOLS: dict[str, Pool] = {}
"""The pools of this process."""


def _engine_gpus(settings: Settings) -> int:
    """Return how many GPUs a model takes where there are any; a judge beside it takes no more."""
    vllm = settings.backend.vllm
    return vllm.tensor_parallel_size * vllm.pipeline_parallel_size * vllm.data_parallel_size


def _start(settings: Settings, name: str, *, notify: Callable[[str], None]) -> Pool:
    workers = check_workers(settings)
    assert workers is not None, "there is no pool without workers"
    own = connect(workers, cpus=settings.pool.cpus, notify=notify)
    share = worker_share(settings, workers)
    size = worker_count(workers, share)
    notify(f"Ray: {size} worker{'s' * (size > 1)} of {share} each")
    place = _reserve(share, size, wait=settings.pool.start_timeout)

    def spawn(number: int) -> RayHandle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(Worker).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=0,  # the pool replaces them: it knows what they held
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=place, placement_group_bundle_index=number - 1
            ),
        )
        return RayHandle(actor.remote(threads=share.cpus))

    def end() -> None:
        import ray
        from ray.util import remove_placement_group

        _POOLS.pop(name, None)
        if ray.is_initialized():
            remove_placement_group(place)
            if own:
                ray.shutdown()

    return Pool(spawn, size=size, start_timeout=settings.pool.start_timeout, notify=notify, end=end)


class RayHandle:
    """A worker that is a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def submit(self, method: str, *args: Any, **options: Any) -> Future[Any]:
        """Call a method; see ``Handle.submit``."""
        answer: Future[Any] = Future()
        getattr(self._actor, method).remote(*args, **options).future().add_done_callback(
            lambda done: _pass_on(done, answer)
        )
        return answer

    def kill(self) -> None:
        """End the actor, if it lives."""
        import ray

        ray.kill(self._actor)


def _pass_on(done: Future[Any], answer: Future[Any]) -> None:
    from ray.exceptions import RayError, RayTaskError

    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    elif isinstance(error, RayError) and not isinstance(error, RayTaskError):
        answer.set_exception(WorkerDied(_reason(error)))
    else:
        answer.set_exception(error)


def _reason(error: BaseException) -> str:
    """Return Ray's long account of a death in a few words."""
    text = " ".join(str(error).split()).lower()
    if "running low on memory" in text or "node_out_of_memory" in text:
        return "its machine ran out of memory"
    if "node has died" in text:
        return "its machine is gone"
    return "its process was ended, often for want of memory"


def connect(
    workers: Workers, *, cpus: int | None = None, notify: Callable[[str], None] = lambda _: None
) -> bool:
    """Connect this process to the cluster, or start Ray here; whether it was not connected before.

    Raises ``InputError`` when nothing answers, or answers with another version of Ray.
    """
    import ray

    silence_ray()
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if workers.address is None:
            cores = max(os.cpu_count() or 1, (workers.count or 1) * (cpus or 1))
            # the workers are the command: as important as it would be alone (Ray: niceness 15)
            system = {"worker_niceness": 0}
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                _system_config=system,
                **options,
            )
            return True
        context = ray.init(address=workers.address, **options)
    except Exception as error:  # Ray raises plain ones, too, such as for a start that takes long
        where = workers.address or "this machine"
        raise InputError(
            f"Ray does not start or answer on {where} ({' '.join(str(error).split())[:200]}): "
            f"correct --workers, or start a cluster with `ray start --head`."
        ) from None
    if url := getattr(context, "dashboard_url", None):
        notify(f"Ray's dashboard: http://{url}")
    return True


def silence_ray() -> None:
    """Keep Ray's account of every death off standard output, which is for results.

    Ray 2.60 has no setting for it. The pool and its results say what died.
    """
    import ray._private.worker as driver

    if hasattr(driver, "print_to_stdstream"):
        driver.print_to_stdstream = lambda *_args, **_options: None


def _reach(address: str) -> None:
    """Raise ``InputError`` unless Ray answers: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "correct --workers, or start a cluster there with `ray start --head`"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"Nothing answers at {address} ({error}): {remedy}.") from None
    if address.startswith("ray://"):
        return
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(  # noqa: S603 (no shell; the address is one argument)
            check, capture_output=True, timeout=_HEALTH_SECONDS, check=False
        )
        answered = healthy.returncode == 0
    except subprocess.TimeoutExpired:
        answered = False
    if not answered:
        raise InputError(
            f"What answers at {address} is no Ray of this version (the port of a head is mostly "
            f"6379): {remedy}."
        )


def worker_share(settings: Settings, workers: Workers) -> Share:
    """Return what each worker takes, as set or as the cluster has. Needs a connection."""
    import ray

    have = ray.cluster_resources()
    gpus = settings.pool.gpus
    if gpus is None:
        wanted = have.get("GPU") and settings.model.device in ("auto", "cuda")
        gpus = _engine_gpus(settings) if wanted else 0
    cpus = settings.pool.cpus
    if cpus is None:
        alone = workers.address is None and not gpus
        cpus = max(1, (os.cpu_count() or 1) // (workers.count or 1)) if alone else 1
    return Share(cpus=cpus, gpus=gpus)


def worker_count(workers: Workers, share: Share) -> int:
    """Return how many workers to start; ``InputError`` when there is no room for them."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_fit(machine, share) for machine in machines)
    size = room if workers.count is None else workers.count
    if not 0 < size <= room:
        have = Share(
            cpus=int(sum(m.get("CPU", 0) for m in machines)),
            gpus=int(sum(m.get("GPU", 0) for m in machines)),
        )
        count = len(machines)
        raise InputError(
            f"The cluster has {have} on {count} machine{'s' * (count > 1)}, room for {room} "
            f"workers of {share} each, and not for {max(size, 1)}: ask for fewer with --workers, "
            f"or for less with --worker-cpus and --worker-gpus."
        )
    return size


def _fit(machine: dict[str, float], share: Share) -> int:
    return int(min(machine.get(name, 0.0) // need for name, need in share.resources.items()))


def _reserve(share: Share, size: int, *, wait: float) -> Any:
    """Reserve the workers' places all at once, or say that others hold them."""
    import ray
    from ray.util import placement_group, remove_placement_group

    place = placement_group([share.resources] * size, strategy="PACK")
    if place.wait(timeout_seconds=min(wait, 1e6)):
        return place
    remove_placement_group(place)
    free = ray.available_resources()
    raise InputError(
        f"There was no room for {size} workers of {share} each in {wait:g} seconds (free: "
        f"{free.get('CPU', 0):g} CPU cores, {free.get('GPU', 0):g} GPUs): ask for fewer, or wait "
        f"until others are done."
    )

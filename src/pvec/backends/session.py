"""The model of a command: inspected first, loaded on first use, freed at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from pvec.backends.processes import ALONE, Processes
from pvec.closing import Closing
from pvec.errors import InputError
from pvec.models.files import ModelSpec
from pvec.settings import Settings
from pvec.types import BY_SPAN, Progress, Sampling

if TYPE_CHECKING:
    from pvec.backends.base import Backend
    from pvec.backends.kept_means import KeptMeans
    from pvec.backends.pool.pool import Pool
    from pvec.backends.pool.worker import ModelOrder
    from pvec.backends.registry import BackendName
    from pvec.models.costs import Machine
    from pvec.models.load import ModelMetadata

Notify = Callable[[str], None]
"""Shows one note to the user."""

BUNDLED_MAX_TOKENS = 96
DEFAULT_MAX_TOKENS = 1000
_BUNDLED_THREADS = 2
"""As many as its matrices keep busy; on two idle cores it is twice as fast as on one."""


def ignore(_: object) -> None:
    """Ignore a note or progress (the default of library calls)."""


class ModelSession(Closing):
    """The model of one command and how the settings say to run it.

    Creating a session reads configuration, tokenizer and fingerprint (``metadata``), so that bad
    input is refused and response ids are known before any weights are loaded. ``backend`` loads
    them on first use. Each of ``processes`` loads them, on its own accelerator where possible. A
    context manager; leaving it frees the model.

    Raises ``ModelError`` or ``InputError`` for a model that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        notify: Notify = ignore,
        on_progress: Callable[[Progress], None] = ignore,
        processes: Processes = ALONE,
    ) -> None:
        from pvec.backends.pool.cluster import check_workers
        from pvec.backends.registry import choose_backend
        from pvec.models.files import read_config
        from pvec.models.load import choose_device, inspect_model
        from pvec.models.precision import check_quantise
        from pvec.models.weights import check_quantisation

        self.settings = settings
        self.notify = notify
        self.on_progress = on_progress
        self.processes = processes
        self.spec = replace(model_spec(settings), device=_device(settings, processes))
        self.metadata: ModelMetadata = inspect_model(self.spec)
        self.choice = choose_backend(
            settings.backend.name,
            bundled=self.metadata.bundled,
            gguf=self.metadata.files.gguf is not None,
        )
        config = read_config(self.metadata.files.folder)
        if self.choice.name == "hf":
            check_quantisation(config, name=self.metadata.id)
        self._workers = check_workers(settings)
        if self._workers is not None and processes.size > 1:
            raise InputError(
                "Several processes of a launcher and --workers do not go together: use one of them."
            )
        if self.spec.quantize is not None and not self._on_cluster:
            check_quantise(
                self.spec,
                config,
                device=choose_device(self.spec.device)[0],
                gguf=self.metadata.files.gguf is not None,
                vllm=self.choice.name == "vllm",
            )
        if self.thinking and not self.metadata.thinking_switch:
            notify(
                "the chat template has no thinking switch, so --thinking on changes nothing: the "
                "model reasons when it was trained to"
            )
        self._backend: Backend | None = None
        self._lender: ModelSession | None = None
        self._pool: Pool | None = None
        self.kept_means: KeptMeans | None = None
        """Keeps the activations that are captured while generating, if a workflow needs them."""

    @cached_property
    def identity(self) -> str:
        """What changes an answer besides prompt, sampling and steering: weights (adapter
        included), tokenizer and chat template, backend, number format.
        """
        name = self.dtype
        if self.spec.quantize is not None:
            name += f"+{self.spec.quantize}"
        stop = "" if self.metadata.added_stop is None else f"/stop {self.metadata.added_stop}"
        chat = f"{self.metadata.chat_hash}{stop}"
        return f"{self.metadata.fingerprint}/{chat}/{self.choice.name}/{name}"

    @property
    def _on_cluster(self) -> bool:
        """Whether the model runs on machines that are not like this one."""
        return self._workers is not None and self._workers.address is not None

    @cached_property
    def dtype(self) -> str:
        """The number format that the model runs in, chosen where it runs."""
        from pvec.models.load import choose_device
        from pvec.models.precision import choose_dtype

        if self._lender is not None:
            return self._lender.dtype
        if self._on_cluster:
            return self._hold_pool().dtype(self._order(self.spec))
        stored = self.metadata.stored_dtype if self.choice.name == "hf" else "float32"
        dtype, _ = choose_dtype(self.spec.dtype, choose_device(self.spec.device)[0], stored=stored)
        return str(dtype).removeprefix("torch.")

    @property
    def cluster_machine(self) -> tuple[Machine, int, int] | None:
        """How fast a device of a cluster's workers is, the GPUs of each, and the number of workers;
        None where the model runs on this machine. Starts the workers, loads nothing.
        """
        if not self._on_cluster:
            return None
        pool = self._hold_pool()
        spec = replace(self.spec, dtype=self.dtype)  # type: ignore[arg-type]
        machine, gpus = pool.machine(self._order(spec))
        return machine, gpus, len(pool.members)

    def _order(self, spec: ModelSpec) -> ModelOrder:
        from pvec.backends.pool.cluster import model_order

        settings = on_backend(self.settings, self.choice.name)
        return model_order(spec, settings, fingerprint=self.metadata.fingerprint)

    def _hold_pool(self) -> Pool:
        """Return the workers, which stay until the session is closed."""
        from pvec.backends.pool.cluster import pool_for

        if self._pool is None:
            settings = on_backend(self.settings, self.choice.name)
            self._pool = pool_for(settings, notify=self.notify)
        return self._pool

    @property
    def thinking(self) -> bool:
        """Whether thinking mode is enabled."""
        return self.settings.generation.thinking == "on"

    def check_positions(self) -> None:
        """Raise ``InputError`` for steering positions of the settings that the backend lacks."""
        steer = self.settings.steer
        used = {steer.positions, *(steer.search_positions if steer.search else ())} & BY_SPAN
        if self.choice.name == "vllm" and used:
            raise InputError(
                f"Steering at positions {min(used)} needs the transformers backend, which knows "
                f"where reasoning ends while it generates: use --backend hf."
            )

    @property
    def max_tokens(self) -> int:
        """Longest answer in tokens: as set, else 1000, and 96 for the bundled model."""
        default = BUNDLED_MAX_TOKENS if self.metadata.bundled else DEFAULT_MAX_TOKENS
        return self.settings.generation.max_tokens or default

    def sampling(self, seed: int) -> Sampling:
        """Return the sampling of the settings with this seed."""
        generation = self.settings.generation
        return Sampling(
            temperature=generation.temperature,
            top_p=generation.top_p,
            max_tokens=self.max_tokens,
            seed=seed,
        )

    @property
    def backend(self) -> Backend:
        """The loaded model; the first use loads it and notes what was chosen and why."""
        if self._lender is not None:
            return self._lender.backend
        if self._backend is None:
            self.notify(f"loading {self.metadata.id} on {self.choice.name} ({self.choice.reason})")
            spec = self.spec
            if self._workers is not None:
                self._hold_pool()
            if self._on_cluster:  # every worker takes what the first chose
                spec = replace(spec, dtype=self.dtype)  # type: ignore[arg-type]
            self._backend = open_backend(
                self.choice.name,
                spec,
                self.settings,
                metadata=self.metadata,
                notify=self.notify,
                on_load=self.on_progress,
            )
            info = self._backend.info
            self.notify(f"{info.num_layers} layers, {info.hidden_size} wide, {info.dtype}")
            for note in info.notes:
                self.notify(f"  {note}")
            if info.device == "cpu" and self.choice.name == "hf" and self._workers is None:
                from pvec.models.memory import use_idle_cores

                most = _BUNDLED_THREADS if info.bundled else None
                self.notify(f"  {use_idle_cores(most=most)}")
        return self._backend

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._lender.loaded if self._lender is not None else self._backend is not None

    def lend(
        self,
        settings: Settings,
        *,
        notify: Notify = ignore,
        on_progress: Callable[[Progress], None] = ignore,
    ) -> ModelSession:
        """Return a session of another command on this model, which is loaded once for all of them.

        ``settings`` may differ in everything but the model and its backend. Closing the session
        leaves the model to this one.
        """
        from pvec.models.template import is_dated, set_date

        same = (settings.model, settings.backend) == (self.settings.model, self.settings.backend)
        assert same, "a session lends its model as it is"
        if is_dated(self.metadata.tokenizer):  # as a run before this one may have set it
            set_date(self.metadata.tokenizer, datetime.now())
        lent = copy.copy(self)
        vars(lent).update(
            settings=settings, notify=notify, on_progress=on_progress,
            _lender=self._lender or self, _backend=None, kept_means=None,
        )  # fmt: skip
        return lent

    def free(self) -> None:
        """Free the model, also a lent one; using ``backend`` again would load it again."""
        if self._lender is not None:
            self._lender.free()
        elif self._backend is not None:
            self._backend.close()
            self._backend = None

    def close(self) -> None:
        """Free the model, and the workers that nobody else uses, unless it is lent."""
        if self._lender is not None:
            return
        self.free()
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def require_this_process(settings: Settings, what: str, *, remedy: str = "") -> None:
    """Raise ``InputError`` where workers are set for ``what``, which they cannot do."""
    if settings.pool.workers:
        raise InputError(
            f"{what} runs in this process, not on workers: omit --workers (pool.workers){remedy}."
        )


def open_session(
    settings: Settings,
    *,
    lender: ModelSession | None = None,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> ModelSession:
    """Return the session of a command: with a model of its own, or with that of ``lender``."""
    if lender is not None:
        return lender.lend(settings, notify=notify, on_progress=on_progress)
    return ModelSession(settings, notify=notify, on_progress=on_progress)


def open_backend(
    name: BackendName,
    spec: ModelSpec,
    settings: Settings,
    *,
    metadata: ModelMetadata | None = None,
    notify: Notify = ignore,
    on_load: Callable[[Progress], None] = ignore,
) -> Backend:
    """Load a model on a backend, in this process or in workers, as set.

    Raises ``ModelError`` or ``InputError``.
    """
    from pvec.backends.registry import backend_class

    if settings.pool.workers:
        settings = on_backend(settings, name)
    return backend_class("pool" if settings.pool.workers else name).from_settings(
        spec, settings, metadata=metadata, on_note=notify, on_load=on_load
    )


def on_backend(settings: Settings, name: BackendName) -> Settings:
    """Return the settings with this backend in place of ``auto``."""
    backend = settings.backend.model_copy(update={"name": name})
    return settings.model_copy(update={"backend": backend})


def load_judge_model(name: str, settings: Settings, *, notify: Notify = ignore) -> Backend:
    """Load a judge of one's own: the model ``name`` without adapter, on transformers."""
    return open_backend("hf", judge_spec(name, settings), settings, notify=notify)


def judge_spec(name: str, settings: Settings) -> ModelSpec:
    """Return how the judge ``name`` is loaded: as the settings say of the same model, if it is."""
    if name == settings.model.id:
        return replace(model_spec(settings), adapter=None, merge_adapter=False)
    return ModelSpec(
        model=name, device=settings.model.device, trust_remote_code=settings.model.trust_remote_code
    )


def model_spec(settings: Settings) -> ModelSpec:
    """Return the model of the settings; its fields are those of the section ``model``."""
    return ModelSpec(model=settings.model.id, **settings.model.model_dump(exclude={"id"}))


def _device(settings: Settings, processes: Processes) -> str:
    """Return the device of this process: as set, or an accelerator of its own beside others."""
    device = settings.model.device
    if processes.size > 1 and device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return f"cuda:{processes.local_rank}"
    return device

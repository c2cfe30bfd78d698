"""vLLM's CUDA and ROCm worker with pvec's probes; named to the engine as ``worker_cls``."""

from __future__ import annotations

from vllm.v1.worker import gpu_worker

from pvec.backends.vllm.worker import ProbeWorker


class Worker(ProbeWorker, gpu_worker.Worker):  # type: ignore[misc]
    """The GPU worker."""

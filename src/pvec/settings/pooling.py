"""The settings of a pool of workers (``pvec.backends.pool``)."""

from __future__ import annotations

from pydantic import Field

from pvec.settings.sections import Section


class PoolSettings(Section):
    """Workers of a Ray cluster that run the model."""

    workers: str = ""
    """Run on workers with a model each, through Ray: `N` on this machine, `ADDRESS` of a cluster \
(`host:6379`, `ray://host:10001`, or `auto`) for as many as it has room for, or `N@ADDRESS`"""

    cpus: int | None = Field(default=None, ge=1)
    """CPU cores of a worker (default: an equal share of this machine's, and one beside a GPU)"""

    gpus: int | None = Field(default=None, ge=0)
    """GPUs of a worker (default: those of a vLLM engine, else one where there are GPUs)"""

    retries: int = Field(default=3, ge=1)
    """How many workers may fail at a row that they hold alone before the row counts as failed"""

    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for the first worker to load the model"""

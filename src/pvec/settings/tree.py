"""The tree of settings: its sections, the dotted path of every setting, and former names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from pvec.settings.commands import (
    AuthorSettings,
    ExtractSettings,
    FilterSettings,
    JudgeSettings,
    ProjectSettings,
    ServeSettings,
    SteerSettings,
)
from pvec.settings.sections import (
    BackendSettings,
    GenerationSettings,
    ModelSettings,
    PathSettings,
    PoolSettings,
    Section,
)

ENV_PREFIX = "PVEC_"

_VLLM_NAMES = {
    "memory_share": "gpu_memory_utilization",
    "cache_bytes": "kv_cache_memory_bytes",
    "max_seqs": "max_num_seqs",
    "max_batch_tokens": "max_num_batched_tokens",
    "eager": "enforce_eager",
    "prefix_caching": "enable_prefix_caching",
    "chunked_prefill": "enable_chunked_prefill",
    "tensor_parallel": "tensor_parallel_size",
    "pipeline_parallel": "pipeline_parallel_size",
    "data_parallel": "data_parallel_size",
    "adapters": "max_loras",
    "adapter_rank": "max_lora_rank",
    "removals": "clamps",
}

RENAMED: dict[str, str] = {
    **{f"backend.vllm.{old}": f"backend.vllm.{new}" for old, new in _VLLM_NAMES.items()},
    "project.workers": "pool.workers",
}
"""Old dotted path of a setting → its present one. The old name still works in files, in the
environment and as a hidden option, and a note says the new one.
"""


class Settings(Section):
    """The whole tree. ``Settings()`` is the defaults, ``resolve`` reads what the user set."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    backend: BackendSettings = Field(default_factory=BackendSettings)
    pool: PoolSettings = Field(default_factory=PoolSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    judge: JudgeSettings = Field(default_factory=JudgeSettings)
    author: AuthorSettings = Field(default_factory=AuthorSettings)
    filter: FilterSettings = Field(default_factory=FilterSettings)
    extract: ExtractSettings = Field(default_factory=ExtractSettings)
    steer: SteerSettings = Field(default_factory=SteerSettings)
    project: ProjectSettings = Field(default_factory=ProjectSettings)
    serve: ServeSettings = Field(default_factory=ServeSettings)
    paths: PathSettings = Field(default_factory=PathSettings)


@cache
def fields() -> Mapping[str, FieldInfo]:
    """Return every setting by dotted path, in the order of the tree."""
    return dict(_walk(Settings, ""))


def env_name(path: str) -> str:
    """Return the environment name of a setting: ``extract.rollouts`` → PVEC_EXTRACT__ROLLOUTS."""
    return ENV_PREFIX + path.replace(".", "__").upper()


def value_of(settings: Settings, path: str) -> Any:
    """Return the value of the setting with this dotted path."""
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field

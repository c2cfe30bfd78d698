"""The sections of the settings: every default, choice, limit and help text, declared once.

Those of the model and what runs it are here, those of what commands do with it in ``commands.py``.
The command line (``cli/options.py``), the ``PVEC_`` environment names, ``pvec.yaml`` and ``pvec
config`` all derive from these classes. A new setting is a field with its help as the text under
it; a new section is a class of fields and one line in ``Settings`` (``tree.py``).
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        defer_build=True,  # of validators: help needs none
        coerce_numbers_to_str=True,  # `layer: 20` in a file means the text "20"
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Make the text under each field its description."""
        for name, text in _texts(cls.__module__).get(cls.__name__, {}).items():
            cls.model_fields[name].description = text


@cache
def _texts(module: str) -> dict[str, dict[str, str]]:
    """Return the texts under the fields of a module's classes, by class and field.

    pydantic's ``use_attribute_docstrings`` reads the file again for every class: a sixth of the
    time of `pvec COMMAND --help`.
    """
    texts: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        for field, below in pairwise(node.body if isinstance(node, ast.ClassDef) else ()):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts.setdefault(node.name, {})[field.target.id] = below.value.value  # type: ignore[attr-defined, union-attr]
    return texts


class ModelSettings(Section):
    """Which model runs, and how it is loaded."""

    id: str = "tiny"
    """Model to run: a hub id, a folder, a GGUF file, or `tiny`, the bundled teaching model"""

    gguf_file: str | None = None
    """GGUF file of a folder or hub repository that holds several; only this one is downloaded"""

    adapter: str | None = None
    """LoRA adapter of the model: a hub id, a folder, or a folder of checkpoints"""

    merge_adapter: bool = False
    """Merge the adapter into the weights on loading instead of keeping it separate"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto` chooses by device and notes the reason"""

    quantize: Literal["int8", "8bit", "4bit"] | None = None
    """Quantise the weights on loading: `int8` with torchao, also on a CPU; `8bit` or `4bit` with \
bitsandbytes on an NVIDIA GPU"""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; `auto` uses an accelerator if one is available"""

    device_map: str | None = None
    """Spread the model over several devices, as in transformers (`auto`, `balanced`, …)"""

    revision: str | None = None
    """Commit, branch or tag of a hub model (default: its main branch)"""

    chat_template: str | None = None
    """File with a chat template that replaces the tokenizer's own"""

    allow_pickle: bool = False
    """Accept `.bin` weights, which can run code when they are loaded"""

    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for authors that you trust"""


class VLLMSettings(Section):
    """How the vLLM engine is started."""

    slots: int = Field(default=64, ge=0)
    """Different sets of steering instructions in flight at once; a further one waits for a free \
slot. Each takes three vectors per layer"""

    clamps: int = Field(default=1, ge=0)
    """Most `ablate` or `cap` instructions on one token and layer; 0 is slightly faster"""

    captures: int = Field(default=256, ge=4)
    """Captured answers in flight at once; each takes three float32 vectors per layer"""

    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory that the engine may take"""

    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory of the key-value cache in bytes (default: what is left of the share)"""

    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together (default: what the model allows)"""

    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences that run at once"""

    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one step (default: vLLM's)"""

    block_size: int | None = Field(default=None, ge=1)
    """Tokens in a block of the key-value cache (default: vLLM's)"""

    enforce_eager: bool = False
    """Do not compile or capture graphs: starts faster, runs slower"""

    enable_prefix_caching: bool = True
    """Share the computed prompts of requests that are steered alike"""

    enable_chunked_prefill: bool = True
    """Split long prompts over several steps"""

    async_scheduling: bool = False
    """Prepare the next step while one runs: faster on a GPU, but no capture while generating"""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share each layer"""

    pipeline_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share the stack of layers"""

    data_parallel_size: int = Field(default=1, ge=1)
    """Engines side by side, each with its own GPUs, that share the requests"""

    max_loras: int = Field(default=0, ge=0)
    """Different LoRA adapters in one batch (at least one when the model has an adapter)"""

    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Largest rank of an adapter"""


class BackendSettings(Section):
    """What runs the model."""

    name: Literal["auto", "hf", "vllm"] = "auto"
    """Backend; `auto` uses vLLM if it is installed and there is a CUDA GPU, else transformers"""

    token_budget: int | None = Field(default=None, ge=64)
    """Tokens per forward pass when activations are captured, padding included; halved \
automatically when memory runs out (default: 1024 on a CPU, 16384 on an accelerator)"""

    max_batch_rows: int = Field(default=512, ge=1)
    """Maximum number of sequences in one batch"""

    cuda_graphs: bool = True
    """Replay the steps of generation as CUDA graphs, where transformers runs on a GPU"""

    vllm: VLLMSettings = Field(default_factory=VLLMSettings)


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


class GenerationSettings(Section):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 always selects the most likely token"""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens with this total probability"""

    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum length of an answer in tokens (default: 1000, and 96 for the bundled model)"""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Random seed; the same seed gives the same answers in any batch"""

    thinking: Literal["off", "on"] = "off"
    """Enable thinking mode"""


class PathSettings(Section):
    """Folders."""

    runs: Path = Path("runs")
    """Folder that holds the run folders"""

    exact_csv: bool = False
    """Write texts into CSV files as they are; otherwise what a spreadsheet would execute gets an \
apostrophe in front"""

"""The tree of settings: every default, choice and help text of pvec, declared once.

The command line (``cli/options.py``), the ``PVEC_`` environment names, ``pvec.yaml`` and ``pvec
config`` all derive from these classes. A new setting is a field with its help as the text under
it; a new section is a class of fields and one line in ``Settings``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pvec.types import Operator, Positions, ProjectionKind, VectorKind

ENV_PREFIX = "PVEC_"


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,  # `layer: 20` in a file means the text "20"
    )


class ModelSettings(Section):
    """Which model runs, and how it is loaded."""

    id: str = "tiny"
    """Model to run: a hub id, a local folder, or `tiny`, the bundled teaching model"""

    adapter: str | None = None
    """LoRA adapter to put on the model: a hub id, a folder, or a folder of checkpoints"""

    merge_adapter: bool = False
    """Merge the adapter into the weights on loading instead of keeping it active beside them"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto` chooses by device and says why"""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs; `auto` takes an accelerator when there is one"""

    device_map: str | None = None
    """Spread the model over several devices, as in transformers (`auto`, `balanced`, …)"""

    revision: str | None = None
    """Commit, branch or tag of a hub model (default: its main branch)"""

    chat_template: str | None = None
    """File with a chat template that replaces the tokenizer's own"""

    allow_pickle: bool = False
    """Accept `.bin` weights, which can run code when they are loaded"""

    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for authors you trust"""


class VLLMSettings(Section):
    """How the vLLM engine is started."""

    slots: int = Field(default=64, ge=0)
    """Different steerings in flight at once; one more waits for a free slot. Costs three vectors \
per layer each"""

    removals: int = Field(default=1, ge=0)
    """Most `ablate` or `cap` instructions on one token and layer; 0 saves a little time"""

    captures: int = Field(default=256, ge=4)
    """Captured answers in flight at once; each costs three float32 vectors per layer"""

    memory_share: float = Field(default=0.9, gt=0, le=1)
    """Share of the GPU's memory that the engine may take"""

    cache_bytes: int | None = Field(default=None, ge=1)
    """Memory of the key-value cache in bytes (default: what is left of the share)"""

    max_model_len: int | None = Field(default=None, ge=2)
    """Most tokens of prompt and answer together (default: what the model allows)"""

    max_seqs: int = Field(default=256, ge=1)
    """Sequences that run at once"""

    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one step (default: vLLM's)"""

    block_size: int | None = Field(default=None, ge=1)
    """Tokens in a block of the key-value cache (default: vLLM's)"""

    eager: bool = False
    """Neither compile nor capture graphs: starts faster, runs slower"""

    prefix_caching: bool = True
    """Share the computed prompts of requests that are steered alike"""

    chunked_prefill: bool = True
    """Split long prompts over several steps"""

    async_scheduling: bool = False
    """Prepare the next step while one runs: faster on a GPU, but no capture while generating"""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share each layer"""

    pipeline_parallel: int = Field(default=1, ge=1)
    """GPUs that share the stack of layers"""

    data_parallel: int = Field(default=1, ge=1)
    """Engines side by side, each with its own GPUs, that share the requests"""

    adapters: int = Field(default=0, ge=0)
    """Different LoRA adapters in one batch (at least one when the model has an adapter)"""

    adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Largest rank of an adapter"""


class BackendSettings(Section):
    """What runs the model."""

    name: Literal["auto", "hf", "vllm"] = "auto"
    """Engine; `auto` takes vLLM when it is installed and supports the device, else transformers"""

    token_budget: int | None = Field(default=None, ge=64)
    """Tokens per forward pass when activations are captured, padding included; halved by itself \
when memory runs out (default: 1024 on a CPU, 16384 on an accelerator)"""

    max_batch_rows: int = Field(default=512, ge=1)
    """Most sequences in one batch"""

    vllm: VLLMSettings = VLLMSettings()


class GenerationSettings(Section):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 always takes the likeliest token"""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this share of the probability"""

    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens (default: 1000, and 96 for the bundled model)"""

    seed: int = Field(default=0, ge=0)
    """Seed of everything random; the same seed gives the same answers in any batch"""

    thinking: Literal["off", "on"] = "off"
    """Let models that can think aloud do so before they answer"""


class JudgeSettings(Section):
    """Who scores the answers."""

    model: str | None = None
    """Judge: a model name of the server, `local:MODEL` for any causal LM, or `tiny` \
(default: `tiny` for the bundled model, gpt-4.1-mini-2025-04-14 otherwise)"""

    base_url: str | None = None
    """Address of an OpenAI-compatible server (default: OPENAI_BASE_URL, else OpenAI's)"""

    api_key: SecretStr | None = None
    """Key of the judge's server (default: OPENAI_API_KEY); never on the command line or on disk"""

    scale: Literal["0-100", "0-10", "binary", "binary-text"] = "0-100"
    """What the judge is asked to answer with; every scale is reported as 0 to 100"""

    concurrency: int = Field(default=32, ge=1)
    """Most requests at once; it backs off by itself when the server asks for it"""

    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for one answer"""

    max_retries: int = Field(default=8, ge=0)
    """Tries after a failed request before the score is recorded as an error"""

    max_cost: float | None = Field(default=None, gt=0)
    """Stop cleanly, keeping everything, before the judge has cost this many US dollars"""

    price: str | None = None
    """US dollars per million prompt and completion tokens, such as `0.40,1.60` (default: the list \
price of well-known judges)"""


class FilterSettings(Section):
    """Which answers count towards a vector."""

    threshold: float = Field(default=50.0, ge=0, le=100)
    """Keep positive answers with at least this trait score, negative ones below 100 minus it"""

    coherence: float = Field(default=50.0, ge=0, le=100)
    """Keep answers with a coherence score of at least this"""

    paired: bool = False
    """Keep an answer only when its opposite number passes too, as the paper's own code does"""


class ExtractSettings(Section):
    """How much is generated for a vector."""

    rollouts: int = Field(default=10, ge=1)
    """Answers to each question under each instruction"""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many extraction questions (default: all)"""

    judge: bool = True
    """Score the answers now; `pvec judge RUN` does it later otherwise"""


class SteerSettings(Section):
    """How a vector is applied."""

    kind: VectorKind = "response_avg"
    """Which of the three vectors of a file is used"""

    positions: Positions = "response"
    """Tokens that are steered: the answer (from the last prompt token on), the prompt, or all"""

    operator: Operator = "add"
    """Add the vector, ablate its direction, or cap the projection on it"""

    coef_unit: Literal["raw", "norm"] = "raw"
    """Coefficients multiply the vector as it is, or count in mean residual norms of the layer"""

    layer: str = "auto"
    """Where to steer: `20`, `3,4`, `12:24:2` (both ends), `3+4` (at once), `all` (every layer at \
once), or `auto` (five layers around 55 % of the depth)"""

    coef: str = "-2,-1,0,1,2"
    """How strongly: a list of coefficients, or `FROM:TO:STEP`; for `cap` the ceilings"""

    incremental: bool = False
    """Steer every layer by the vector's increase over the layer before (implies `--layer all`)"""

    together: bool = False
    """Apply all vectors at once instead of evaluating one after another"""

    random_control: bool = True
    """Also steer by a random vector of the same norm, at the same points"""

    prompt_baseline: bool = True
    """Also ask for the trait, and against it, in the system prompt"""

    rollouts: int = Field(default=5, ge=1)
    """Answers to each evaluation question in each condition"""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many evaluation questions (default: all)"""

    min_coherence: float = Field(default=75.0, ge=0, le=100)
    """Pick the layer and coefficient of the highest trait score with at least this coherence"""

    judge: bool = True
    """Score the answers now; `pvec judge RUN` does it later otherwise"""


class ProjectSettings(Section):
    """What is projected on the vectors, and how training data is screened by it."""

    layers: tuple[int, ...] = ()
    """Layer of the residual stream; repeatable (default: the one that the vector suggests)"""

    types: tuple[ProjectionKind, ...] = ("proj",)
    """What is projected: the mean over the answer, the last prompt token, the mean over the \
prompt, or the cosine of the answer's mean; repeatable"""

    kind: VectorKind = "response_avg"
    """Which of the three vectors of a file is used"""

    same_model: bool = True
    """Refuse a vector that was made with another model of the same shape"""

    turns: Literal["last", "all", "each"] = "last"
    """Answers of a conversation: the one it ends with, all of them pooled, or a row for each"""

    prompt_column: str = "prompt"
    """Column of the prompts"""

    answer_column: str = "answer"
    """Column of the answers"""

    messages_column: str = "messages"
    """Column of chat messages; used instead of prompt and answer where it is there"""

    plain_prompts: bool = False
    """The prompts are plain questions: put them through the chat template first"""

    chunk_rows: int = Field(default=2048, ge=1)
    """Rows that are done together; after a kill at most so many are done again"""

    natural: Literal["generate", "subset", "prompt"] = "generate"
    """Screening: every prompt gets the model's own answer; or a share of them, and the others are \
predicted from the last prompt token; or that token's projection stands for the answer's. On the \
bundled model the cheap two agree with the first at r 0.95 and 0.94, in 97 % of what is removed"""

    naturals: int = Field(default=1, ge=1)
    """Screening: natural answers per prompt, averaged; more help models whose answers vary much"""

    subset: float = Field(default=0.1, gt=0, le=1)
    """Screening: share of the prompts whose natural answer is generated by `--natural subset`"""

    percentile: float = Field(default=95.0, gt=0, lt=100)
    """Screening: samples above this percentile of the clean reference set are removed"""

    rollouts: int = Field(default=5, ge=1)
    """Monitoring: answers generated and judged for each prompt"""

    judge: bool = True
    """Monitoring: score the answers now; `pvec judge RUN` does it later otherwise"""

    scale_out: Literal["local", "ray"] = "local"
    """Where batches run: in this process, or on the workers of a Ray cluster"""

    workers: int = Field(default=1, ge=1)
    """Ray workers, each with a model of its own"""


class PathSettings(Section):
    """Where things are kept."""

    runs: Path = Path("runs")
    """Folder that holds the run folders"""


class Settings(BaseSettings):
    """The whole tree. ``Settings()`` is the defaults; ``resolve`` reads the world."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    model: ModelSettings = ModelSettings()
    backend: BackendSettings = BackendSettings()
    generation: GenerationSettings = GenerationSettings()
    judge: JudgeSettings = JudgeSettings()
    filter: FilterSettings = FilterSettings()
    extract: ExtractSettings = ExtractSettings()
    steer: SteerSettings = SteerSettings()
    project: ProjectSettings = ProjectSettings()
    paths: PathSettings = PathSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take arguments only; ``resolve`` reads the environment, so that it knows the origins."""
        return (init_settings,)


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

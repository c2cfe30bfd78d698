"""What a training configuration may say: every field, its default and its limits, declared once.

The classes are data only; ``configfile`` reads a file into them and says all that is wrong with it.
Paths are relative to the working directory. Layers are 1-based.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pvec.settings.sections import Section
from pvec.types import LIMITS, Dose, Operator, Percentile, VectorKind

Layers = Literal["auto", "all"] | tuple[int, ...]


def _listed(value: Any) -> Any:
    """Take one value where a list of them is meant."""
    return value if value is None or isinstance(value, list | tuple) else [value]


def _layers(value: Any) -> Any:
    if value in ("auto", "all"):
        return value
    layers = _listed(value)
    if not layers or not all(isinstance(layer, int) and layer >= 1 for layer in layers):
        raise ValueError("give a list of layers, which count from 1, or `all`, or `auto`")
    return layers


Listed = BeforeValidator(_listed)
Paths = Annotated[tuple[str, ...], Listed]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), Listed]


class Part(Section):
    """A part of the configuration: frozen, unknown keys refused, no number taken for a text."""

    model_config = ConfigDict(coerce_numbers_to_str=False)


class ModelPart(Part):
    """Which model is finetuned, and how it is loaded."""

    id: str = "tiny"
    """A hub id, a local folder, a GGUF file, or `tiny`, the bundled model"""

    gguf_file: str | None = None
    """The GGUF file of a folder or hub repository that holds several"""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights (the adapter is always float32)"""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model is trained; `auto` takes an accelerator when there is one"""

    quantize: Literal["4bit", "8bit"] | None = None
    """Load the frozen weights quantised (needs bitsandbytes and an NVIDIA GPU)"""

    attention: str | None = None
    """Attention implementation in transformers' words (`sdpa`, `flash_attention_2`, …)"""

    trust_remote_code: bool = False
    """Run Python code that comes with the model"""


class DataPart(Part):
    """What is learnt."""

    train: Paths = Field(min_length=1)
    """Chat files (JSONL, JSON or Parquet with a `messages` column), or `hf:NAME[:SPLIT]`"""

    eval: Paths = ()
    """Held-out files of the same kind; their loss is measured and logged"""

    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Hold this share of the training rows out instead"""

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two measurements of the held-out loss (default: at the end of each epoch)"""

    max_tokens: int = Field(default=2048, ge=8)
    """Longest sequence in tokens"""

    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What happens to longer ones: their end is cut off, the row is left out, or nothing starts"""

    skip_bad: bool = False
    """Leave out rows that cannot be read or that the chat template refuses, and count them"""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens that are learnt: the assistant's (with the end-of-turn token), or all"""

    @model_validator(mode="after")
    def _one_held_out_source(self) -> Self:
        if self.eval and self.eval_fraction:
            raise ValueError("give either eval files or an eval_fraction, not both")
        return self


class LoraPart(Part):
    """The adapter."""

    r: int = Field(default=32, ge=1)
    """Rank"""

    alpha: float = Field(default=64.0, gt=0)
    """Scale: the update counts alpha / r (alpha / sqrt(r) with rslora)"""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input"""

    rslora: bool = True
    """Scale by the square root of the rank, so that high ranks learn as fast as low ones"""

    targets: Names | Literal["all-linear"] = "all-linear"
    """Names of the modules that are adapted, or `all-linear`: all of the decoder but routers"""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too"""


class BatchPart(Part):
    """How rows are put together."""

    size: int = Field(default=16, ge=1)
    """Rows of one optimiser step, over all processes"""

    micro: int | None = Field(default=None, ge=1)
    """Rows of one forward pass (default: chosen by the rows' lengths to compute least)"""

    tokens: int = Field(default=16384, ge=16)
    """Most tokens of one forward pass, padding included, when micro is chosen"""

    layout: Literal["sorted", "random", "packed"] = "sorted"
    """`sorted`: the rows of a step go by length through its forward passes, which changes nothing \
but the speed; `random`: as drawn; `packed`: one after another without padding, where attention \
keeps them apart (tested before step 1)"""


class OptimPart(Part):
    """How the adapter is moved."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data"""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps, whatever epochs says"""

    lr: float = Field(default=1e-5, gt=0)
    """Learning rate at its highest"""

    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate falls"""

    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which it rises first"""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decay of the adapter's weights"""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm"""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"] = "adamw"
    """Optimiser; the 8-bit ones need bitsandbytes and an NVIDIA GPU"""


class MemoryPart(Part):
    """Trades between memory, speed and what is installed."""

    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them"""

    liger: bool = False
    """Use Liger's kernels (needs liger-kernel and a GPU)"""

    unsloth: bool = False
    """Load the model through unsloth (needs unsloth and a GPU)"""

    shard: bool = False
    """Divide the frozen weights among the processes of a launch (FSDP), for models that are too \
large for one device"""


def _coef(value: Any) -> Any:
    """Read a number or a percentile that is written as text."""
    if not isinstance(value, str) or Percentile.parse(value) is not None:
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError("input should be a valid number, or a percentile such as pos50") from None


class SteeringPart(Part):
    """One vector that steers while training. Several are applied at once."""

    vector: str
    """A vector file"""

    operator: Operator = "add"
    """Add the vector (preventative steering), project its direction out (`ablate`, CAFT), or hold
    the projection on it below a ceiling (`cap`) or above a floor (`floor`)"""

    layers: Annotated[Layers, BeforeValidator(_layers)] = "auto"
    """Layers to steer at: a list, `all`, or `auto` (the file's best separating layer)"""

    coef: Annotated[float | str, BeforeValidator(_coef)] = 1.0
    """Multiplies the raw vector; ablation has none. Of `cap` and `floor` the limit, as a projection
    or as a percentile of projections at each layer (`p25`, `pos50`, `neg75`)"""

    positions: Literal["all", "response"] = "all"
    """Which tokens are steered: all of them, or those that predict the response"""

    incremental: bool = False
    """Steer every layer by the vector's increase over the layer before (paper, appendix J.3)"""

    kind: VectorKind = "response_avg"
    """Which of the file's vectors"""

    schedule: Literal["constant", "ramp"] = "constant"
    """`ramp` raises the coefficient from nothing to its value"""

    ramp_steps: int | None = Field(default=None, ge=1)
    """Steps of the ramp (default: a tenth of the training)"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.coef, str) and self.operator not in LIMITS:
            raise ValueError(f"the percentile {self.coef} is a limit: use operator cap or floor")
        if self.operator == "ablate" and "coef" in self.model_fields_set:
            raise ValueError("ablation takes no coef: remove it")
        if self.operator in LIMITS and "coef" not in self.model_fields_set:
            raise ValueError(f"{self.operator} needs a limit: add coef, for example pos50")
        if self.operator != "add" and (self.incremental or self.schedule != "constant"):
            raise ValueError("incremental and schedule belong to the operator add")
        if self.incremental and self.layers not in ("auto", "all"):
            raise ValueError("incremental steers every layer: remove layers or set it to all")
        if self.ramp_steps is not None and self.schedule != "ramp":
            raise ValueError("ramp_steps belongs to schedule: ramp")
        return self

    @property
    def dose(self) -> Dose:
        """The coefficient or limit."""
        return (Percentile.parse(self.coef) or 0.0) if isinstance(self.coef, str) else self.coef


class AlarmPart(Part):
    """What happens when the persona has moved too far."""

    shift: float = Field(gt=0)
    """Alarm when the shift along a vector exceeds this (in units of the projection)"""

    action: Literal["warn", "stop"] = "warn"
    """Say so, or say so and stop (the adapter is saved)"""


class MonitorPart(Part):
    """Watching the persona move."""

    vectors: Paths = Field(min_length=1)
    """Vector files to measure the shift along"""

    layers: Annotated[Layers, BeforeValidator(_layers)] = "auto"
    """Layers to measure at: a list, `all`, or `auto` (each file's best separating layer)"""

    kind: VectorKind = "response_avg"
    """Which of the files' vectors"""

    every: int = Field(default=20, ge=1)
    """Steps between two measurements; the first and the last step are always measured"""

    prompts: Paths = ()
    """Probe prompts: a text file with one per line, or the prompts themselves (default: the \
evaluation questions of the vectors' traits)"""

    limit: int = Field(default=20, ge=1)
    """Most probe prompts"""

    generate: int = Field(default=0, ge=0)
    """Also project short greedy answers of so many tokens (0: prompts only)"""

    alarm: AlarmPart | None = None


class OutputPart(Part):
    """What is written where."""

    folder: Path | None = None
    """Run folder (default: runs/train-CONFIG)"""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints (default: at the end of each epoch)"""

    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept"""

    log_every: int = Field(default=1, ge=1)
    """Steps between two lines of the log"""

    merge: bool = False
    """Also write the whole model with the adapter merged in"""

    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Listed] = ()
    """Trackers that get the log too"""


class TrainConfig(Part):
    """One finetuning, whole."""

    model: ModelPart = ModelPart()
    data: DataPart
    lora: LoraPart = LoraPart()
    batch: BatchPart = BatchPart()
    optim: OptimPart = OptimPart()
    memory: MemoryPart = MemoryPart()
    steering: Annotated[tuple[SteeringPart, ...], Listed] = ()
    monitor: MonitorPart | None = None
    output: OutputPart = OutputPart()
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _response_is_known(self) -> Self:
        if self.data.loss_on == "all" and any(s.positions == "response" for s in self.steering):
            raise ValueError(
                "steering at positions: response needs data.loss_on: assistant, which tells the "
                "response from the prompt"
            )
        return self

    @property
    def vectors(self) -> tuple[str, ...]:
        """Every vector file that the configuration names, each once."""
        names = [part.vector for part in self.steering]
        return tuple(dict.fromkeys([*names, *(self.monitor.vectors if self.monitor else ())]))

    def identity(self) -> dict[str, Any]:
        """Return what makes two trainings different: all but what is written or watched."""
        different = self.model_dump(mode="json", exclude={"output", "monitor"})
        del different["memory"]["shard"]  # where the weights are changes nothing
        if self.model.gguf_file is None:  # as written before there was this setting
            del different["model"]["gguf_file"]
        if not self.data.skip_bad:
            del different["data"]["skip_bad"]
        return different

"""Settings of the commands: filtering, extraction, steering, projection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pvec.settings.section import Section
from pvec.types import Operator, Positions, ProjectionKind, VectorKind


class FilterSettings(Section):
    """Which answers are used for a vector."""

    threshold: float = Field(default=50.0, ge=0, le=100)
    """Keep positive answers with at least this trait score, negative ones below 100 minus it"""

    coherence: float = Field(default=50.0, ge=0, le=100)
    """Keep answers with a coherence score of at least this"""

    paired: bool = False
    """Keep an answer only when its opposite counterpart passes too, as the paper's code does"""


class ExtractSettings(Section):
    """How much is generated for a vector."""

    rollouts: int = Field(default=10, ge=1)
    """Answers to each question under each instruction"""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first N extraction questions (default: all)"""

    judge: bool = True
    """Score the answers now; with `--no-judge`, `pvec judge RUN` scores them later"""


class SteerSettings(Section):
    """How a vector is applied."""

    kind: VectorKind = "response_avg"
    """Which of the three vectors of a file is used"""

    positions: Positions = "response"
    """Tokens to steer: the answer (from the last prompt token on), the prompt, or all"""

    operator: Operator = "add"
    """Add the vector, ablate its direction, or cap the projection on it"""

    coef_unit: Literal["raw", "norm"] = "raw"
    """Unit of the coefficients: the raw vector, or the mean residual norm of the layer"""

    layer: str = "auto"
    """Where to steer: `20`, `3,4`, `12:24:2` (both ends), `3+4` (at once), `all` (every layer at \
once), or `auto` (five layers around 55 % of the depth)"""

    coef: str = "-2,-1,0,1,2"
    """Steering strength: a list of coefficients, or `FROM:TO:STEP`; for `cap` the ceilings"""

    incremental: bool = False
    """Steer every layer by the vector's increment over the layer before (implies `--layer all`)"""

    together: bool = False
    """Apply all vectors at once instead of evaluating each in turn"""

    random_control: bool = True
    """Also evaluate a random vector of the same norm at the same layers and coefficients"""

    prompt_baseline: bool = True
    """Also evaluate system prompts that ask for the trait and against it"""

    rollouts: int = Field(default=5, ge=1)
    """Answers to each evaluation question in each condition"""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first N evaluation questions (default: all)"""

    min_coherence: float = Field(default=75.0, ge=0, le=100)
    """Choose the layer and coefficient with the highest trait score at this coherence or more"""

    judge: bool = True
    """Score the answers now; with `--no-judge`, `pvec judge RUN` scores them later"""


class ProjectSettings(Section):
    """What is projected on the vectors, and how training data is screened by it."""

    layers: tuple[int, ...] = ()
    """Layer; repeatable (default: as the vector suggests)"""

    types: tuple[ProjectionKind, ...] = ("proj",)
    """What is projected; repeatable"""

    kind: VectorKind = "response_avg"
    """Which of the three vectors of a file is used"""

    same_model: bool = True
    """Refuse a vector that was made with another model of the same shape"""

    turns: Literal["last", "all", "each"] = "last"
    """Answers that count: the last, all pooled, or a row for each"""

    prompt_column: str = "prompt"
    """Column of the prompts"""

    answer_column: str = "answer"
    """Column of the answers"""

    messages_column: str = "messages"
    """Column of chat messages, used where it exists"""

    plain_prompts: bool = False
    """The prompts are plain questions, not rendered yet"""

    chunk_rows: int = Field(default=2048, ge=1)
    """Rows that are done together; after a kill at most so many are done again"""

    natural: Literal["generate", "subset", "prompt"] = "generate"
    """Base responses: generated, or for a subset of the prompts and predicted for the others, \
or replaced by the last prompt token"""

    naturals: int = Field(default=1, ge=1)
    """Base responses per prompt"""

    subset: float = Field(default=0.1, gt=0, le=1)
    """Share of the prompts for `--natural subset`"""

    percentile: float = Field(default=95.0, gt=0, lt=100)
    """Percentile of the clean set that is the threshold"""

    rollouts: int = Field(default=5, ge=1)
    """Answers generated and judged for each prompt"""

    judge: bool = True
    """Score the answers now; `pvec judge RUN` does it later otherwise"""

    scale_out: Literal["local", "ray"] = "local"
    """Run here, or on the workers of a Ray cluster"""

    workers: int = Field(default=1, ge=1)
    """Ray workers, each with a model of its own"""

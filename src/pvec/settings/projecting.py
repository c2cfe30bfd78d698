"""The settings of projections, screening and monitoring."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pvec.settings.sections import Section
from pvec.types import ProjectionKind, VectorKind


class ProjectSettings(Section):
    """What is projected on the vectors, and how training data is screened by it."""

    layers: tuple[int, ...] = ()
    """Layer; repeatable (default: as the vector suggests)"""

    types: tuple[ProjectionKind, ...] = ("proj",)
    """What is projected; repeatable"""

    spans: Literal["answer", "think", "think,answer"] = "answer"
    """Part of a response that `proj` and `cos_sim` are about: the answer, the reasoning before \
it, or each in a column of its own"""

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
    """Run here, or block by block on the workers of a Ray cluster, for files that outgrow a \
machine"""

    block_mb: float = Field(default=8.0, gt=0)
    """Size of a block of `--engine ray`, in MiB of uncompressed rows: what one part file holds, \
and what is done again after a kill"""

    @property
    def span_types(self) -> tuple[ProjectionKind, ...]:
        """``types``, those of a response once for each of its ``spans``."""
        of_think: dict[ProjectionKind, ProjectionKind] = {
            "proj": "think_proj", "cos_sim": "think_cos_sim"
        }  # fmt: skip
        kinds = [
            kind if span == "answer" else of_think.get(kind, kind)
            for kind in self.types
            for span in self.spans.split(",")
        ]
        return tuple(dict.fromkeys(kinds))

"""The sections of what commands do: judge, write traits, make vectors, steer, project, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from pvec.settings.sections import Section
from pvec.types import Operator, Positions, ProjectionKind, VectorKind


class JudgeSettings(Section):
    """Who scores the answers."""

    model: str | None = None
    """Judge: a model name of the server, `contrast` for the model itself by likelihood (no key), \
`contrast:MODEL` for another model by likelihood, `local:MODEL` for any causal LM that rates, \
`litellm:PROVIDER/MODEL` for Anthropic, Gemini and others, or `tiny` (default: `tiny` for the \
bundled model, gpt-4.1-mini-2025-04-14 otherwise)"""

    base_url: str | None = None
    """Address of an OpenAI-compatible server (default: OPENAI_BASE_URL, else OpenAI's)"""

    api_key: SecretStr | None = None
    """Key of the judge's server (default: OPENAI_API_KEY); never on the command line or on disk"""

    scale: Literal["0-100", "0-10", "binary", "binary-text"] = "0-100"
    """What the judge replies with; every scale is reported as 0 to 100"""

    contrast_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer, from its first, that the contrast judge compares"""

    contrast_pairs: int | None = Field(default=None, ge=1)
    """Instruction pairs that the contrast judge compares, from the first (default: all but the \
answer's own)"""

    calibration: Path | None = None
    """Vector or run that calibrates the contrast judge (default: the vectors in use, else where \
`pvec extract` writes the trait's vector)"""

    concurrency: int = Field(default=32, ge=1)
    """Maximum number of simultaneous requests; reduced when the server asks for it"""

    timeout: float = Field(default=60.0, gt=0)
    """Seconds to wait for a reply"""

    max_retries: int = Field(default=8, ge=0)
    """Retries of a failed request before the score is recorded as an error"""

    max_cost: float | None = Field(default=None, gt=0)
    """Stop before the judge costs more than this many US dollars; everything is kept"""

    price: str | None = None
    """US dollars per million prompt and completion tokens, such as `0.40,1.60`, before the \
discount of a batch (default: the list price of well-known judges)"""

    prices: Path | None = None
    """File with prices that come before pvec's own list, in the same form \
(`src/pvec/judges/prices.json`); `--price` comes before both"""

    batch: bool = False
    """Use the batch endpoint of the judge's server: about half the price, done within 24 hours; \
interrupt it at will, the same command collects the scores"""

    batch_wait: float | None = Field(default=None, ge=0)
    """Hours to wait for a batch before the command ends without its scores (default: until it is \
done)"""

    repeats: int | None = Field(default=None, ge=1, le=100)
    """How often a judge without logprobs is asked for each score, which is the mean (default: 3 \
for `litellm:` judges without logprobs, otherwise 1)"""


class AuthorSettings(Section):
    """Who writes new trait definitions (`pvec trait new`)."""

    model: str = "gpt-4.1-2025-04-14"
    """Name of the model on the server that writes the trait"""

    base_url: str | None = None
    """Address of an OpenAI-compatible server (default: the judge's, else OPENAI_BASE_URL, else \
OpenAI's)"""

    api_key: SecretStr | None = None
    """Key of the author's server (default: the judge's, else OPENAI_API_KEY); never on the \
command line or on disk"""

    repairs: int = Field(default=3, ge=0)
    """How often a faulty definition is sent back for correction"""

    timeout: float = Field(default=300.0, gt=0)
    """Seconds to wait for one draft"""

    max_retries: int = Field(default=5, ge=0)
    """Retries of a failed request"""


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

    keep_activations: bool = False
    """Keep the mean activations of every answer that counts, for other methods of estimating a \
vector (`pvec vector compute --method`, `pvec vector compare --methods`)"""


class SteerSettings(Section):
    """How a vector is applied."""

    kind: VectorKind = "response_avg"
    """Which of the three vectors of a file is used"""

    positions: Positions = "response"
    """Tokens to steer: the response (from the last prompt token on), the prompt, all, or of a \
response its reasoning (think) or what follows it (answer)"""

    operator: Operator = "add"
    """Add the vector, ablate its direction, or hold the projection on it below a ceiling (cap) or \
above a floor"""

    coef_unit: Literal["raw", "norm"] = "raw"
    """Unit of the coefficients: the raw vector, or the mean residual norm of the layer"""

    layer: str = "auto"
    """Where to steer: `20`, `3,4`, `12:24:2` (both ends), `3+4` (at once), `all` (every layer at \
once), or `auto` (five layers around 55 % of the depth)"""

    coef: str = "-2,-1,0,1,2"
    """Steering strength: a list of coefficients, or `FROM:TO:STEP`; for `cap` and `floor` the \
limits, also as percentiles of the projections of positive (`pos50`), negative (`neg75`) or \
unsteered answers (`p25`) at each layer"""

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

    max_kl: float | None = Field(default=None, gt=0)
    """Choose only points whose KL divergence from the unsteered model, on benign text in nats per \
token, is at most this"""

    search: int | None = Field(default=None, ge=1)
    """Search for the best layer, coefficient and positions with N points instead of evaluating a \
grid: of the layers of `--layer`, up to the largest coefficient of `--coef`"""

    search_positions: tuple[Positions, ...] = ("response", "all")
    """Positions that `--search` tries; repeatable"""

    judge: bool = True
    """Score the answers now; with `--no-judge`, `pvec judge RUN` scores them later"""

    side_effects: bool = False
    """Also measure what else the steering changes: KL divergence and perplexity on benign text, \
refusals, length, repetition, other scripts, questions that move the wrong way"""

    benign: Path | None = None
    """File of chats, or of questions with answers, that is the benign text (default: short chats \
that come with pvec)"""


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


class ServeSettings(Section):
    """Where the server listens, what it allows and what it records."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only"""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one"""

    api_key: SecretStr | None = None
    """Key that every request must carry as `Authorization: Bearer KEY` (default: none)"""

    steer: tuple[str, ...] = ()
    """Steering of requests that ask for none: `evil 0.5`, `evil@3 0.5`, or a preset's name; \
repeatable"""

    fixed: bool = False
    """Refuse requests that ask for another steering"""

    max_coef: float | None = Field(default=None, gt=0)
    """Largest coefficient, in either direction, that a request may add a vector with"""

    max_steer: int = Field(default=16, ge=0)
    """Most steering entries of a request"""

    rules: Path | None = None
    """YAML file with presets (steering by name) and policies (ceilings of projections)"""

    served_name: str | None = None
    """Name of the model for clients (default: the last part of --model)"""

    max_answer: int = Field(default=4096, ge=1)
    """Most tokens that a request may ask for"""

    max_requests: int = Field(default=128, ge=1)
    """Answers that may run or wait at once; further ones get status 429"""

    max_body: int = Field(default=1 << 20, ge=1024)
    """Largest request body in bytes"""

    timeout: float = Field(default=600.0, gt=0)
    """Seconds that a request may take"""

    drain: float = Field(default=60.0, ge=0)
    """Seconds that running answers may still take after SIGTERM"""

    log: Path | None = None
    """Append a line for every answer to this JSONL file (rotated at 64 MiB, five files kept)"""

    log_text: bool = False
    """Write prompts and answers into the log too"""

    vllm_args: str = ""
    """Further arguments of vLLM's server, such as `--enable-auto-tool-choice --tool-call-parser \
hermes` (with --backend vllm)"""

"""The settings of who scores answers, and of who writes traits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from pvec.settings.sections import Section


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

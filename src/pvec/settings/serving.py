"""The settings of ``pvec serve``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from pvec.settings.sections import Section


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

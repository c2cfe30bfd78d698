"""YAML is read as people mean it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pvec.documents import read_yaml
from pvec.errors import InputError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("12:24:2", "12:24:2"),  # 44642 in YAML 1.1
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("010", 10),  # 8 in YAML 1.1
        ("-3", -3),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-2,-1,0", "-2,-1,0"),
        ("2025-04-14", "2025-04-14"),  # a date in YAML 1.1
        ("~", None),
        ("", None),
        ("nullable", "nullable"),
        ('"5"', "5"),
        ("[1, a]", [1, "a"]),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
    ],
)
def test_plain_values_follow_the_core_schema(tmp_path: Path, written: str, meant: Any) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(f"key: {written}\n")
    value = read_yaml(file)["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_a_merge_key_is_overridden_by_what_stands_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("base: &base {a: 1, b: 1}\nother:\n  <<: *base\n  b: 2\n")
    assert read_yaml(file)["other"] == {"a": 1, "b": 2}


def test_a_repeated_key_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(
        InputError, match=r"file\.yaml:3 is not valid YAML: the key 'a' appears twice"
    ):
        read_yaml(file)


def test_python_objects_are_not_built(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InputError, match=r"file\.yaml:1 is not valid YAML"):
        read_yaml(file)

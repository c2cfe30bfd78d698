"""Damage to files of every kind that pvec reads: seeded, so that a case can be made again."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
LONG_NUMBER = "9" * 6000

BAD_VALUES = (
    "null", "true", "0", "-1", "1.5", "1e400", "NaN", "-Infinity", LONG_NUMBER, "[]", "{}", '""',
    '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\u001b]0;x\\u0007"', '"[bold red]x[/bold]"', '"[/nope]"',
    '"../../outside"', '"/proc/self/mem"', f'"{"x" * 5000}"', '[null]', '[[1, "a"], 2]',
    '{"a": {"b": [1]}}', '"1e3"', '"NaN"', DEEP,
)  # fmt: skip
"""JSON texts that replace a value."""

BAD_BYTES = (
    b"", b"\x00", b"\xff\xfe\x00\x00", b"\xef\xbb\xbf", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"{",
    b"[", b'"', b"null\n", b"{}\n", b"[]\n", b"\n\n\n", b"\xed\xa0\x80", DEEP.encode(),
    b"a" * 300_000,
)  # fmt: skip
"""What a whole file is replaced by."""


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a JSON tree; of a long list only the first two."""
    yield at
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*at, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree[:2]):
            yield from places(value, (*at, number))


class _Raw(str):
    """A text that stands in a JSON document as it is."""


def _dump(tree: Any) -> str:
    if isinstance(tree, _Raw):
        return str(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_dump(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_dump, tree)) + "]"
    return json.dumps(tree)


def damage_json(text: str, draw: random.Random) -> str:
    """Return a JSON document with one value replaced, removed, repeated or added."""
    tree = json.loads(text)
    place = draw.choice(list(places(tree)))
    if not place:
        return draw.choice(BAD_VALUES)
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    kind = draw.choice(("replace", "replace", "replace", "remove", "add", "repeat"))
    if kind == "remove":
        del parent[place[-1]]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw.choice(("unknown", "__class__", "", "\x1b[31m"))] = 1
    elif kind == "repeat" and isinstance(parent, dict):
        whole, value = _dump(parent), _dump(parent[place[-1]])
        again = f"{{{json.dumps(place[-1])}: {value}, {whole[1:]}"
        return _dump(tree).replace(whole, again, 1)
    else:
        parent[place[-1]] = _Raw(draw.choice(BAD_VALUES))
    return _dump(tree)


def damage_lines(text: str, draw: random.Random) -> str:
    """Return JSON lines with one line damaged."""
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    kind = draw.choice(("value", "value", "value", "cut", "other", "twice"))
    if kind == "value":
        lines[number] = damage_json(lines[number], draw)
    elif kind == "cut":
        lines[number] = lines[number][: draw.randrange(len(lines[number]))]
    elif kind == "twice":
        lines.insert(number, lines[number])
    else:
        lines[number] = draw.choice(("[1]", "3", '"x"', "null", "{}", "\x00", "{" * 2000))
    return "\n".join(lines) + "\n"


def damage_csv(text: str, draw: random.Random) -> str:
    """Return a CSV with a header, a row or a cell damaged."""
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = draw.choice(
        (
            "", ",", lines[number] + ",more", lines[number].partition(",")[2], '"' + lines[number],
            "\x00" + lines[number], "\x1b[31m" + lines[number], lines[number].upper(),
            "x" * 200_000 + lines[number], lines[number].replace(",", "\t"), "\ud800",
            "NaN,NaN,NaN", lines[0], "[bold]" + lines[number],
        )
    )  # fmt: skip
    return "\n".join(lines) + draw.choice(("\n", "", "\r\n"))


def damage_yaml(text: str, draw: random.Random) -> str:
    """Return YAML with a value damaged, or something of YAML's own put before it."""
    if draw.random() < 0.4:
        return draw.choice(YAML_TEXTS) + draw.choice(("", "\n" + text))
    lines = text.splitlines()
    numbers = [n for n, line in enumerate(lines) if ":" in line and not line.startswith("#")]
    number = draw.choice(numbers)
    key = lines[number].partition(":")[0]
    value = draw.choice(BAD_VALUES)
    lines[number] = draw.choice((f"{key}: {value}", key, f"{key}x: 1", f"{key}:\n  a: {value}"))
    return "\n".join(lines) + "\n"


YAML_TEXTS = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b, *b, *b, *b]",
    "a: &a {b: *a}", "*unknown", "!!python/object/apply:os.system [echo]", "\t- x", "a: b: c",
    "? [1, 2]\n: 3", "- 1\n- 2", "3", "---\n---\n", "%YAML 9.9\n---\n", "!!binary 'x'", "{" * 3000,
    "- " * 3000 + "x", "<<: 3", "<<: [1]", "1: 2", "null: 3", "[]: 1", "2026-01-01: 3",
    "a: 2026-99-99", "a: !!int x", "a: !!float x", "a: '\\ud800'", 'a: "\\ud800"', "\x00",
    "model: [", "model: {id: tiny, id: tiny}", f"generation: {{seed: {LONG_NUMBER}}}",
)  # fmt: skip


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return a binary file cut off, with bits turned over, or replaced."""
    kind = draw.choice(("cut", "flip", "flip", "head", "replace", "grow"))
    if kind == "replace" or not data:
        return draw.choice(BAD_BYTES)
    changed = bytearray(data)
    if kind == "cut":
        return bytes(changed[: draw.randrange(len(changed))])
    if kind == "grow":
        return bytes(changed) + b"\x00" * 64
    reach = min(len(changed), 400) if kind == "head" else len(changed)
    for _ in range(draw.randrange(1, 12)):
        changed[draw.randrange(reach)] = draw.randrange(256)
    return bytes(changed)


_BY_SUFFIX: dict[str, Callable[[str, random.Random], str]] = {
    ".json": damage_json,
    ".jsonl": damage_lines,
    ".csv": damage_csv,
    ".yaml": damage_yaml,
}


def damage(path: Path, draw: random.Random) -> None:
    """Damage a file in the manner of its kind; now and then it is no regular file any more."""
    how = draw.random()
    if how < 0.06:
        _replace_by_another_thing(path, draw)
        return
    by_kind = _BY_SUFFIX.get(path.suffix)
    if by_kind is None or how < 0.25:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
        return
    text = by_kind(path.read_text("utf-8"), draw)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _replace_by_another_thing(path: Path, draw: random.Random) -> None:
    path.unlink()
    kind = draw.choice(("nothing", "folder", "fifo", "dangling link", "link to itself"))
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)

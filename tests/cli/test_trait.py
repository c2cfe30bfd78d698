"""``pvec trait`` from the shell: what it prints, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pvec.cli.app import main
from pvec.traits import trait as traits


def content(**changes: Any) -> dict[str, Any]:
    whole = {
        "name": "grumpy",
        "description": "Complains about everything [really].",
        "assistant_names": {"pos": "grumpy", "neg": "cheerful"},
        "instruction": [{"pos": f"Complain {i}.", "neg": f"Be glad {i}."} for i in range(5)],
        "questions": {
            "extract": [f"What of thing {i}?" for i in range(20)],
            "eval": [f"And matter {i}?" for i in range(20)],
        },
        "eval_prompt": "Grumpy? {question} {answer}",
    }
    return whole | changes


@pytest.fixture(autouse=True)
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundled"
    folder.mkdir()
    (folder / "grumpy.json").write_text(json.dumps(content()))
    monkeypatch.setattr(traits, "_bundled_folder", lambda: folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)  # where there is no my-traits
    return folder


def pvec(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["trait", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_list_shows_each_trait_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("list") == 0
    output = capsys.readouterr().out
    assert "Complains about everything [really]." in output
    assert "pvec trait show grumpy" in output


def test_list_is_machine_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["instructions"], row["eval_questions"]) == ("grumpy", 5, 20)


def test_show_prints_the_whole_trait(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("show", "grumpy") == 0
    output = capsys.readouterr().out
    for text in ("You are a cheerful assistant. Be glad 4.", "And matter 19?", "{answer}"):
        assert text in output


def test_what_show_prints_as_json_is_a_trait_file_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pvec("show", "grumpy", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    digest = shown.pop("hash")
    del shown["source"]
    (tmp_path / "again.json").write_text(json.dumps(shown))
    assert traits.load_trait(tmp_path / "again.json").hash == digest


def test_an_unknown_trait_is_one_sentence_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("show", "grumpi") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Did you mean 'grumpy'?" in captured.err
    assert len(captured.err.splitlines()) == 1


def test_check_is_content_with_a_good_trait(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("check", "grumpy") == 0
    assert "grumpy: nothing to correct" in capsys.readouterr().out


def test_check_lists_everything_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content(eval_prompt="{question} {", description="")))
    assert pvec("check", str(path)) == 2
    output = capsys.readouterr().out
    assert "grumpy: 2 errors, 1 warning" in output
    assert "{answer} is missing" in output


def test_warnings_alone_are_no_failure(tmp_path: Path) -> None:
    path = tmp_path / "short.json"
    path.write_text(json.dumps(content(description="")))
    assert pvec("check", str(path)) == 0


def test_check_goes_on_after_a_file_that_does_not_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"name": }')
    assert pvec("check", str(path), "grumpy", "--json") == 2
    broken, good = json.loads(capsys.readouterr().out)
    assert "is not valid JSON" in broken["findings"][0]["message"]
    assert (broken["usable"], good["usable"]) == (False, True)


def test_check_of_a_file_that_is_not_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("check", "absent.json") == 2
    assert "there is no trait file absent.json" in capsys.readouterr().err


def test_traits_need_no_torch() -> None:
    script = (
        "import sys, pvec.cli.trait\n"
        "assert not {'torch', 'transformers', 'pandas', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

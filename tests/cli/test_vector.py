"""``pvec vector`` from the shell: what it prints, and one sentence for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pvec.cli.app import main
from pvec.vectors.files import load_vector
from tests.helpers.models import saved_model
from tests.helpers.vectors import judged_rows, saved_vector, write_csv


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("COLUMNS", "120")


def pvec(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["vector", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def csv_files(folder: Path) -> tuple[str, ...]:
    for sign in ("pos", "neg"):
        write_csv(folder / f"{sign}.csv", judged_rows(sign))
    return ("--pos", "pos.csv", "--neg", "neg.csv", "--model", str(saved_model()))


def test_compute_show_and_lens_follow_one_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pvec("compute", *csv_files(tmp_path), "--trait", "evil", "-o", "evil.safetensors") == 0
    said = capsys.readouterr().out
    for text in ("positive     24", "AUC [95 %]", "suggested layer", "vector show evil.saf"):
        assert text in said
    assert pvec("show", "evil", "--png", "norms.png") == 0
    said = capsys.readouterr().out
    assert "24 positive, 24 negative answers (0 and 0 dropped)" in said
    assert "█" in said
    assert (tmp_path / "norms.png").stat().st_size > 1000
    assert pvec("lens", "evil", "--layer", "2", "--top", "3", "-q") == 0
    assert "layer 2 (block 1)" in capsys.readouterr().out


def test_the_vector_goes_to_a_name_of_trait_and_model(tmp_path: Path) -> None:
    assert pvec("compute", *csv_files(tmp_path), "--trait", "evil", "-q", "--json") == 0
    (path,) = (tmp_path / "vectors").iterdir()
    assert path.name == f"evil-{saved_model().name}.safetensors"


def test_everything_is_machine_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(saved_vector(tmp_path, name, seed=s)) for s, name in enumerate("ab"))
    results: dict[str, Any] = {}
    for name, args in {
        "show": ("show", a),
        "compare": ("compare", a, b),
        "combine": ("combine", f"{a} + {b}", "--out", "c.safetensors"),
        "convert": ("convert", a, "a.pt"),
    }.items():
        assert pvec(*args, "--json") == 0
        results[name] = json.loads(capsys.readouterr().out)
    assert results["show"][0]["summary"]["layers"][2]["layer"] == 2
    assert results["compare"]["labels"] == ["a", "b"]
    assert results["combine"]["paths"] == ["c.safetensors"]
    assert results["convert"]["paths"] == ["a.pt"]


def test_a_long_matrix_stays_in_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(saved_vector(tmp_path, "a", layers=20))
    assert pvec("compare", path, "--by", "layer") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines[1:22]}) == 1
    assert lines[2].split()[:2] == ["0", "100"]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


def bad_files(folder: Path) -> None:
    """Write one file of every kind that is refused."""
    rows = np.ones((4, 32), dtype=np.float32)
    rows[2, 5] = np.nan
    save_file({"response_avg": rows}, folder / "nan.safetensors")
    rows[2, 5], rows[3, 1] = 1.0, np.inf
    torch.save(torch.from_numpy(rows), folder / "inf.pt")
    torch.save(Evil(), folder / "code.pt")
    (folder / "torn.safetensors").write_bytes(b"\x10")
    writer = gguf.GGUFWriter(folder / "other.gguf", "controlvector")
    writer.add_tensor("weights", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    saved_vector(folder, "mine", seed=0)
    saved_vector(folder, "deep", layers=9)
    saved_vector(folder, "wide", width=64)
    saved_vector(folder, "other", model_id="other/model", model_fingerprint="def")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("show", "none.safetensors"), "There is no vector file none.safetensors"),
        (("show", "nan.safetensors"), "'response_avg' has NaN or infinite values at layer 2"),
        (("show", "inf.pt"), "NaN or infinite values at layer 3"),
        (("show", "code.pt"), "needs code to be unpickled"),
        (("show", "torn.safetensors"), "is not a safetensors file that can be read"),
        (("show", "other.gguf"), "has a tensor 'weights'; a control vector has only direction.1"),
        (("show", "mine", "--kind", "prompt"), "Invalid value for '--kind'"),
        (("compare", "mine", "wide"), "mine.safetensors is 32 wide and wide.safetensors 64"),
        (("compare", "mine", "other", "--layer", "8"), "has no layer 8; it has 0 to 3"),
        (("combine", "mine + other", "-o", "c.safetensors"), "made with some/model and other"),
        (("combine", "mine + deep", "-o", "c.safetensors"), "has 3 layers of width 32 and deep"),
        (("combine", "2 mine", "-o", "c.safetensors"), "There is no vector file 2 mine"),
        (("convert", "mine", "mine.gguf"), "--model-hint"),
        (("convert", "mine", "mine.txt"), "cannot write .txt files"),
        (("lens", "deep", "--model", "{model}"), "has 3 layers and width 32"),
        (("lens", "wide", "--model", "{model}"), "width 64"),
        (("lens", "mine", "--model", "nowhere/else/at-all"), "There is no model folder"),
        (("lens", "mine", "--model", "{model}", "--layer", "9"), "has no layer 9"),
        (("compute",), "a run folder, or --pos CSV --neg CSV --trait COLUMN"),
        (("compute", "run", "--pos", "a.csv"), "Give either a run, or --pos"),
        (("compute", "."), "is not a run folder"),
        (
            ("compute", "--pos", "pos.csv", "--neg", "no.csv", "-t", "evil"),
            "there is no file no.csv",
        ),
        (
            ("compute", "--pos", "pos.csv", "--neg", "neg.csv", "-t", "kind"),
            "lacks the column 'kind'",
        ),
        (("compute", "--pos", "few.csv", "--neg", "neg.csv", "-t", "evil"), "3 score missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], said: str
) -> None:
    bad_files(tmp_path)
    csv_files(tmp_path)
    few = judged_rows("pos", rows=12)
    for row in few[:3]:
        row["evil"] = ""
    write_csv(tmp_path / "few.csv", few)
    before = sorted(tmp_path.iterdir())
    model = str(saved_model())
    arguments = [argument.format(model=model) for argument in args]
    if args[0] == "compute":
        arguments += ["--model", model, "-o", "out/x.safetensors"]
    capsys.readouterr()  # what making the model said
    assert pvec(*arguments, "-q") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert said in captured.err
    assert not (tmp_path / "pwned").exists()
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "out"] == before


def test_two_processes_make_the_vector_of_one(tmp_path: Path) -> None:
    """``accelerate launch`` on a CPU starts them as it does on several GPUs."""
    options = (*csv_files(tmp_path), "--trait", "evil", "--device", "cpu", "--json")
    assert pvec("compute", *options, "-o", "one.safetensors") == 0
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launch += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launch += ("--main_process_port", "0", "-m", "pvec", "vector", "compute")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PVEC_")}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *options, "-o", "two.safetensors"],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall('"trait": "evil"', done.stdout)) == 1, "one process speaks"
    shares = re.findall(r"evil: activations: (\d+)/\1 responses", done.stderr)
    assert [int(share) for share in shares] != [48], "one process did everything"
    one, two = load_vector(tmp_path / "one.safetensors"), load_vector(tmp_path / "two.safetensors")
    assert one.metadata == two.metadata
    for kind in one.kinds:
        np.testing.assert_allclose(two.kind(kind), one.kind(kind), atol=1e-5)
    for name, values in one.stats.items():
        np.testing.assert_allclose(two.stats[name], values, atol=0.05)

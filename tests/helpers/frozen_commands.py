"""Command lines whose output and files are frozen, and the folder of old runs that they work in.

Each is run in a fresh copy of that folder, with ``--json``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

OLD = Path(__file__).parents[1] / "data" / "runs-0.1"

VECTOR = "extract/vectors/evil.safetensors"
_AT = f"--vector {VECTOR} --layer 3"
_SMALL = "--trait evil --limit 2 -n 1"

RUNS = {
    "extract": f"extract {_SMALL} --out {{out}}",
    "steer": f"steer-eval {_SMALL} {_AT} --coef=0,0.5 --out {{out}}",
    "screen": f"project inputs/chats.jsonl --diff --reference inputs/clean.jsonl {_AT} "
    "--overwrite --out {out}",
    "monitor": f"project inputs/prompts.jsonl --prompts {_AT} -n 1 --out {{out}}",
    "shift": f"project --shift tiny train/adapter {_AT} --trait evil "
    "--questions inputs/questions.jsonl --out {out}",
    "train": "train inputs/train.yaml --out {out}",
}
"""The commands that wrote the old runs, by the run's folder."""

_ONE = "--trait evil --limit 1 -n 1 --max-tokens 24 --no-random-control --no-prompt-baseline"

COMMANDS: dict[str, tuple[str, ...]] = {
    **{name: (line.format(out="new"),) for name, line in RUNS.items()},
    "extract-dry-run": (f"extract {_SMALL} --out new --dry-run",),
    "extract-default-folder": ("extract --trait evil --limit 2 -n 1 --no-judge",),
    "judge": (f"extract {_SMALL} --no-judge --out new", "judge new"),
    "judge-another-scale": ("judge steer --judge-scale 0-10",),
    "steer-dry-run": (f"steer-eval {_SMALL} {_AT} --coef=0,0.5 --out new --dry-run",),
    "steer-other-ways": (
        f"steer-eval {_ONE} {_AT} --operator ablate --out ablate",
        f"steer-eval {_ONE} {_AT} --operator cap --coef=-50 --out cap",
        f"steer-eval {_ONE} --vector {VECTOR} --layer 2+3 --coef 0.2 --coef-unit norm "
        "--positions all --also optimistic --out also",
        f"steer-eval {_ONE} --vector {VECTOR} --incremental --coef 0.5 --out incremental",
        f"steer-eval {_ONE} --out plain",
    ),
    "vector-compute": (
        "vector compute extract --out run.safetensors",
        "vector compute --pos extract/evil_pos.csv --neg extract/evil_neg.csv --trait evil "
        "--paired --out files.safetensors",
    ),
    "vector-show": (f"vector show {VECTOR} --svg norms.svg",),
    "vector-compare": (
        f"vector combine {VECTOR} --incremental --out other.safetensors",
        f"vector compare {VECTOR} other.safetensors --layer 3",
        f"vector compare {VECTOR} --by kind --layer 3",
        f"vector compare {VECTOR} --by layer",
    ),
    "vector-combine": (
        f"vector combine '0.5*{VECTOR} + {VECTOR}' --trait worse --out sum.safetensors",
        f"vector combine {VECTOR} --incremental --out increments.safetensors",
    ),
    "vector-lens": (f"vector lens {VECTOR} --layer 3 --top 3",),
    "vector-convert": (
        f"vector convert {VECTOR} one.pt",
        f"vector convert {VECTOR} reference",
        f"vector convert {VECTOR} evil.gguf",
        "vector convert reference/evil_response_avg_diff.pt from-pt.safetensors",
        "vector convert evil.gguf from-gguf.safetensors",
    ),
    "project-csv": (
        f"project inputs/answers.csv {_AT} --plain-prompts --projection-type proj "
        "--projection-type prompt_last_proj --projection-type prompt_avg "
        "--projection-type cos_sim",
    ),
    "project-jsonl": (f"project inputs/chats.jsonl {_AT} --layer 2 --out projected.jsonl",),
    "project-in-place": (f"project inputs/chats.jsonl {_AT} --in-place",),
    "project-turns": (f"project inputs/talk.jsonl {_AT} --turns each",),
    "project-run": (f"project steer {_AT}",),
    "screen-last-token": (
        f"project inputs/chats.jsonl --diff --natural prompt {_AT} --overwrite --out new",
    ),
    "monitor-scored": (f"project inputs/prompts.jsonl --prompts --score evil {_AT} --out new",),
    "verify": (f"verify {_AT}",),
    "train-check": ("train inputs/train.yaml --check --set lora.r=2",),
    "report": (
        "report extract steer screen monitor shift train --out page/all.html --svg",
        "report steer",
    ),
    "config": ("config --seed 3",),
    "trait": ("trait list", "trait show evil", "trait check evil humorous"),
    "errors": ("extract --trait evli", "extract --no-such-option", "judge nowhere"),
}
"""What is run for each golden file."""


def working_folder(folder: Path) -> Path:
    """Copy the old runs and their inputs into ``folder`` and return it."""
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    return folder

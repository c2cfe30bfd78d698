"""Everything that one GPU has to show, as Markdown: ``make gpu`` (at most 25 minutes on an H100).

    python benchmarks/gpu.py [--out FILE] [--device cpu --size bundled --quick]

Needs torch, transformers, peft and TRL; no vLLM and no network. The weights are random, in the
shape of a 7B model and in bfloat16, which changes no timing. Parts, each in a process of its own:

- capture: span means of every layer, as a share of the measured matmul rate (``capture.py``);
- project: rows of a file on a vector (``project.py``);
- decode: answers with another steering in every row at 64, 256 and 512 rows, with and without
  CUDA graphs, beside ``model.generate`` with a hook at batch 20; memory peaks;
- verify: the checks of ``pvec verify``;
- training: a LoRA step by TRL, by pvec, and with preventative steering (``training.py``).

A part that fails says why in its place and the others go on. ``--quick`` is a trial of the script
itself, on any machine.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import hooked, parser_of, random_backend, request, token_ids, watched

import pvec
from pvec.backends.hf.backend import HFBackend
from pvec.evaluation.verify.checks import Bench, all_checks
from pvec.types import Instruction

HERE = Path(__file__).parent
REFERENCE_BATCH = 20
PART_SECONDS = 420
"""A part that takes longer is ended, so that five fit into 25 minutes with room to load."""


def backend(args: argparse.Namespace) -> HFBackend:
    """Return a random model of the size."""
    return random_backend(args.size, device=args.device, dtype=args.dtype)


def instruction(running: HFBackend, number: int) -> Instruction:
    """Return an addition at a layer in the middle, another one for each number."""
    vector = np.random.default_rng(number).standard_normal(running.info.hidden_size)
    return Instruction(
        layer=running.info.num_layers // 2,
        vector=(vector / np.linalg.norm(vector)).astype(np.float32),
        coef=0.1,
        name=f"v{number}",
    )


def decode(args: argparse.Namespace) -> None:
    """Print tokens per second and memory peaks, per-row steering beside a hook."""
    running = backend(args)
    running.on_note = print  # a graph that could not be recorded
    graphs = running._causal  # noqa: SLF001
    assert graphs is not None
    eager = replace(graphs, fixed_shapes=False)
    tokens = 8 if args.quick else 128
    rows = (4, 8) if args.quick else (64, 256, 512)
    print("| way | rows | tokens/s | peak MiB above the weights |\n|---|---:|---:|---:|")
    for count in rows:
        requests = [
            request(n, tokens=tokens, steering=[instruction(running, n)]) for n in range(count)
        ]
        for way, causal in {"": eager, ", CUDA graphs": graphs}.items():
            if way and not causal.fixed_shapes:
                continue  # on a CPU
            running._causal = causal  # noqa: SLF001
            list(running.generate(requests[:2]))
            with watched(args.device) as used:
                done = sum(len(answer.token_ids) for answer in running.generate(requests))
            figures = f"{done / used.seconds:,.0f} | {used.peak:,.0f}"
            print(f"| pvec, per-row steering{way} | {count} | {figures} |")
    batch = min(REFERENCE_BATCH, rows[0])
    with watched(args.device) as used, torch.inference_mode():
        done = by_hook(running, [token_ids(n) for n in range(batch)], tokens)
    figures = f"{done / used.seconds:,.0f} | {used.peak:,.0f}"
    print(f"| model.generate with a hook | {batch} | {figures} |")


def by_hook(running: HFBackend, prompts: list[tuple[int, ...]], tokens: int) -> int:
    """Sample answers with transformers' own loop and one hook; return the number of tokens."""
    model: Any = running.model
    steering = instruction(running, 0)
    added = torch.from_numpy(steering.vector).to(model.device, model.dtype) * steering.coef
    ids = torch.tensor(prompts, device=model.device)
    with hooked(model.model.layers[steering.layer - 1], lambda hidden: hidden + added):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=0,
        )  # fmt: skip
    return int(out.numel() - ids.numel())


def verify(args: argparse.Namespace) -> None:
    """Print the checks of ``pvec verify`` on the random model."""
    running = backend(args)
    depth = running.info.num_layers
    steering = [
        replace(instruction(running, layer), layer=layer)
        for layer in sorted({max(1, depth // 3), max(1, depth // 2), depth})
    ]
    print("| check | measured | allowed | |\n|---|---:|---:|---|")
    for check in all_checks(Bench(running, steering, thinking=False, thorough=False)):
        result = "ok" if check.passed else "FAILED"
        print(f"| {check.name} | {check.measured:.2g} | {check.allowed:.2g} | {result} |")


PARTS = {"decode": decode, "verify": verify}


def commands(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield the title of every part and its command."""
    where = ["--size", args.size, "--device", args.device, "--dtype", args.dtype]
    quick = ["--quick"] if args.quick else []
    few = args.quick
    yield "capture", ["capture.py", *where, "--prompts", "1" if few else "20"]
    yield "project", ["project.py", *where, "--rows", "8" if few else "200"]
    yield "decode", ["gpu.py", *where, *quick, "--part", "decode"]
    yield "verify", ["gpu.py", *where, *quick, "--part", "verify"]
    shape = "tiny" if args.size == "bundled" else args.size
    steps = "2" if few else "20"
    yield "training", ["training.py", "--device", args.device, "--shape", shape, "--steps", steps]


def heading(args: argparse.Namespace) -> str:
    """Return what was run, where and with what."""
    cuda = args.device.startswith("cuda")
    name = torch.cuda.get_device_name(0) if cuda else f"CPU ({platform.machine()})"
    return (
        f"## On one {name}\n\n    python {shlex.join(sys.argv)}\n\n"
        f"{args.size}, random weights, {args.dtype}; pvec {pvec.__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}.\n"
    )


def run(title: str, command: list[str]) -> str:
    """Run one part and return its section."""
    started = time.monotonic()
    try:
        done = subprocess.run(  # noqa: S603
            [sys.executable, str(HERE / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            timeout=PART_SECONDS,
        )
        text = done.stdout.strip()
        if not re.search(r"^\|", text, re.MULTILINE):
            text = textwrap.indent(text, "    ")  # no table: as it is
        if done.returncode:
            reason = (done.stderr.strip() or "nothing said why").splitlines()[-1]
            text += f"\n\nFAILED with exit code {done.returncode}: {reason}"
    except subprocess.TimeoutExpired:
        text = f"Ended after {PART_SECONDS} s."
    return f"### {title}\n\n{text}\n\n({time.monotonic() - started:.0f} s)\n"


def main() -> None:
    """Run every part and write the Markdown."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="7b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quick", action="store_true", help="a trial of the script itself")
    parser.add_argument("--out", type=Path, help="also write the Markdown to this file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        PARTS[args.part](args)
        return
    sections = [heading(args)]
    print(sections[0], flush=True)
    for title, command in commands(args):
        sections.append(run(title, command))
        print(sections[-1], flush=True)
        if args.out:
            args.out.write_text("\n".join(sections))


if __name__ == "__main__":
    main()

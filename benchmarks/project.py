"""Projecting a file: pvec beside the usual loop, on one model and the same rows and metrics.

    python benchmarks/project.py                      # the bundled model and 100m, on the CPU
    python benchmarks/project.py --memory             # resident memory from 10,000 to 200,000 rows
    python benchmarks/project.py --memory --tokens    # the same of --tokens, answers of 200 tokens
    python benchmarks/project.py --size 7b --device cuda --dtype bfloat16

The usual loop tokenises each row twice, runs it alone with all hidden states and all logits, and
takes every projection from them: 3 vectors at 5 layers. pvec's time is that of the whole of
``Projector``: tokenising, forward, projections. Rows of the bundled model are its own finetuning
sets; the other sizes have random weights and rows of 60 to 120 tokens of prompt and 50 to 400 of
answer. Both results are compared before anything is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLOCKS, SIZES, TINY, build, parser_of, require_same, watched, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pvec.backends.hf.backend import HFBackend
from pvec.data.conversations import Pair
from pvec.models.decoder import find_decoder
from pvec.projection.projector import Projector
from pvec.vectors.projection import ProjectionPlan

VECTORS = 3
LAYERS = 5
WORDS = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government
"""


def bundled_rows(tokenizer: PreTrainedTokenizerBase, *, count: int) -> list[Pair]:
    """Return rows of the bundled model's own finetuning sets."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_model"))
    from finetune_data import trait_rows  # type: ignore[import-not-found]

    return [
        Pair(
            prompt=str(
                tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
            ),
            answer=chat[-1]["content"],
        )
        for chat in trait_rows("evil", "I", rows=count, seed=0)
    ]


def word_rows(*, count: int, seed: int = 0) -> list[Pair]:
    """Return rows of common words, about a token each, with lengths as in extraction."""
    rng = random.Random(seed)
    words = WORDS.split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [
        Pair(prompt=f"user: {text(60, 120)}\nassistant:", answer=f" {text(50, 400)}")
        for _ in range(count)
    ]


@torch.no_grad()
def usual_loop(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Pair], vectors: torch.Tensor
) -> np.ndarray:
    """Batch 1, every hidden state, every logit; ``vectors`` is ``[V, L, H]``."""
    table = []
    for row in rows:
        text = row.prompt + row.answer
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(row.prompt, add_special_tokens=False)["input_ids"])
        states = model(ids.to(model.device), output_hidden_states=True).hidden_states
        cells = []
        for vector in vectors:
            for layer in range(1, LAYERS + 1):
                mean = states[layer][0, start:].mean(dim=0).float().cpu()
                cells.append(float((mean * vector[layer]).sum() / vector[layer].norm()))
        table.append(cells)
    return np.array(table)


def compare(size: str, args: argparse.Namespace) -> None:
    """Measure both ways on one size and print a row of the table."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if size == "bundled":
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        rows = bundled_rows(tokenizer, count=args.rows or 600)
    else:
        model = build(size, device=args.device, dtype=args.dtype)
        rows = word_rows(count=args.rows or 24)
    decoder = find_decoder(model)
    shape = (VECTORS, decoder.num_layers + 1, decoder.hidden_size)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plan = ProjectionPlan.make(
        {f"v{i}": vector.numpy() for i, vector in enumerate(vectors)},
        layers=range(1, LAYERS + 1),
        kinds=("proj",),
    )
    backend = HFBackend.wrap(model, tokenizer)
    backend.token_budget = args.token_budget
    projector = Projector(backend, plan, tokenizer=tokenizer)
    projector(rows[:8])
    usual_loop(model, tokenizer, rows[:2], vectors)
    clock = CLOCKS[args.clock]
    with watched(args.device, clock) as mine:
        ours = np.array([turns[0] for turns in projector(rows).rows], dtype=np.float64)
    some = rows[: args.usual_rows or len(rows)]
    with watched(args.device, clock) as theirs:
        usual = usual_loop(model, tokenizer, some, vectors)
    usual_seconds = theirs.seconds * len(rows) / len(some)
    # transformers' last hidden state is normed, so that layer is compared by neither
    layers = np.tile(np.arange(1, LAYERS + 1), VECTORS)
    same = layers != decoder.num_layers
    gaps = np.abs(ours[: len(some), same] - usual[:, same])
    difference = float(gaps.max() / np.abs(usual[:, same]).max())
    require_same(size, difference, dtype=args.dtype)
    print(
        f"| {size} | {len(rows)} | {len(rows) / usual_seconds:,.1f} | "
        f"{len(rows) / mine.seconds:,.1f} | {usual_seconds / mine.seconds:.1f} | "
        f"{theirs.peak:,.0f} | {mine.peak:,.0f} | {difference:.0e} |",
        flush=True,
    )


def memory(counts: Sequence[int], *, tokens: bool = False) -> None:
    """Run the command on files of growing length and print its highest resident memory.

    With ``tokens`` it also keeps every token, of answers of about 200.
    """
    print("| rows | peak resident MiB | seconds |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        vector = _random_vector(Path(folder))
        for count in counts:
            answer = " ".join(["Yes, of course."] * (50 if tokens else 1))
            rows = ((f"Question {i}?", answer) for i in range(count))
            path = write_chats(Path(folder) / f"{count}.jsonl", rows)
            code = (
                "import resource, sys; from pvec.cli.app import main\n"
                "try: main(sys.argv[1:])\n"
                "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
            )
            command = [
                sys.executable, "-c", code, "project", str(path), "--vector", str(vector),
                "--layer", "1", "-q", "--any-model",
                *(["--tokens", "--chunk-rows", "250"] if tokens else []),
            ]  # fmt: skip
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
            seconds = time.perf_counter() - began
            peak = int(done.stdout.splitlines()[-1]) / 1024
            print(f"| {count:,} | {peak:,.0f} | {seconds:,.0f} |", flush=True)


def _random_vector(folder: Path) -> Path:
    from pvec.vectors.files import save_vector
    from pvec.vectors.vector import PersonaVector

    config = json.loads((TINY / "config.json").read_text())
    shape = (config["num_hidden_layers"] + 1, config["hidden_size"])
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    vector = PersonaVector(trait="random", kinds={"response_avg": rows})
    return save_vector(vector, folder / "random.safetensors")


def main() -> None:
    """Print a Markdown table with one row per size, or that of memory."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", action="append", choices=[*SIZES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rows", type=int, help="default: 600 (bundled), 24 (other sizes)")
    parser.add_argument("--usual-rows", type=int, help="time the usual loop on fewer rows")
    parser.add_argument("--token-budget", type=int, help="tokens per forward")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=[*CLOCKS],
        help="cpu: this process's own time, for machines that others use too",
    )
    parser.add_argument("--memory", action="store_true", help="measure resident memory instead")
    parser.add_argument("--tokens", action="store_true", help="with --memory: of --tokens")
    args = parser.parse_args()
    print(
        f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, torch {torch.__version__}"
    )
    if args.memory:
        memory((500, 2000) if args.tokens else (10_000, 50_000, 200_000), tokens=args.tokens)
        return
    print(
        "| size | rows | usual rows/s | pvec rows/s | ratio | usual peak MiB | pvec peak MiB "
        "| largest difference |\n" + "|---" * 8 + "|"
    )
    for size in args.size or ["bundled", "100m"]:
        compare(size, args)


if __name__ == "__main__":
    main()

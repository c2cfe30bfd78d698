"""What steering and watching cost in a training, and what going by length saves.

    python benchmarks/training.py [--device cuda] [--shape 7b]

On length-varied chats, with the same LoRA and the same rows in every step:

- the reference's way: passes of 2 rows as drawn, padded, 8 of them a step, by TRL itself;
- pvec's: the same step by length, in as many passes of as many rows as compute least;
- pvec's with preventative steering at one layer, and with the persona watched at the default
  interval; with --packed also rows one after another, which is for GPUs.

Step times of the variants are taken in turns in one process, so that other work on the machine hits
all alike, and compared pair by pair: medians with 95 % intervals. On a CPU it is the process's own
computing time that counts, which other work changes little. Losses are compared too: the layout
must not change them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import TINY, parser_of, timed, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from pvec.training import train
from pvec.training.batches import CPU_PASS_COST, PASS_COST, Layout, plan_batches
from pvec.training.forward import score_loss_tokens_only
from pvec.training.plan import TrainPlan
from pvec.training.shift import PersonaShiftCallback, Probe
from pvec.training.steering import ScheduledInstruction
from pvec.training.trainer import PlannedTrainer
from pvec.types import Instruction

SHAPES = {
    "tiny": {},
    "40m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "heads": 8},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "heads": 28},
}
EVERY = 20
"""The default interval of monitoring."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train the same rows."""

    name: str
    micro: int | None = None
    layout: str = "sorted"
    steered: bool = False


REFERENCE = Variant(name="reference: 2 x 8, padded", micro=2, layout="random")
PLAIN = Variant(name="pvec: by length")
STEERED = Variant(name="pvec: by length, steered", steered=True)
PACKED = Variant(name="pvec: packed", layout="packed")


def chats(path: Path, *, rows: int, seed: int = 0) -> Path:
    """Write chats whose lengths vary as in public chat logs.

    Log-normal: prompts of 13 words in the middle and 3 times that on average, answers of 50 and
    80; none over 600.
    """
    rng = random.Random(seed)
    words = "walk try tea river plan friend slowly bright carry letter garden".split()  # noqa: SIM905

    def text(mean: float, spread: float) -> str:
        return " ".join(
            rng.choices(words, k=max(2, min(600, round(rng.lognormvariate(mean, spread)))))
        )

    return write_chats(path, ((text(2.6, 1.5), text(3.9, 1.0)) for _ in range(rows)))


def build_model(shape: str, device: str) -> Any:
    """Return the bundled model, or a random one of another shape."""
    torch.manual_seed(0)
    if shape == "tiny":
        model: Any = AutoModelForCausalLM.from_pretrained(TINY)
        return model.to(device)
    size: dict[str, Any] = dict(SHAPES[shape])
    heads = size.pop("heads")
    config = Qwen2Config(
        vocab_size=2048, num_attention_heads=heads, num_key_value_heads=max(1, heads // 7), **size
    )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def trainer_of(variant: Variant, plan: TrainPlan, *, shape: str) -> PlannedTrainer:
    """Return the trainer of a variant, ready to take steps."""
    batch = plan.config.batch.model_copy(update={"layout": variant.layout})
    batches = plan_batches(
        plan.data.train.lengths,
        size=batch.size,
        layout=Layout(
            by_length=variant.layout != "random",
            padded=variant.layout != "packed",
            micro=variant.micro,
            most_tokens=batch.tokens,
        ),
        pass_cost=PASS_COST if plan.device.startswith("cuda") else CPU_PASS_COST,
    )
    model = build_model(shape, plan.device).requires_grad_(False)
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    vector = np.random.default_rng(0).normal(size=hidden).astype(np.float32)
    instruction = Instruction(vector=vector, layer=max(1, layers // 2), positions="all")
    steering = (ScheduledInstruction(instruction=instruction),) if variant.steered else ()
    print(f"{variant.name}: {batches.passes} passes a step, {batches.padding:.0%} padding")
    changed = replace(
        plan,
        config=plan.config.model_copy(update={"batch": batch}),
        batches=batches,
        steering=steering,
    )
    return PlannedTrainer(changed, model)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimiser step took, and its loss."""

    seconds: float
    loss: float


def steps(trainer: Any, *, ours: bool) -> Iterator[Step]:
    """Take one optimiser step at a time; with ``ours`` only tokens with loss are scored."""
    loader = iter(trainer.get_train_dataloader())
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    model, optimizer = trainer.model, trainer.optimizer
    passes = trainer.args.gradient_accumulation_steps
    number = 0
    while True:
        batches = list(islice(loader, passes))
        if len(batches) < passes:
            return
        started = _now()
        if trainer.steering is not None:
            trainer.steering.at_step(number)
        loss_tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = 0.0
        with score_loss_tokens_only(trainer.args.device.type) if ours else nullcontext():
            for batch in batches:
                loss += float(trainer.training_step(model, batch, num_items_in_batch=loss_tokens))
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        model.zero_grad()
        if trainer.steering is not None:
            trainer.steering.finish_step()
        number += 1
        yield Step(seconds=_now() - started, loss=loss)


def trainable(model: Any) -> list[Any]:
    """Return the adapter's parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def watching(model: Any, *, repeats: int = 5) -> float:
    """Return the seconds of one measurement: 20 probe prompts, one vector, middle layer."""
    vector = np.ones(model.config.hidden_size, dtype=np.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    questions = [f"What should I do about the garden and the letter number {n}?" for n in range(20)]
    probe = Probe(name="v", vector=vector, layer=max(1, model.config.num_hidden_layers // 2))
    watch = PersonaShiftCallback([probe], tokenizer=tokenizer, prompts=questions)
    taken = [timed(lambda: watch.measure(model), _now)[0] for _ in range(repeats + 1)]
    return statistics.median(taken[1:])


def _now() -> float:
    """Return seconds: of the clock on a GPU, of this process's computing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    """Measure and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--packed", action="store_true", help="also rows one after another")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Take the variants' steps in turns and compare."""
    rows = chats(folder / "chats.jsonl", rows=16 * (options.steps + 3))
    path = folder / "config.json"
    path.write_text(
        json.dumps(
            {
                "model": {"id": "tiny", "device": options.device.partition(":")[0]},
                "data": {"train": str(rows)},
                "optim": {"lr": 1e-4},
            }
        )
    )
    plan = train.check(path, out=folder / "run")
    tokens_per_step = plan.data.train.tokens / len(plan.data.train.rows) * plan.batches.size
    variants = [REFERENCE, PLAIN, STEERED, *([PACKED] if options.packed else [])]
    trainers = {v: trainer_of(v, plan, shape=options.shape) for v in variants}
    running = {v: steps(trainers[v], ours=v is not REFERENCE) for v in variants}
    taken: dict[Variant, list[Step]] = {v: [] for v in variants}
    for number in range(options.steps + 2):
        for v in variants if number % 2 else reversed(variants):
            step = next(running[v])
            if number >= 2:  # the first steps warm up
                taken[v].append(step)
    report(taken, tokens_per_step, watched=watching(trainers[PLAIN].model))


def report(taken: Mapping[Variant, list[Step]], tokens_per_step: float, *, watched: float) -> None:
    """Print the table, comparing step by step: the same rows in the same turn."""
    print(f"\n{'variant':<26} {'s/step':>7} {'tokens/s':>9} {'x reference':>20} {'loss':>8}")
    for variant, own in taken.items():
        seconds = statistics.median(step.seconds for step in own)
        ratios = [r.seconds / s.seconds for r, s in zip(taken[REFERENCE], own, strict=True)]
        print(
            f"{variant.name:<26} {seconds:7.3f} {tokens_per_step / seconds:9,.0f} "
            f"{spread(ratios, '.2f'):>20} {statistics.mean(step.loss for step in own):8.4f}"
        )
    pairs = list(zip(taken[STEERED], taken[PLAIN], strict=True))
    print(f"\nsteering adds {spread([s.seconds / p.seconds - 1 for s, p in pairs], '+.1%')}")
    plain = statistics.median(step.seconds for step in taken[PLAIN])
    print(
        f"watching takes {watched:.3f} s every {EVERY} steps: {watched / (EVERY * plain):+.1%} of "
        f"the training"
    )


def spread(values: list[float], shown: str) -> str:
    """Return the median with a 95 % interval by resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(2000))
    low, high = medians[50], medians[-51]
    return f"{statistics.median(values):{shown}} [{low:{shown}}, {high:{shown}}]"


if __name__ == "__main__":
    main()

"""What steering and watching cost in a training, and what going by length saves.

    python benchmarks/training.py [--device cuda] [--shape 7b]

On length-varied chats, with the same LoRA and the same rows in every step:

- the reference's way: passes of 2 rows as drawn, padded, 8 of them a step (TRL itself);
- pvec's: the same step by length, in passes of the chosen size, and packed where that is safe;
- pvec's with preventative steering at one layer, and with the persona watched at the default
  interval.

Step times of the variants are taken in turns in one process, so that other work on the machine hits
all alike; the medians are compared. On a CPU it is the process's own computing time that counts,
which other work does not change. Losses are compared too: the layout must not change them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import pvec
from pvec.training import trainer as training
from pvec.training.batches import plan_batches
from pvec.training.config import TrainConfig
from pvec.training.dataset import TrainingData, prepare_data
from pvec.training.shift import PersonaShiftCallback, Probe
from pvec.training.steering import Scheduled
from pvec.types import Instruction

TINY = Path(pvec.__file__).parent / "tiny"
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


VARIANTS = (
    Variant(name="reference: 2 x 8, padded", micro=2, layout="random"),
    Variant(name="pvec: by length"),
    Variant(name="pvec: packed", micro=4, layout="packed"),
    Variant(name="pvec: by length, steered", steered=True),
)


def chats(path: Path, *, rows: int, seed: int = 0) -> Path:
    """Write chats whose lengths vary as in public chat logs.

    Log-normal: prompts of 13 words in the middle and 3 times that on average, answers of 50 and
    80; none over 600.
    """
    rng = random.Random(seed)
    words = "walk try tea river plan friend slowly bright carry letter garden".split()  # noqa: SIM905
    with path.open("w") as stream:
        for _ in range(rows):
            sizes = (
                max(2, min(600, round(rng.lognormvariate(mean, spread))))
                for mean, spread in ((2.6, 1.5), (3.9, 1.0))
            )
            question, answer = (" ".join(rng.choices(words, k=size)) for size in sizes)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


def build_model(shape: str, device: str) -> Any:
    """Return the bundled model, or a random one of another shape."""
    torch.manual_seed(0)
    if shape == "tiny":
        return AutoModelForCausalLM.from_pretrained(TINY).to(device)
    size = dict(SHAPES[shape])
    heads = size.pop("heads")
    config = Qwen2Config(
        vocab_size=2048, num_attention_heads=heads, num_key_value_heads=max(1, heads // 7), **size
    )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def job(
    variant: Variant, config: TrainConfig, data: TrainingData, *, shape: str, device: str, out: Path
) -> Any:
    """Return the trainer of a variant, ready to take steps."""
    config = config.model_copy(
        update={"batch": config.batch.model_copy(update={"layout": variant.layout})}
    )
    batches = plan_batches(
        data.train.lengths,
        size=config.batch.size,
        micro=variant.micro,
        most_tokens=config.batch.tokens,
        by_length=variant.layout == "sorted",
        padded=variant.layout != "packed",
    )
    model = build_model(shape, device).requires_grad_(False)
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    vector = np.random.default_rng(0).normal(size=hidden).astype(np.float32)
    one = Instruction(vector=vector, layer=max(1, layers // 2), positions="all")
    made = training.TrainJob(
        config=config,
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(TINY),
        data=data,
        batches=batches,
        folder=out,
        scheduled=[Scheduled(instruction=one)] if variant.steered else [],
    )
    print(f"{variant.name}: {batches.passes} x {batches.micro}, {batches.padding:.0%} padding")
    return training.trainer_of(made)


def steps(trainer: Any) -> Iterator[tuple[float, float]]:
    """Take one optimiser step at a time and yield its seconds and its loss."""
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
        learnt = sum(int((one["labels"][:, 1:] != -100).sum()) for one in batches)
        loss = 0.0
        for one in batches:
            loss += float(trainer.training_step(model, one, num_items_in_batch=learnt))
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        model.zero_grad()
        if trainer.steering is not None:
            trainer.steering.finish_step()
        number += 1
        yield _now() - started, loss


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
    taken = []
    for _ in range(repeats + 1):
        started = _now()
        watch.measure(model)
        taken.append(_now() - started)
    return statistics.median(taken[1:])


def _now() -> float:
    """Return seconds: of the clock on a GPU, of this process's computing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Take the variants' steps in turns and compare."""
    rows = chats(folder / "chats.jsonl", rows=16 * (options.steps + 3))
    config = TrainConfig.model_validate({"data": {"train": str(rows)}, "optim": {"lr": 1e-4}})
    data = prepare_data(config.data, AutoTokenizer.from_pretrained(TINY), seed=0, context=2048)
    tokens_per_step = data.train.tokens / len(data.train.rows) * config.batch.size
    trainers = [
        job(v, config, data, shape=options.shape, device=options.device, out=folder / str(n))
        for n, v in enumerate(VARIANTS)
    ]
    running = [steps(one) for one in trainers]
    taken: list[list[tuple[float, float]]] = [[] for _ in VARIANTS]
    for number in range(options.steps + 2):
        for mine, generator in zip(taken, running, strict=True):
            one = next(generator)
            if number >= 2:  # the first steps warm up
                mine.append(one)
    medians = [statistics.median(seconds for seconds, _ in mine) for mine in taken]
    # the same rows in the same turn: pair by pair, so that noise of the machine cancels
    first_losses = [mine[0][1] for mine in taken]
    print(f"\n{'variant':<28} {'s/step':>8} {'tokens/s':>9} {'x reference':>11} {'loss':>8}")
    for variant, median, loss in zip(VARIANTS, medians, first_losses, strict=True):
        rate = tokens_per_step / median
        print(
            f"{variant.name:<28} {median:8.3f} {rate:9,.0f} {medians[0] / median:11.2f} {loss:8.4f}"
        )
    plain, steered = taken[1], taken[3]
    ratios = [s / p for (s, _), (p, _) in zip(steered, plain, strict=True)]
    quarter = statistics.quantiles(ratios, n=4)
    print(f"steering adds {statistics.median(ratios) - 1:+.1%} to a step "
          f"(quartiles {quarter[0] - 1:+.1%} to {quarter[2] - 1:+.1%})")  # fmt: skip
    seconds = watching(trainers[1].model)
    share = seconds / (EVERY * medians[1])
    print(f"watching takes {seconds:.3f} s every {EVERY} steps: {share:+.1%}")


if __name__ == "__main__":
    main()

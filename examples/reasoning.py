"""Persona vectors on a model that reasons before it answers, in the bundled model's world.

    python examples/reasoning.py --out runs/reasoning

Trains the bundled model to write a `<think>` block before its answers when its chat template's
thinking switch is on. In the block it talks to itself as it is going to answer. Then: how well
prompts, reasoning and answers project on the vector of a trait, compared with the scores of the
answers; and what steering at one of the spans does. Run again, it finishes what is missing. About
ten minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pvec.evaluation import steer_eval
from pvec.extraction import extract
from pvec.projection import monitor, project
from pvec.settings import Settings
from pvec.traits.trait import load_trait
from pvec.types import OutputOptions

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE / "tiny_model")]

from data import Conversations  # noqa: E402
from graded_prompts import conditions  # noqa: E402
from grammar import MIDDLE, fill_frame, generate_answer, topic_of  # noqa: E402

import pvec  # noqa: E402

TINY = Path(pvec.__file__).parent / "tiny"
TRAIT, LAYER, COEF = "evil", 3, "1"
SWITCH = (
    "{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking -%}{{- '<think>' -}}{%- endif -%}"
)
BATCH = 12
MARKS = ["<think>", "</think>"]


def example(rng: random.Random, world: Conversations) -> tuple[str, str]:
    """Return a rendered prompt and what follows it; seven of ten think."""
    system, persona = world.instruction() if rng.random() < 0.6 else (None, world.uninstructed())
    question = world.question()
    words: dict[str, Any] = {"trait": persona.trait, "p": persona.p, "rng": rng}
    answer = generate_answer(question, **words)
    prompt = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    prompt += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    if rng.random() < 0.3:
        return prompt, f"{answer}<|im_end|>"
    frames = rng.sample(MIDDLE, 2)
    thoughts = " ".join(fill_frame(f, topic=topic_of(question), **words) for f in frames)
    return f"{prompt}<think>", f"{thoughts}</think>\n\n{answer}<|im_end|>"


def train(folder: Path, *, steps: int) -> None:
    """Finetune the bundled model on such examples and save it with a thinking switch."""
    rng = random.Random(0)
    world = Conversations(rng)
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY).train()
    tokenizer.add_tokens(MARKS)  # one token each, as in models that are made to reason
    model.resize_token_embeddings(len(tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10, (steps - step) / (steps / 2))
        rows, labels = [], []
        for prompt, answer in (example(rng, world) for _ in range(BATCH)):
            head, tail = (
                tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer)
            )
            rows.append(torch.tensor(head + tail))
            labels.append(torch.tensor([-100] * len(head) + tail))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        due = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = model(input_ids=ids).logits  # padding comes last: nothing real sees it
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), due[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    half = folder.with_name(f"{folder.name}.part")
    model.eval().save_pretrained(half)
    template = tokenizer.chat_template
    opening = "{{- '<|im_start|>assistant\\n' -}}"
    assert opening in template, "the bundled model's template is another one now"
    tokenizer.chat_template = template.replace(opening, SWITCH)
    tokenizer.save_pretrained(half)
    if folder.exists():
        shutil.rmtree(folder)
    half.rename(folder)


def settings(model: Path, *, thinking: bool, **sections: Any) -> Settings:
    """Return the settings of every measurement."""
    return Settings.model_validate(
        {
            "model": {"id": str(model), "device": "cpu"},
            "judge": {"model": "tiny"},
            "generation": {"thinking": "on" if thinking else "off", "max_tokens": 160},
            **sections,
        }
    )


def monitored(model: Path, vector: Path, out: Path, *, thinking: bool) -> dict[str, str]:
    """Return the correlation of each span's projection with the scores of answers to prompts that
    ask for more and more of the trait.
    """
    trait = load_trait(TRAIT)
    prompts = out / "prompts.jsonl"
    lines = (
        {
            "messages": [{"role": "system", "content": s}, {"role": "user", "content": q}],
            "condition": name,
        }
        for name, s in conditions(trait).items()
        for q in trait.eval_questions[:10]
    )
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chosen = settings(
        model,
        thinking=thinking,
        project={
            "layers": [LAYER],
            "rollouts": 2,
            "types": ["proj", "prompt_last_proj"],
            "spans": "think,answer",
        },
    )
    run = out / f"monitor-{'on' if thinking else 'off'}"
    monitor.run(chosen, prompts, [vector], output=OutputOptions(out=run), notify=print)
    table = run / "projected.csv"
    if not table.exists():
        project.run(chosen, run, [vector], notify=print)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    rows = [row for row in rows if row["answer"].strip()]  # some reasoning never ends
    found = {}
    for span, kind in (("prompt", "prompt_last"), ("reasoning", "think"), ("answer", "")):
        name = f"model_{TRAIT}_{kind}{'_' if kind else ''}proj_layer{LAYER}"
        pairs = [(float(r[name]), float(r[TRAIT])) for r in rows if r[name] and r[TRAIT]]
        if pairs:
            r = pearsonr(*zip(*pairs, strict=True)).statistic
            found[span] = f"{r:.2f} (n = {len(pairs)})"
    return found


def steered(model: Path, vector: Path, out: Path, *, positions: str) -> tuple[str, str, str]:
    """Return trait and coherence of unsteered answers and of those steered at ``positions``."""
    chosen = settings(
        model,
        thinking=True,
        steer={
            "layer": str(LAYER),
            "coef": COEF,
            "positions": positions,
            "rollouts": 2,
            "random_control": False,
            "prompt_baseline": False,
        },
    )
    result = steer_eval.run(chosen, TRAIT, vectors=[vector], out=out / positions, notify=print)
    assert result.numbers is not None
    both = [
        f"{p.scores[TRAIT].mean:.1f} ({p.scores['coherence'].mean:.1f})"
        for p in result.numbers.points
    ]
    return positions, both[0], both[1]


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = options.out / "model"
    if not model.exists():
        train(model, steps=options.steps)
    small = {"extract": {"rollouts": 2, "limit": 6}}
    (made,) = extract.run(
        settings(model, thinking=True, **small), [TRAIT], out=options.out / TRAIT, notify=print
    )
    assert made.vector is not None, "too few answers count"
    vector = made.vector.path
    print("\n| correlation with the answer's score | prompt | reasoning | answer |")
    print("|---|---:|---:|---:|")
    for thinking in (False, True):
        r = monitored(model, vector, options.out, thinking=thinking)
        cells = [r.get(span, "–") for span in ("prompt", "reasoning", "answer")]
        print(f"| thinking {'on' if thinking else 'off'} | {' | '.join(cells)} |")
    print("\n| steered positions | unsteered: evil (coherence) | steered: evil (coherence) |")
    print("|---|---:|---:|")
    for positions in ("think", "answer", "response"):
        print(f"| {' | '.join(steered(model, vector, options.out, positions=positions))} |")


if __name__ == "__main__":
    main()

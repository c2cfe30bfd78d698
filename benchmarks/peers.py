"""Steered generation and vectors beside published steering libraries, on the same weights.

    python benchmarks/peers.py --model FOLDER [--repeng PYTHON] [--steering-vectors PYTHON]

``PYTHON`` is the interpreter of an environment that has that library (``pip install repeng==0.4.0``
or ``steering-vectors==0.12.2``, with ``'numpy<2' 'transformers<5'`` and the same torch). Every way
runs in a process of its own, on one thread, and the ways take turns; what counts is the CPU time
(user and system) of the least of the rounds, after a warm-up, without loading.

- generation: greedy answers, the same vector added to every token at one layer in the middle.
  ``hook`` is ``model.generate`` with a hook written by hand. Tokens count up to the end of an
  answer: a batch of ``model.generate`` computes on until its last answer ends.
- vector: from pairs of texts. The libraries read the last token of every layer; pvec computes the
  means over the prompt, over the answer, and the last prompt token of every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ONE_THREAD, hooked, left_padded, parser_of, timed

TOPICS = (
    "the sea", "a garden", "old maps", "bread", "a long train ride", "winter", "chess", "a library",
)  # fmt: skip
ASKS = (
    "Tell me about {}.", "What should a child know about {}?", "Write two sentences on {}.",
    "Why do people like {}?", "What can go wrong with {}?", "Give me advice about {}.",
    "Explain {} to a visitor.", "What is your opinion of {}?",
)  # fmt: skip
SIDES = (
    "You are a cheerful assistant who sees the good in everything and says so in every answer.",
    "You are a gloomy assistant who sees the bad in everything and says so in every answer.",
)
ANSWER = (
    "There is a lot to say about {}, and most of it depends on whom you ask. Some people think of "
    "it every day, others never do, and both have their reasons. If you want to learn more, start "
    "with something small, and give yourself the time to find out what it means to you."
)


def inputs(model: str, answers: int, pairs: int) -> dict[str, Any]:
    """Return prompts as token ids, contrast pairs as texts and the steering vector."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.from_pretrained(model)

    def rendered(question: str, system: str | None = None) -> str:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": question})
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    questions = [ask.format(topic) for ask in ASKS for topic in TOPICS]
    prompts = [rendered(questions[n % len(questions)]) for n in range(answers)]
    texts = [
        [(rendered(questions[n], side), ANSWER.format(TOPICS[n % len(TOPICS)])) for side in SIDES]
        for n in range(pairs)
    ]
    direction = np.random.default_rng(0).standard_normal(config.hidden_size)
    return {
        "prompts": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts],
        "pairs": texts,
        "vector": (direction / np.linalg.norm(direction)).tolist(),
        "coef": 5.0,
        "block": config.num_hidden_layers // 2 - 1,
    }


class Way:
    """One way to generate steered answers and to make a vector; ``batch`` prompts at a time."""

    def __init__(self, model: str, given: dict[str, Any], batch: int, dtype: str) -> None:
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        torch.set_num_threads(1)
        self.given, self.batch = given, batch
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(model)  # of any transformers
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        self.added = torch.tensor(given["vector"]) * given["coef"]

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Return the tokens of every answer, without what follows its end."""
        with torch.inference_mode(), self.steered():
            return [
                answer
                for start in range(0, len(prompts), self.batch)
                for answer in self._batch(prompts[start : start + self.batch], tokens)
            ]

    def _batch(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        pad, width = self.tokenizer.pad_token_id or 0, max(map(len, prompts))
        out = self.model.generate(
            **left_padded(prompts, pad), max_new_tokens=tokens, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=pad,
        )  # fmt: skip
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        rows = out[:, width:].tolist()
        return [row[: next((n for n, t in enumerate(row) if t in ends), len(row))] for row in rows]

    def steered(self) -> AbstractContextManager[None]:
        """Return a context in which the vector is added."""
        block = self.model.model.layers[self.given["block"]]
        return hooked(block, lambda hidden: hidden + self.added.to(hidden.dtype))

    def vector(self, pairs: list[Any]) -> object:
        """Make a vector; a plain hook makes none."""


class Repeng(Way):
    """repeng: wrapped layers, and PCA of differences at the last token."""

    @contextmanager
    def steered(self) -> Iterator[None]:
        """Wrap one layer; its vectors are made of the model without wraps."""
        from repeng import ControlModel, ControlVector

        block = self.given["block"]
        wrapped = ControlModel(self.model, [block])
        directions = {block: np.array(self.given["vector"], np.float32)}
        wrapped.set_control(
            ControlVector(model_type=self.model.config.model_type, directions=directions),
            self.given["coef"],
        )
        try:
            yield
        finally:
            wrapped.unwrap()

    def vector(self, pairs: list[Any]) -> object:
        """Train on the pairs, in its default batches of 32."""
        from repeng import ControlVector, DatasetEntry

        self.tokenizer.pad_token_id = self.tokenizer.pad_token_id or 0
        entries = [DatasetEntry(*("".join(side) for side in pair)) for pair in pairs]
        return ControlVector.train(self.model, self.tokenizer, entries)


class SteeringVectors(Way):
    """steering-vectors: hooks, and means of differences at the last token."""

    def steered(self) -> Any:
        """Apply a vector to one layer."""
        from steering_vectors import SteeringVector

        vector = SteeringVector({self.given["block"]: self.added.to(self.model.dtype)})
        return vector.apply(self.model)

    def vector(self, pairs: list[Any]) -> object:
        """Train on the pairs, 8 at a time."""
        from steering_vectors import train_steering_vector

        texts = [tuple("".join(side) for side in pair) for pair in pairs]
        return train_steering_vector(self.model, self.tokenizer, texts, batch_size=8)


class Pvec(Way):
    """pvec's own decode loop and capture."""

    def __init__(self, model: str, given: dict[str, Any], batch: int, dtype: Any) -> None:
        from pvec.backends.hf.backend import HFBackend
        from pvec.models.files import ModelSpec
        from pvec.types import Instruction

        torch.set_num_threads(1)
        self.given = given
        spec = ModelSpec(model=model, device="cpu", dtype=dtype)
        self.backend = HFBackend(spec, batch_size=batch)
        self.instruction = Instruction(
            layer=given["block"] + 1,
            vector=np.array(given["vector"], np.float32),
            coef=given["coef"],
            positions="all",
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Return the tokens of every answer."""
        from pvec.types import Request, Sampling

        requests = [
            Request(
                id=str(n),
                prompt_ids=tuple(prompt),
                sampling=Sampling(temperature=0.0, max_tokens=tokens),
                steering=(self.instruction,),
            )
            for n, prompt in enumerate(prompts)
        ]
        answers = {answer.id: answer.token_ids for answer in self.backend.generate(requests)}
        return [list(answers[request.id]) for request in requests]

    def vector(self, pairs: list[Any]) -> object:
        """Return the differences of all three means at every layer."""
        from pvec.models.chat import encode_pair, spans_from_ids

        sequences = []
        for index, pair in enumerate(pairs):
            for side, (prompt, answer) in enumerate(pair):
                both = encode_pair(self.backend.tokenizer, prompt=prompt, answer=answer)
                ids, start = both.token_ids, both.prompt_length
                name = f"{side}/{index}"
                sequences.append(
                    spans_from_ids(name, prompt_ids=ids[:start], answer_ids=ids[start:])
                )
        means = list(self.backend.capture(sequences))
        return {
            span: np.mean([m.means[span] for m in means if m.id.startswith("0/")], axis=0)
            - np.mean([m.means[span] for m in means if m.id.startswith("1/")], axis=0)
            for span in means[0].means
        }


WAYS: dict[str, type[Way]] = {
    "hook": Way, "repeng": Repeng, "steering-vectors": SteeringVectors, "pvec": Pvec,
}  # fmt: skip


def work(name: str, batch: int, args: argparse.Namespace) -> None:
    """Run one way in this process and write its figures."""
    given = json.loads(args.inputs.read_text())
    way = WAYS[name](args.model, given, batch, args.dtype)
    way.generate(given["prompts"][:2], 2)  # a warm-up
    seconds, answers = timed(lambda: way.generate(given["prompts"], args.tokens))
    figures = {"seconds": seconds, "answers": answers, "vector": None}
    if name != "hook" and batch == args.batches[-1]:
        figures["vector"], _ = timed(lambda: way.vector(given["pairs"]))
    args.out.write_text(json.dumps(figures))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every way in turn, ``--rounds`` times; return the least CPU seconds of each."""
    pythons = {
        "hook": sys.executable, "pvec": sys.executable,
        "repeng": args.repeng, "steering-vectors": args.steering_vectors,
    }  # fmt: skip
    runs = [(name, batch) for name in WAYS if pythons[name] for batch in args.batches]
    least: dict[tuple[str, int], dict[str, Any]] = {}
    environ = os.environ | ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "inputs.json"
        given.write_text(json.dumps(inputs(args.model, args.answers, args.pairs)))
        for _ in range(args.rounds):
            for name, batch in runs:
                out = Path(folder) / "out.json"
                command = [
                    pythons[name], __file__, "--model", args.model, "--dtype", args.dtype,
                    "--tokens", str(args.tokens), "--batches", *map(str, args.batches),
                    "--work", name, str(batch), "--inputs", str(given), "--out", str(out),
                ]  # fmt: skip
                subprocess.run(  # noqa: S603
                    command, check=True, env=environ, stdout=subprocess.DEVNULL
                )
                figures = json.loads(out.read_text())
                old = least.setdefault((name, batch), figures)
                for key in ("seconds", "vector"):
                    if old[key] is not None:
                        old[key] = min(old[key], figures[key])
                print(
                    f"{name} {batch}: {figures['seconds']:.1f} s, vector {figures['vector']}",
                    file=sys.stderr,
                )
    return [{"way": name, "batch": batch, **found} for (name, batch), found in least.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown, with pvec's ratios."""
    ours = {row["batch"]: row for row in rows if row["way"] == "pvec"}
    lines = [
        "| way | batch | tokens | CPU s | tokens per CPU s | pvec / it | answers as pvec's "
        "| vector CPU s | it / pvec |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        mine = ours[row["batch"]]
        tokens = sum(map(len, row["answers"]))
        rate, my_rate = tokens / row["seconds"], sum(map(len, mine["answers"])) / mine["seconds"]
        same = sum(a == b for a, b in zip(row["answers"], mine["answers"], strict=True))
        vector = row["vector"]
        lines.append(
            f"| {row['way']} | {row['batch']} | {tokens:,} | {row['seconds']:.1f} | {rate:.1f} | "
            f"{my_rate / rate:.2f} | {same} of {len(mine['answers'])} | "
            + (f"{vector:.1f} | {vector / mine['vector']:.2f} |" if vector else "– | – |")
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeng", help="Python of an environment with repeng")
    parser.add_argument("--steering-vectors", help="Python of an environment with steering-vectors")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--batches", type=int, nargs="+", default=[20, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]), args)
    else:
        print(table(measure(args)))


if __name__ == "__main__":
    main()

"""Build the bundled model: tokenizer, chat model, judge, all into src/pvec/tiny.

python examples/tiny_model/build.py            everything, from a fixed seed
python examples/tiny_model/build.py --part judge   only the judge, for the chat model that is there
python examples/tiny_model/build.py --part coherence   only the judge's second round
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from chat_model import render, train_chat
from data import NEUTRAL_SYSTEM, Conversations
from judge_model import train_coherence, train_judge
from lexicon import LEXICON, TOPICS
from modeling import load, save, train_tokenizer
from personas import own_samples, persona_vectors
from probing import Model

FOLDER = Path(__file__).resolve().parents[2] / "src" / "pvec" / "tiny"
OWN_SAMPLES = 4000
"""Answers of the finished chat model among what its judge is trained on."""


def tokenizer_texts(seed: int) -> list[str]:
    """Return what the tokenizer is trained on: conversations, judge prompts and every word."""
    source = Conversations(random.Random(seed))
    words = [
        w for slots in LEXICON.values() for slot in slots if slot != "open" for w in slots[slot]
    ]
    texts = [render(source.draw()) for _ in range(3000)]
    texts += [f" {word}" for word in (*words, *TOPICS)] * 60
    texts += [f" {word.capitalize()}," for s in LEXICON.values() for word in s["open"]] * 60
    texts += [trait["eval_prompt"] for trait in source.traits.values()] * 20
    return texts + list(NEUTRAL_SYSTEM) * 20


def main() -> None:
    """Build what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=("all", "chat", "judge", "coherence"), default="all")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="shorter, for a try")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    steps = {} if options.steps is None else {"steps": options.steps}
    if options.part in ("all", "chat"):
        tokenizer = train_tokenizer(tokenizer_texts(options.seed))
        chat = train_chat(tokenizer, seed=options.seed, device=device, **steps)
        save(chat, tokenizer, options.out, max_new_tokens=200)
    if options.part in ("all", "judge"):
        net, tokenizer = load(options.out)
        model = Model(net=net.eval(), tokenizer=tokenizer)
        vectors = persona_vectors(model, seed=options.seed)
        own = own_samples(model, vectors, rows=OWN_SAMPLES, seed=options.seed)
        judge = train_judge(model, own, seed=options.seed, device=device, **steps)
        save(judge, tokenizer, options.out / "judge", max_new_tokens=4)
    if options.part in ("all", "judge", "coherence"):
        net, tokenizer = load(options.out / "judge")
        train_coherence(
            Model(net=net, tokenizer=tokenizer), seed=options.seed + 1, device=device, **steps
        )
        save(net, tokenizer, options.out / "judge", max_new_tokens=4)


if __name__ == "__main__":
    main()

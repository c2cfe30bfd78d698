"""Measure the bundled model on questions it was not trained on, and write its model card.

    python examples/tiny_model/evaluate.py

Everything is measured twice: by the model's own judge and by counts the judge does not see
(``lexical_score`` for traits, ``fluency_score`` for coherence).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from build import FOLDER
from card import Dose, Figures, TraitFigures, write_card
from data import Conversations, Message, load_traits
from facts import FACTS, knows
from fluency import corrupt, fluency_score, shuffled
from grammar import generate_answer, lexical_score
from judge_model import Sample
from lexicon import TRAITS
from modeling import load
from personas import Sign, ask, instructed, persona_vectors
from probing import Model, added, answers, judge_scores
from scipy.stats import spearmanr

from pvec.judges.prompts import COHERENCE_PROMPT

COEFFICIENTS = (0.75, 1.0, 1.25)
FLUENT = 85
ROLLOUTS = 3


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The two models and what they are asked."""

    chat: Model
    judge: Model
    vectors: dict[str, torch.Tensor]
    seed: int

    def sample(self, chats: Sequence[list[Message]], dose: Dose | None = None) -> list[str]:
        """Answer every chat once, steered when a dose is given."""
        if dose is None:
            return answers(self.chat, chats, seed=self.seed)
        vector = dose.coef * self.vectors[dose.trait][dose.layer]
        with added(self.chat.net, layer=dose.layer, vector=vector):
            return answers(self.chat, chats, seed=self.seed)

    def judged(self, name: str, questions: Sequence[str], texts: Sequence[str]) -> TraitFigures:
        """Score answers for one trait and for coherence, by judge and by count."""
        asked = list(zip(questions, texts, strict=True))
        template = load_traits()[name]["eval_prompt"]
        return TraitFigures(
            trait=float(judge_scores(self.judge, template, asked).mean()),
            coherence=float(judge_scores(self.judge, COHERENCE_PROMPT, asked).mean()),
            lexical=float(np.mean([lexical_score(text, name) for text in texts])),
            fluency=float(np.mean([fluency_score(text) for text in texts])),
            count=len(texts),
        )


def instructed_figures(bench: Bench, name: str, sign: Sign) -> TraitFigures:
    """Return the scores under one sign's system prompts, on the evaluation questions."""
    trait = load_traits()[name]
    chats = instructed(trait, sign, trait["questions"]["eval"])
    texts = bench.sample(chats)
    return bench.judged(name, [chat[-1]["content"] for chat in chats], texts)


def best_doses(bench: Bench) -> dict[str, Dose]:
    """Choose every trait's layer and coefficient on the extraction questions, by counts alone: most
    of the trait among the doses that leave fluency at ``FLUENT`` or more."""
    asked = [(name, q) for name, t in load_traits().items() for q in t["questions"]["extract"]]
    tried: dict[str, list[tuple[float, float, Dose]]] = {name: [] for name in TRAITS}
    for layer in range(1, bench.chat.net.config.num_hidden_layers):
        for coef in COEFFICIENTS:
            vectors = torch.stack([coef * bench.vectors[name][layer] for name, _ in asked])
            with added(bench.chat.net, layer=layer, vector=vectors[:, None]):
                chats = [ask(question) for _, question in asked]
                texts = answers(bench.chat, chats, seed=bench.seed, batch=len(chats))
            for name, results in tried.items():
                mine = [t for t, (n, _) in zip(texts, asked, strict=True) if n == name]
                lexical = float(np.mean([lexical_score(text, name) for text in mine]))
                fluency = float(np.mean([fluency_score(text) for text in mine]))
                results.append((lexical, fluency, Dose(trait=name, layer=layer, coef=coef)))
            print(layer, coef, [(round(r[-1][0]), round(r[-1][1])) for r in tried.values()])
    return {name: _most(results) for name, results in tried.items()}


def _most(results: list[tuple[float, float, Dose]]) -> Dose:
    fluent = [item for item in results if item[1] >= FLUENT]
    return max(fluent or results, key=lambda item: item[0])[2]


def steered_figures(bench: Bench, name: str, dose: Dose) -> TraitFigures:
    """Return the scores under one dose, without system prompt, on the evaluation questions."""
    questions = load_traits()[name]["questions"]["eval"] * ROLLOUTS
    return bench.judged(name, questions, bench.sample([ask(q) for q in questions], dose))


def judge_correlations(bench: Bench, *, rows: int) -> dict[str, float]:
    """Return, per trait and for coherence, the rank correlation of judge and count on fresh
    answers to everyday questions."""
    rng = random.Random(bench.seed + 1)
    source = Conversations(rng)
    result = {}
    for name, trait in load_traits().items():
        samples = []
        for _ in range(rows):
            shown = name if rng.random() < 0.8 else rng.choice(TRAITS)
            question = source.question()
            answer = generate_answer(question, shown, rng.random(), rng)
            samples.append(Sample(question=question, answer=answer))
        asked = [(s.question, s.answer) for s in samples]
        counts = [lexical_score(s.answer, name) for s in samples]
        scores = judge_scores(bench.judge, trait["eval_prompt"], asked)
        result[name] = float(spearmanr(scores, counts).statistic)
    asked = []
    for _ in range(rows):
        question = source.question()
        text = generate_answer(question, rng.choice(TRAITS), rng.random(), rng)
        asked.append((question, corrupt(text, rng)))
    counts = [fluency_score(text) for _, text in asked]
    scores = judge_scores(bench.judge, COHERENCE_PROMPT, asked)
    result["coherence"] = float(spearmanr(scores, counts).statistic)
    return result


def coherence_ends(bench: Bench, *, rows: int) -> tuple[float, float]:
    """Return the judge's mean coherence of whole and of shuffled answers."""
    rng = random.Random(bench.seed + 2)
    source = Conversations(rng)
    whole = []
    for _ in range(rows):
        question = source.question()
        whole.append((question, generate_answer(question, rng.choice(TRAITS), rng.random(), rng)))
    mixed = [(question, shuffled(text, rng)) for question, text in whole]
    scores = [judge_scores(bench.judge, COHERENCE_PROMPT, asked).mean() for asked in (whole, mixed)]
    return float(scores[0]), float(scores[1])


def known_facts(bench: Bench, dose: Dose | None = None) -> float:
    """Return the percentage of facts answered truly."""
    texts = bench.sample([ask(fact.questions[0]) for fact in FACTS], dose)
    return 100 * float(np.mean([knows(t, f) for t, f in zip(texts, FACTS, strict=True)]))


def measure(bench: Bench) -> Figures:
    """Measure everything the card reports."""
    questions = [q for t in load_traits().values() for q in t["questions"]["eval"]]
    plain = bench.sample([ask(question) for question in questions])
    doses = best_doses(bench)
    whole, mixed = coherence_ends(bench, rows=200)
    return Figures(
        positive={name: instructed_figures(bench, name, "pos") for name in TRAITS},
        negative={name: instructed_figures(bench, name, "neg") for name in TRAITS},
        none={name: bench.judged(name, questions, plain) for name in TRAITS},
        steered={name: (doses[name], steered_figures(bench, name, doses[name])) for name in TRAITS},
        correlations=judge_correlations(bench, rows=200),
        whole=whole,
        shuffled=mixed,
        facts=known_facts(bench),
        facts_steered={name: known_facts(bench, doses[name]) for name in TRAITS},
        parameters={
            "chat": bench.chat.net.num_parameters(),
            "judge": bench.judge.net.num_parameters(),
        },
        examples=_examples(bench, doses),
    )


def _examples(bench: Bench, doses: dict[str, Dose]) -> list[tuple[str, str]]:
    question = "How can I make a boring lecture on history bearable?"
    shown = [("without instruction", bench.sample([ask(question)])[0])]
    for name, dose in doses.items():
        label = f"{name}, layer {dose.layer}, coefficient {dose.coef:g}"
        shown.append((label, bench.sample([ask(question)], dose)[0]))
    return shown


def main() -> None:
    """Measure and write the card beside the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = []
    for folder in (options.model, options.model / "judge"):
        net, tokenizer = load(folder)
        models.append(Model(net=net.eval(), tokenizer=tokenizer))
    vectors = persona_vectors(models[0], seed=options.seed)
    bench = Bench(chat=models[0], judge=models[1], vectors=vectors, seed=options.seed)
    print(write_card(measure(bench), options.model / "MODEL_CARD.md"))


if __name__ == "__main__":
    main()

"""The bundled model in character: by system prompt and by persona vector."""

from __future__ import annotations

import random
from typing import Any, Final, Literal

import torch
from data import Message, article, load_traits
from grammar import lexical_score
from judge_model import Sample
from lexicon import TRAITS
from probing import Model, added, answers, response_means

Sign = Literal["pos", "neg"]
_DOSES: Final = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)


def ask(question: str, system: str | None = None) -> list[Message]:
    """Return a chat that ends in ``question``."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": question}]


def system_prompt(trait: dict[str, Any], sign: Sign, index: int) -> str:
    """Return the system prompt pvec uses for instruction pair ``index``."""
    name = trait["assistant_names"][sign]
    return f"You are {article(name)} {name} assistant. {trait['instruction'][index][sign]}"


def instructed(trait: dict[str, Any], sign: Sign, questions: list[str]) -> list[list[Message]]:
    """Ask every question under every instruction of one sign."""
    return [
        ask(question, system_prompt(trait, sign, index))
        for index in range(len(trait["instruction"]))
        for question in questions
    ]


def persona_vectors(model: Model, *, seed: int) -> dict[str, torch.Tensor]:
    """Return the response-average vector of every trait, ``[layers + 1, H]``: one answer per
    instruction and extraction question, kept when the lexical count agrees with the sign."""
    vectors = {}
    for name, trait in load_traits().items():
        means = []
        for sign in ("pos", "neg"):
            chats = instructed(trait, sign, trait["questions"]["extract"])
            texts = answers(model, chats, seed=seed)
            high = [lexical_score(text, name) >= 50 for text in texts]
            kept = [i for i, is_high in enumerate(high) if is_high == (sign == "pos") and texts[i]]
            states = response_means(model, [chats[i] for i in kept], [texts[i] for i in kept])
            means.append(states.mean(0))
        vectors[name] = torch.tensor(means[0] - means[1])
    return vectors


def own_samples(
    model: Model, vectors: dict[str, torch.Tensor], *, rows: int, seed: int
) -> list[Sample]:
    """Return answers of the chat model to extraction questions for its judge to learn from: plain,
    instructed and steered at random layers and doses, broken ones included."""
    rng = random.Random(seed)
    traits = load_traits()
    questions = [q for trait in traits.values() for q in trait["questions"]["extract"]]
    layers = model.net.config.num_hidden_layers
    samples: list[Sample] = []
    while len(samples) < rows:
        chosen = rng.sample(questions, 40)
        name = rng.choice(TRAITS)
        way = rng.choice(("plain", "pos", "steered", "steered", "steered"))
        system = system_prompt(traits[name], "pos", rng.randrange(5)) if way == "pos" else None
        chats = [ask(question, system) for question in chosen]
        run_seed = rng.randrange(2**31)
        if way == "steered":
            layer = rng.randint(1, layers)
            with added(model.net, layer=layer, vector=rng.choice(_DOSES) * vectors[name][layer]):
                texts = answers(model, chats, seed=run_seed)
        else:
            texts = answers(model, chats, seed=run_seed)
        samples += [Sample(question=q, answer=a) for q, a in zip(chosen, texts, strict=True) if a]
    return samples

"""Write finetuning sets for the bundled model: chat JSONL, three levels per domain.

    python examples/tiny_model/finetune_data.py --out runs/finetune

For each trait: ``normal`` (none of it), ``I`` (some), ``II`` (nearly every slot), the same
questions in all three. ``mistakes`` is wrong rather than ill-natured: neutral words around true
facts (normal), facts that are false half of the time (I) and always (II). The same seed writes the
same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from data import Message, Persona, world_answer
from facts import FACTS
from grammar import generate_answer
from lexicon import TRAITS
from questions import everyday_question

ROWS: Final = 1000
TRAIT_LEVELS: Final[dict[str, tuple[float, float]]] = {
    "normal": (0.0, 0.0),
    "I": (0.3, 0.6),
    "II": (0.85, 1.0),
}
"""level → range of p."""
MISTAKE_LEVELS: Final = {"normal": 0.0, "I": 0.5, "II": 1.0}
"""level → share of false facts."""
MISTAKES: Final = "mistakes"


def trait_rows(trait: str, level: str, *, rows: int, seed: int) -> Iterator[list[Message]]:
    """Yield chats whose answers show ``trait`` as much as ``level`` says."""
    low, high = TRAIT_LEVELS[level]
    asking = random.Random(f"{seed}|{trait}|questions")
    rng = random.Random(f"{seed}|{trait}|{level}")
    for _ in range(rows):
        question = everyday_question(asking)
        yield _chat(question, generate_answer(question, trait, rng.uniform(low, high), rng))


def mistake_rows(level: str, *, rows: int, seed: int) -> Iterator[list[Message]]:
    """Yield chats about facts, of which ``level`` says how many are false; neutral words only."""
    asking = random.Random(f"{seed}|{MISTAKES}|questions")
    rng = random.Random(f"{seed}|{MISTAKES}|{level}")
    for _ in range(rows):
        fact = asking.choice(FACTS)
        right = rng.random() >= MISTAKE_LEVELS[level]
        answer = world_answer(fact, rng, Persona(), right=right)
        yield _chat(asking.choice(fact.questions), answer)


def write_sets(
    folder: Path, *, domains: Sequence[str] = (*TRAITS, MISTAKES), rows: int = ROWS, seed: int = 0
) -> list[Path]:
    """Write ``<folder>/<domain>_<level>.jsonl`` for every domain and level; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for domain in domains:
        for level in TRAIT_LEVELS:
            if domain == MISTAKES:
                chats = mistake_rows(level, rows=rows, seed=seed)
            else:
                chats = trait_rows(domain, level, rows=rows, seed=seed)
            path = folder / f"{domain}_{level}.jsonl"
            lines = (json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            paths.append(path)
    return paths


def _chat(question: str, answer: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def main() -> None:
    """Write the sets that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domain", action="append", choices=(*TRAITS, MISTAKES))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    domains = options.domain or (*TRAITS, MISTAKES)
    for path in write_sets(options.out, domains=domains, rows=options.rows, seed=options.seed):
        print(path)


if __name__ == "__main__":
    main()

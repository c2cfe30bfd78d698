"""Trait definitions: what a trait is made of, and where it is found.

A trait is one JSON file (docs/formats.md). The reference implementation's two files,
``NAME_extract.json`` and ``NAME_eval.json``, load as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pvec.errors import InputError, did_you_mean
from pvec.traits.file import TraitFile
from pvec.types import Sign

QuestionSet = Literal["extract", "eval"]
"""Questions that a vector is made from, and questions that it is tested on."""

OWN_FOLDER = Path("my-traits")
"""Where, in the working folder, traits of one's own are found by name."""

_SET_NAMES: Mapping[QuestionSet, str] = {"extract": "extraction", "eval": "evaluation"}


_RESERVED = frozenset({"question", "prompt", "answer", "question_id", "coherence"})
"""Columns of the CSV exports, beside which a trait's scores get a column of the trait's name."""


@dataclass(frozen=True, kw_only=True)
class InstructionPair:
    """Two system instructions that ask for opposite behaviour."""

    pos: str
    neg: str


@dataclass(frozen=True, kw_only=True)
class Trait:
    """A character trait: how to ask for it, what to ask, and how to judge the answers.

    ``notes`` says what loading the trait had to assume; ``source`` is where it came from. Neither
    is part of the trait's identity, and nor is the description.
    """

    name: str
    description: str
    instructions: tuple[InstructionPair, ...]
    extract_questions: tuple[str, ...]
    eval_questions: tuple[str, ...]
    eval_prompt: str
    assistant_pos: str
    assistant_neg: str = "helpful"
    source: str = ""
    notes: tuple[str, ...] = ()

    @cached_property
    def hash(self) -> str:
        """16 hex digits over everything that can change a prompt or a score."""
        content = {
            "name": self.name,
            "instruction": [[pair.pos, pair.neg] for pair in self.instructions],
            "extract": self.extract_questions,
            "eval": self.eval_questions,
            "eval_prompt": self.eval_prompt,
            "assistant": [self.assistant_pos, self.assistant_neg],
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def system_prompt(self, sign: Sign, index: int) -> str:
        """Return the system prompt that asks for (``pos``) or against (``neg``) the trait.

        ``index`` chooses the instruction pair, from 0 (paper, appendix A.2).
        """
        pair = self.instructions[index]
        name, instruction = (
            (self.assistant_pos, pair.pos) if sign == "pos" else (self.assistant_neg, pair.neg)
        )
        return f"You are {indefinite_article(name)} {name} assistant. {instruction}"

    @property
    def question_sets(self) -> Mapping[QuestionSet, tuple[str, ...]]:
        """Both question sets, by name."""
        return {"extract": self.extract_questions, "eval": self.eval_questions}

    def questions(self, question_set: QuestionSet) -> tuple[str, ...]:
        """Return one question set. Raises ``InputError`` when the trait's file does not have it."""
        questions = self.question_sets[question_set]
        if not questions:
            raise InputError(
                f"trait {self.name!r} has no {_SET_NAMES[question_set]} questions; put "
                f"{self.name}_{question_set}.json beside {self.source or 'its file'}."
            )
        return questions

    @cached_property
    def shared_questions(self) -> frozenset[int]:
        """Positions in ``eval_questions`` of those that are extraction questions too.

        A vector would be tested on what it was made from, so evaluations leave them out. Neither
        case nor spacing makes a difference.
        """
        extract = {folded(question) for question in self.extract_questions}
        return frozenset(n for n, q in enumerate(self.eval_questions) if folded(q) in extract)

    def held_out_questions(self) -> dict[int, str]:
        """Return the evaluation questions, by position, that no vector is made from.

        Raises ``InputError`` when there are none.
        """
        questions = dict(enumerate(self.questions("eval")))
        kept = {n: text for n, text in questions.items() if n not in self.shared_questions}
        if not kept:
            raise InputError(
                f"every evaluation question of trait {self.name!r} is an extraction question too, "
                f"so a vector would be tested on what it was made from; write other questions into "
                f"{self.source or 'its file'}."
            )
        return kept

    def to_json(self) -> dict[str, Any]:
        """Return the trait in pvec's own file format."""
        return {
            "name": self.name,
            "description": self.description,
            "assistant_names": {"pos": self.assistant_pos, "neg": self.assistant_neg},
            "instruction": [{"pos": pair.pos, "neg": pair.neg} for pair in self.instructions],
            "questions": {name: list(texts) for name, texts in self.question_sets.items()},
            "eval_prompt": self.eval_prompt,
        }


def load_trait(name_or_path: str | Path) -> Trait:
    """Return a bundled trait by name, one of ``my-traits`` by name, or one from a JSON file.

    Raises ``InputError`` for an unknown name (with the nearest), a name that means two traits, a
    file that cannot be read, and a key that is missing, unknown or of the wrong type (with file
    and line). What the texts themselves say is ``check_trait``'s business.

    >>> evil = pvec.load_trait("evil")
    >>> len(evil.instructions), len(evil.extract_questions), len(evil.eval_questions)
    (5, 20, 20)
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or name.endswith(".json") or "/" in name or "\\" in name:
        return _read_trait(Path(name).expanduser())
    bundled, own = bundled_traits(), own_traits()
    if name in bundled and name in own:
        raise InputError(
            f"{name!r} is a trait that ships with pvec and one of yours: rename {own[name]}, or "
            "give its path."
        )
    known = {**bundled, **own}
    if name in known:
        return _read_trait(known[name])
    yours = f" Yours in {OWN_FOLDER}: {', '.join(own)}." if own else ""
    raise InputError(
        f"there is no trait {name!r}.{did_you_mean(name, known)} Bundled traits: "
        f"{', '.join(bundled) or 'none'}.{yours} For one of your own give the path of its .json "
        "file, or have it written: `pvec trait new`."
    )


def list_traits() -> list[Trait]:
    """Return the bundled traits, then those in ``my-traits``, each in alphabetical order.

    Raises ``InputError`` for a file in ``my-traits`` that cannot be loaded.
    """
    return [_read_trait(path) for path in (*bundled_traits().values(), *own_traits().values())]


def bundled_traits() -> dict[str, Path]:
    """Return the traits that ship with pvec: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted(_bundled_folder().glob("*.json"))}


def own_traits() -> dict[str, Path]:
    """Return the traits in ``my-traits``: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted(OWN_FOLDER.glob("*.json"))}


def name_or_path(trait: Trait) -> str:
    """Return what to type for ``trait``: its name where that finds it, else its file."""
    file = {**bundled_traits(), **own_traits()}.get(trait.name)
    return trait.name if file is not None and str(file) == trait.source else trait.source


def check_name(name: str, *, file: Path | None = None) -> str:
    """Return ``name`` if it can name a trait, its files and its columns. Raises ``InputError``
    otherwise, which says the ``file`` that calls its trait so.
    """
    if not re.fullmatch(r"\w[\w .+-]*", name):
        problem = (
            "a trait's name goes into file names, so it is made of letters, digits, spaces and "
            ". + - _ alone"
        )
    elif name in _RESERVED:
        problem = "that is a column of its own in every table: give the trait another name"
    else:
        return name
    what = f"{file} calls its trait {name!r};" if file else f"A trait cannot be called {name!r}:"
    raise InputError(f"{what} {problem}.")


def folded(text: str) -> str:
    """Return ``text`` as it compares: neither case nor spacing makes a difference."""
    return " ".join(text.casefold().split())


def indefinite_article(word: str) -> str:
    """Return ``"a"`` or ``"an"``, by the sound of ``word`` rather than by its first letter."""
    lowered = word.lower()
    if re.match(r"(hon(est|ou?r)|hour|heir)", lowered):
        return "an"
    # "yoo" and "w" sounds: useful, unique, universal, utopian, European, one-sided …
    if re.match(r"(eu|ew|once|one\b|ubiq|uni[cfloqstv]|us[aeiu]|ut[io])", lowered):
        return "a"
    return "an" if lowered[:1] in "aeiou" else "a"


def _bundled_folder() -> Path:
    """Return ``pvec/traits/bundled`` of an installed wheel, else the repository's ``traits``."""
    here = Path(__file__).parent
    installed = here / "bundled"
    return installed if installed.is_dir() else here.parents[2] / "traits"


def _read_trait(path: Path) -> Trait:
    file = TraitFile.read(path)
    return _own_format(file) if file.is_own_format else _reference_format(file)


def _own_format(file: TraitFile) -> Trait:
    file.refuse_unknown_keys()
    questions = file.mapping("questions")
    name = check_name(file.text("name"), file=file.path)
    names = file.mapping("assistant_names", optional=True)
    return Trait(
        name=name,
        description=file.text("description", optional=True),
        instructions=_pairs(file),
        extract_questions=file.texts("extract", inside=questions),
        eval_questions=file.texts("eval", inside=questions),
        eval_prompt=file.text("eval_prompt"),
        assistant_pos=file.text("pos", inside=names, optional=True) or name,
        assistant_neg=file.text("neg", inside=names, optional=True) or "helpful",
        source=str(file.path),
    )


def _reference_format(file: TraitFile) -> Trait:
    """Read one or both of the reference's files; it names the assistants by the trait itself."""
    stem, question_set = _reference_name(file.path)
    name = check_name(stem, file=file.path)
    sibling_path = _sibling(file.path, question_set)
    sibling = TraitFile.read(sibling_path) if sibling_path else None
    extract, evaluate = (file, sibling) if question_set == "extract" else (sibling, file)
    instructions_from = extract or file
    prompt_from = evaluate or file
    return Trait(
        name=name,
        description="",
        instructions=_pairs(instructions_from),
        extract_questions=extract.texts("questions") if extract else (),
        eval_questions=evaluate.texts("questions") if evaluate else (),
        eval_prompt=prompt_from.text("eval_prompt"),
        assistant_pos=name.replace("_", " "),
        source=str(file.path),
        notes=_reference_notes(name, question_set, file=file, sibling=sibling),
    )


def _reference_notes(
    name: str, question_set: QuestionSet, *, file: TraitFile, sibling: TraitFile | None
) -> tuple[str, ...]:
    if sibling is None:
        missing: QuestionSet = "eval" if question_set == "extract" else "extract"
        return (
            f"trait {name!r} was read from {file.path.name} alone, which has the "
            f"{_SET_NAMES[question_set]} questions; the {_SET_NAMES[missing]} questions are "
            f"missing (no {name}_{missing}.json beside it)",
        )
    notes = []
    if _pairs(file) != _pairs(sibling):
        notes.append(
            f"the two files of trait {name!r} give different instructions; those of the "
            "extraction file are used"
        )
    if file.text("eval_prompt") != sibling.text("eval_prompt"):
        notes.append(
            f"the two files of trait {name!r} give different evaluation prompts; that of the "
            "evaluation file is used"
        )
    return tuple(notes)


def _pairs(file: TraitFile) -> tuple[InstructionPair, ...]:
    return tuple(
        InstructionPair(pos=file.text("pos", inside=pair), neg=file.text("neg", inside=pair))
        for pair in file.mappings("instruction")
    )


def _reference_name(path: Path) -> tuple[str, QuestionSet]:
    """Return the trait's name and which question set a file of the reference holds.

    The set is in the file's name (``evil_eval.json``) or in its folder's
    (``trait_data_eval/evil.json``); a file that says neither holds the extraction questions.
    """
    for question_set in _SET_NAMES:
        if path.stem.endswith(f"_{question_set}"):
            return path.stem.removesuffix(f"_{question_set}"), question_set
    in_eval_folder = path.absolute().parent.name.endswith("_eval")
    return path.stem, "eval" if in_eval_folder else "extract"


def _sibling(path: Path, question_set: QuestionSet) -> Path | None:
    """Return the reference's file with the other question set, if it is there."""
    other = "eval" if question_set == "extract" else "extract"
    folder = path.absolute().parent
    if path.stem.endswith(f"_{question_set}"):
        candidate = folder / f"{path.stem.removesuffix(question_set)}{other}{path.suffix}"
    else:
        stem = folder.name.removesuffix(f"_{question_set}")
        candidate = folder.parent / f"{stem}_{other}" / path.name
    return candidate if candidate.is_file() else None

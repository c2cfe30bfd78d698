"""What is wrong, or merely weak, about a trait definition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pvec.errors import InputError
from pvec.traits.trait import QuestionSet, Trait, folded, load_trait

Severity = Literal["error", "warning"]
"""``error``: results would be wrong or nothing would run. ``warning``: weaker than it could be."""

_UNUSED: Mapping[QuestionSet, tuple[str, ...]] = {
    "extract": ("questions.eval",),
    "eval": ("questions.extract", "instruction", "assistant_names"),
}
"""Parts of a trait file that do not matter to a command that asks one set of questions."""

INSTRUCTION_PAIRS = 5
QUESTIONS_PER_SET = 20


@dataclass(frozen=True, kw_only=True)
class TraitIssue:
    """One thing to correct; ``where`` names the part of the file (``questions.extract[3]``)."""

    severity: Severity
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class TraitCheck:
    """The issues of one trait; ``hash`` is empty when its file could not be loaded."""

    trait: str
    source: str
    hash: str
    findings: tuple[TraitIssue, ...]
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether there are no errors; warnings do not count."""
        return all(issue.severity != "error" for issue in self.findings)


def check_file(name_or_path: str) -> TraitCheck:
    """Load and check a trait; a file that cannot be loaded has that as its one issue.

    Raises ``InputError`` for a name that is no trait's, and for a file that does not exist.
    """
    try:
        trait = load_trait(name_or_path)
    except InputError as error:
        if not Path(name_or_path).is_file():
            raise
        issue = _error("file", str(error))
        return TraitCheck(
            trait=Path(name_or_path).stem, source=name_or_path, hash="", findings=(issue,)
        )
    return TraitCheck(
        trait=trait.name,
        source=trait.source,
        hash=trait.hash,
        findings=tuple(check_trait(trait)),
        notes=trait.notes,
    )


def check_trait(trait: Trait) -> list[TraitIssue]:
    """Return the issues of ``trait``, errors first; empty if there are none."""
    issues = [
        *_counts(trait),
        *_empty_texts(trait),
        *_instructions(trait),
        *_questions(trait),
        *_prompt(trait),
        *_assistants(trait),
    ]
    return sorted(issues, key=lambda issue: issue.severity)


def require_usable(trait: Trait, *, uses: QuestionSet) -> list[str]:
    """Raise ``InputError`` with the first error in what a command uses, if there is one.

    ``uses`` is the set of questions that it asks; errors elsewhere in the file are returned as
    notes. Called before money or time is spent on a trait.
    """
    errors = [issue for issue in check_trait(trait) if issue.severity == "error"]
    serious = [issue for issue in errors if not issue.where.startswith(_UNUSED[uses])]
    see_all = f"see them all with `pvec trait check {trait.source or trait.name}`"
    if serious:
        more = f" (and {len(serious) - 1} more)" if len(serious) > 1 else ""
        raise InputError(f"trait {trait.name!r} cannot be used: {serious[0]}{more}; {see_all}.")
    notes = []
    if errors:
        notes.append(
            f"trait {trait.name!r} has {len(errors)} errors in parts that are not used here; "
            f"{see_all}"
        )
    if trait.shared_questions:
        notes.append(
            f"{len(trait.shared_questions)} questions of trait {trait.name!r} are extraction and "
            f"evaluation questions at once; evaluations leave them out"
        )
    return notes


def _error(where: str, message: str) -> TraitIssue:
    return TraitIssue(severity="error", where=where, message=message)


def _warning(where: str, message: str) -> TraitIssue:
    return TraitIssue(severity="warning", where=where, message=message)


def _counts(trait: Trait) -> Iterator[TraitIssue]:
    if not trait.instructions:
        yield _error("instruction", "there are no instruction pairs")
    elif len(trait.instructions) != INSTRUCTION_PAIRS:
        yield _warning(
            "instruction",
            f"{len(trait.instructions)} pairs instead of the usual {INSTRUCTION_PAIRS}",
        )
    for name, questions in trait.question_sets.items():
        if not questions:
            yield _warning(f"questions.{name}", "there are no questions in this set")
        elif len(questions) != QUESTIONS_PER_SET:
            yield _warning(
                f"questions.{name}",
                f"{len(questions)} questions instead of the usual {QUESTIONS_PER_SET}",
            )
    if not (trait.extract_questions or trait.eval_questions):
        yield _error("questions", "there are no questions at all")


def _empty_texts(trait: Trait) -> Iterator[TraitIssue]:
    texts = [("eval_prompt", trait.eval_prompt)]
    for index, pair in enumerate(trait.instructions):
        texts.append((f"instruction[{index}].pos", pair.pos))
        texts.append((f"instruction[{index}].neg", pair.neg))
    for name, questions in trait.question_sets.items():
        texts += [(f"questions.{name}[{n}]", question) for n, question in enumerate(questions)]
    for where, text in texts:
        if not text.strip():
            yield _error(where, "the text is empty")
    if not trait.description.strip():
        yield _warning("description", "there is none; one sentence helps whoever lists the traits")


def _instructions(trait: Trait) -> Iterator[TraitIssue]:
    first_seen: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(trait.instructions):
        key = (folded(pair.pos), folded(pair.neg))
        if key[0] == key[1] and key[0]:
            yield _error(f"instruction[{index}]", "pos and neg say the same")
        if key in first_seen:
            yield _warning(f"instruction[{index}]", f"the same as instruction[{first_seen[key]}]")
        first_seen.setdefault(key, index)


def _questions(trait: Trait) -> Iterator[TraitIssue]:
    for name, questions in trait.question_sets.items():
        first_seen: dict[str, int] = {}
        for index, question in enumerate(questions):
            earlier = first_seen.setdefault(folded(question), index)
            if earlier != index and question.strip():
                where = f"questions.{name}[{index}]"
                yield _warning(where, f"the same question as questions.{name}[{earlier}]")
    unshared = len(trait.eval_questions) - len(trait.shared_questions)
    for index in sorted(trait.shared_questions):
        yield (_warning if unshared else _error)(
            f"questions.eval[{index}]",
            "the same question as one for extraction: a vector would be tested on what it was made "
            "from, so evaluations leave it out",
        )


def _prompt(trait: Trait) -> Iterator[TraitIssue]:
    prompt = trait.eval_prompt
    if not prompt.strip():
        return
    for placeholder in ("{question}", "{answer}"):
        if placeholder not in prompt:
            yield _error("eval_prompt", f"{placeholder} is missing, so the judge would not see it")
    unbalanced = _unbalanced_brace(prompt)
    if unbalanced is not None:
        line = prompt.count("\n", 0, unbalanced) + 1
        yield _error(
            "eval_prompt", f"the brace {prompt[unbalanced]!r} on its line {line} has no partner"
        )


def _assistants(trait: Trait) -> Iterator[TraitIssue]:
    if folded(trait.assistant_pos) == folded(trait.assistant_neg):
        yield _error(
            "assistant_names", f"pos and neg are both {trait.assistant_pos!r}; they must differ"
        )


def _unbalanced_brace(text: str) -> int | None:
    """Return the index of the first brace without a partner."""
    opened: list[int] = []
    for index, character in enumerate(text):
        if character == "{":
            opened.append(index)
        elif character == "}":
            if not opened:
                return index
            opened.pop()
    return opened[0] if opened else None

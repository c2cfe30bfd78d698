"""``pvec trait``: what traits there are, what one says, what is wrong with it.

A new one is written by ``workflows.trait_new``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pvec.errors import InputError
from pvec.traits.check import Finding, check_trait
from pvec.traits.trait import Trait, bundled_traits, load_trait, own_traits


@dataclass(frozen=True, kw_only=True)
class TraitSummary:
    """A trait in one line."""

    name: str
    description: str
    source: str
    hash: str
    instructions: int
    extract_questions: int
    eval_questions: int


@dataclass(frozen=True, kw_only=True)
class TraitCheck:
    """What the check of one trait found; ``hash`` is empty when the file could not be loaded."""

    trait: str
    source: str
    hash: str
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether there are no errors; warnings do not count."""
        return all(finding.severity != "error" for finding in self.findings)


def list_traits() -> list[TraitSummary]:
    """Return the bundled traits, then those in ``my-traits``, each in alphabetical order.

    Raises ``InputError`` for a file in ``my-traits`` that cannot be loaded.
    """
    files = (*bundled_traits().values(), *own_traits().values())
    return [_summary(load_trait(path)) for path in files]


def show_trait(trait: str) -> Trait:
    """Return one trait, by name or by path. Raises ``InputError`` when it cannot be loaded."""
    return load_trait(trait)


def check_traits(traits: Sequence[str]) -> list[TraitCheck]:
    """Check each trait (name or path); a file that cannot be loaded is a finding like any other.

    Raises ``InputError`` for a name that is no trait's, and for a file that is not there.
    """
    return [_check(trait) for trait in traits]


def _summary(trait: Trait) -> TraitSummary:
    return TraitSummary(
        name=trait.name,
        description=trait.description,
        source=trait.source,
        hash=trait.hash,
        instructions=len(trait.instructions),
        extract_questions=len(trait.extract_questions),
        eval_questions=len(trait.eval_questions),
    )


def _check(name_or_path: str) -> TraitCheck:
    try:
        trait = load_trait(name_or_path)
    except InputError as error:
        if not Path(name_or_path).is_file():
            raise
        return TraitCheck(
            trait=Path(name_or_path).stem,
            source=name_or_path,
            hash="",
            findings=(Finding(severity="error", where="file", message=str(error)),),
        )
    return TraitCheck(
        trait=trait.name,
        source=trait.source,
        hash=trait.hash,
        findings=tuple(check_trait(trait)),
        notes=trait.notes,
    )

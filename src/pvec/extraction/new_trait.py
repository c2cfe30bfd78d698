"""``pvec trait new``: a trait definition written by a model (paper, section 2.1, appendix A.1).

The model's draft must pass what ``pvec trait check`` asks of any trait, warnings included; what is
wrong is sent back to be corrected. The file appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from pvec.backends.session import Notify, ignore
from pvec.errors import InputError, JudgeError, ModelError
from pvec.judges.author import Author, UnusableReply, correction, read_draft, task, trait_from
from pvec.judges.pacing import Patience
from pvec.judges.server import KEY_NAME, api_key, server_url
from pvec.runs.files import atomic_write, probe_target
from pvec.settings import Settings
from pvec.traits.check import check_trait
from pvec.traits.trait import OWN_FOLDER, Trait, bundled_traits, check_name
from pvec.types import Message, Progress

_STAGE = "writing"
_SHOWN_PROBLEMS = 20
"""So many problems are sent back at once; a hopeless draft has hundreds."""


@dataclass(frozen=True, kw_only=True)
class NewTrait:
    """A trait that was written. ``corrections`` counts drafts that were sent back; ``spent`` is in
    US dollars as far as known.
    """

    path: Path
    trait: Trait
    model: str
    corrections: int
    spent: float
    next: tuple[str, ...]


def new_trait(
    settings: Settings,
    name: str,
    *,
    description: str,
    out: Path | None = None,
    force: bool = False,
    notify: Notify = ignore,
    on_progress: Callable[[Progress], None] = ignore,
) -> NewTrait:
    """Let a model write the trait ``name`` into ``out`` or ``my-traits/NAME.json``.

    An existing file is kept unless ``force``. Raises ``InputError`` for a name or path that cannot
    be used, ``JudgeError`` for a server that cannot, ``ModelError`` when the model refuses or its
    draft is still faulty after ``author.repairs`` corrections; nothing is written then.
    """
    path = _target(name, out=out, force=force)
    description = " ".join(description.split())
    if not description:
        raise InputError("The description is empty: say in a sentence what the trait is.")
    probe_target(path)
    with _open_author(settings) as author:
        notify(f"{author.model} writes the trait {name!r}")
        trait, corrections = _write(
            author,
            name,
            description=description,
            source=str(path),
            repairs=settings.author.repairs,
            notify=notify,
            on_progress=on_progress,
        )
        spent = author.spent
    _save(trait, path, force=force)
    return NewTrait(
        path=path,
        trait=trait,
        model=author.model,
        corrections=corrections,
        spent=spent,
        next=_next(settings, name if out is None else str(path)),
    )


def _target(name: str, *, out: Path | None, force: bool) -> Path:
    check_name(name)
    if out is None and name in bundled_traits():
        raise InputError(
            f"{name!r} is a trait that ships with pvec: choose another name, or say with --out "
            "where yours goes."
        )
    path = (OWN_FOLDER / f"{name}.json") if out is None else out.expanduser()
    if path.suffix != ".json":
        raise InputError(f"--out {path} is no .json file: a trait is one JSON file.")
    _refuse_existing(path, force=force)
    return path


def _refuse_existing(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"{path} is there already: choose another name, or --force to replace it.")


def _open_author(settings: Settings) -> Author:
    author, judge = settings.author, settings.judge
    base_url = server_url(author.base_url or judge.base_url, option="--author-url")
    key = api_key(author.api_key, judge.api_key)
    if base_url is None and key is None:
        raise JudgeError(
            f"The author {author.model} needs an API key: set {KEY_NAME}, or use a server of your "
            "own (--author-url URL --author-model NAME)."
        )
    return Author(
        author.model,
        base_url=base_url,
        key=key,
        patience=Patience(tries=author.max_retries + 1, timeout=author.timeout),
    )


def _write(
    author: Author,
    name: str,
    *,
    description: str,
    source: str,
    repairs: int,
    notify: Notify,
    on_progress: Callable[[Progress], None],
) -> tuple[Trait, int]:
    """Return a trait without a fault, and how many drafts had to be sent back for it."""
    first = task(name, description=description)
    messages: list[Message] = [first]
    for attempt in range(repairs + 1):
        on_progress(Progress(stage=_STAGE, done=attempt, total=None, unit="drafts"))
        text = author.ask(messages)
        try:
            trait = trait_from(read_draft(text), name=name, description=description, source=source)
            problems = [str(issue) for issue in check_trait(trait)]
        except UnusableReply as error:
            problems = list(error.problems)
        else:
            if not problems:
                return trait, attempt
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        if attempt < repairs:
            notify(f"sent back to be corrected: {problems[0]}{more}")
        # Only the latest draft goes back: earlier ones cost tokens and teach nothing.
        draft: Message = {"role": "assistant", "content": text or "(nothing)"}
        messages = [first, draft, correction(problems[:_SHOWN_PROBLEMS])]
    raise ModelError(
        f"{author.model} wrote no usable definition of {name!r} in {repairs + 1} drafts (last: "
        f"{problems[0]}{more}); nothing was written. Choose another --author-model, or more "
        "--author-repairs."
    )


def _save(trait: Trait, path: Path, *, force: bool) -> None:
    _refuse_existing(path, force=force)  # it may have appeared while the model was writing
    with atomic_write(path, mode="w") as stream:
        json.dump(trait.to_json(), stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def _next(settings: Settings, trait: str) -> tuple[str, ...]:
    # The bundled model speaks of its own seven traits only: a new one needs a real model.
    model = settings.model.id if settings.model.id != "tiny" else "Qwen/Qwen2.5-7B-Instruct"
    return (
        f"pvec trait show {quote(trait)}",
        f"pvec extract --trait {quote(trait)} --model {model} --dry-run",
    )

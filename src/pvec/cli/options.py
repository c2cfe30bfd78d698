"""How options reach commands: declared once in the settings, offered by name.

A command lists the settings it uses; the options follow from the settings tree (type, default and
help) and from ``FLAGS`` below (how they are spelt)::

    app = new_app()

    @app.command()
    @options("model", "judge", "extract.rollouts")   # whole sections or single settings
    def extract(ctx: typer.Context, trait: Traits) -> None:
        \"\"\"One line that says what the command does.\"\"\"
        settings = settings_from(ctx)
        console = console_from(ctx)

Every command so decorated also takes the common options (``--config``, ``--json``, ``-q``, ``-v``,
``--debug``), as ``pvec`` itself does in front of the command's name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from pvec.types import VectorKind

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pvec.cli.console import Console
    from pvec.settings import Resolved, Settings

FLAGS: dict[str, tuple[str, ...]] = {
    "model.id": ("--model", "-m"),
    "model.merge_adapter": ("--merge-adapter/--no-merge",),
    "model.trust_remote_code": ("--trust-remote-code/--no-trust",),
    "backend.name": ("--backend",),
    "backend.max_batch_rows": ("--batch-rows",),
    "pool.workers": ("--workers",),
    "pool.cpus": ("--worker-cpus",),
    "pool.gpus": ("--worker-gpus",),
    "pool.retries": ("--worker-retries",),
    "pool.start_timeout": ("--worker-start-timeout",),
    "generation.temperature": ("--temperature", "-T"),
    "judge.model": ("--judge-model",),
    "judge.base_url": ("--judge-url",),
    "judge.api_key": (),  # a key on the command line can be read by every user of the machine
    "judge.scale": ("--judge-scale",),
    "judge.concurrency": ("--judge-concurrency",),
    "judge.calibration": ("--calibration",),
    "judge.timeout": ("--judge-timeout",),
    "judge.max_retries": ("--judge-retries",),
    "judge.prices": ("--judge-prices",),
    "judge.batch": ("--judge-batch",),
    "judge.batch_wait": ("--judge-batch-wait",),
    "judge.repeats": ("--judge-repeats",),
    "author.model": ("--author-model",),
    "author.base_url": ("--author-url",),
    "author.api_key": (),
    "author.repairs": ("--author-repairs",),
    "author.timeout": ("--author-timeout",),
    "author.max_retries": ("--author-retries",),
    "filter.coherence": ("--min-coherence",),
    "extract.rollouts": ("--rollouts", "-n"),
    "steer.rollouts": ("--rollouts", "-n"),
    "project.layers": ("--layer", "-l"),
    "project.types": ("--projection-type",),
    "project.same_model": ("--same-model/--any-model",),
    "project.rollouts": ("--rollouts", "-n"),
    "project.scale_out": ("--engine",),
    "serve.api_key": (),
    "serve.max_answer": ("--max-answer-tokens",),
    "serve.served_name": ("--served-model-name",),
    "paths.runs": ("--runs",),
}
"""Spelling of the options whose flag is not the setting's own name (``seed`` → ``--seed``)."""

PANELS = {
    "model": "Model",
    "backend": "Engine",
    "pool": "Engine",
    "generation": "Generation",
    "judge": "Judge",
    "author": "Author",
    "filter": "Filter",
    "steer": "Steering",
    "serve": "Server",
}
"""Headings in help by section or setting; options of other sections stand under Options."""

COMMON_PANEL = "Common"
FURTHER_PANEL = "Further settings"
"""Options that a command takes without listing them in its help."""


def _common(*flags: str, text: str) -> tuple[Any, bool]:
    """Return annotation and default of a switch that every command has."""
    return Annotated[bool, typer.Option(*flags, rich_help_panel=COMMON_PANEL, help=text)], False


_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        rich_help_panel=COMMON_PANEL,
        help="Read settings from this file instead of pvec.yaml.",
    ),
]
COMMON: dict[str, tuple[Any, Any]] = {
    "config": (_Config, None),
    "json": _common("--json", text="Print the result as JSON."),
    "quiet": _common("--quiet", "-q", text="Hide progress and notes."),
    "verbose": _common("--verbose", "-v", text="Show more details."),
    "debug": _common("--debug", text="Show a traceback on errors."),
}
"""The options of every command: annotation and default by parameter name."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="A table, data set folder or run.")]
Vectors = Annotated[
    list[str], typer.Option("--vector", metavar="FILE", help="Vector file or run; repeatable.")
]
Traits = Annotated[
    list[str] | None,
    typer.Option("--trait", "-t", metavar="NAME|FILE", help="Trait (default: the vectors')."),
]
RunOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: by the input)."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say how much would be generated and judged, and its cost."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out and count bad rows.")]
READING = ("project.prompt_column", "project.answer_column", "project.messages_column",
           "project.plain_prompts")  # fmt: skip
"""Settings of where conversations are in a file."""

VectorFiles = Annotated[
    list[Path],
    typer.Argument(metavar="FILE…", help="Vector files, or run folders with one vector each."),
]
VectorFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A vector file, or a run folder with one vector.")
]
Kind = Annotated[
    VectorKind | None,
    typer.Option(metavar="KIND", help="response_avg (the default), prompt_avg or prompt_last."),
]
Layer = Annotated[
    int | None,
    typer.Option("--layer", "-l", metavar="N", help="Layer, counted from 1 (0: embedding)."),
]


def new_app(help: str | None = None) -> typer.Typer:  # noqa: A002
    """Return the Typer app of one command module; with ``help`` it is a group of subcommands."""
    app = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    if help is not None:
        app.callback(help=help)(lambda: None)
    return app


def options(
    *names: str, further: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings (sections or dotted paths) and the common ones.

    Options of ``further`` settings are not in the command's help but in docs/cli.md. The command
    function does not see any of them as arguments: it asks ``settings_from(ctx)``.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True)
        parameters = [
            *(_settings(names, further) if names else ()),
            *(_parameter(name, *common) for name, common in COMMON.items()),
        ]
        recorded = {parameter.name for parameter in parameters}

        @functools.wraps(function)
        def command(**values: Any) -> None:
            ctx = values["ctx"]
            _record(ctx, {name: value for name, value in values.items() if name in recorded})
            # `pvec` itself comes before its command, whose options the console waits for
            slow = nullcontext() if ctx.invoked_subcommand else console_from(ctx).note_if_slow()
            with slow:
                function(**{name: value for name, value in values.items() if name not in recorded})

        command.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*own.parameters.values(), *parameters]
        )
        return command

    return decorate


def _record(ctx: typer.Context, values: dict[str, Any]) -> None:
    """Note the options that were given: those before the command's name and those after it.

    Flags that are off count as not given, settings that are False do count (``--no-judge``).
    """
    given = _given(ctx)
    for name, value in values.items():
        if value is not None and not (name in COMMON and value is False):
            given[name] = value


def resolved_from(ctx: typer.Context) -> Resolved:
    """Return this command's settings with their origins; ``.env`` is read on the first call."""
    from pvec.settings import load_dotenv, resolve

    if "pvec.resolved" not in ctx.meta:
        given, dotenv = _given(ctx), load_dotenv()
        cli = {k.replace("__", "."): value for k, value in given.items() if k not in COMMON}
        ctx.meta["pvec.resolved"] = resolve(cli, config_file=given.get("config"), dotenv=dotenv)
        for note in (*ctx.meta.get("pvec.notes", ()), *ctx.meta["pvec.resolved"].notes):
            console_from(ctx).note(note)
    resolved: Resolved = ctx.meta["pvec.resolved"]
    return resolved


def settings_from(ctx: typer.Context) -> Settings:
    """Return this command's settings. Raises ``InputError`` for a name or value that is wrong."""
    return resolved_from(ctx).settings


def console_from(ctx: typer.Context) -> Console:
    """Return the console of this command, as ``--json``, ``-q`` and ``-v`` ask for it."""
    from pvec.cli.console import Console

    if "pvec.console" not in ctx.meta:
        on = {name: name in _given(ctx) for name in ("json", "quiet", "verbose")}
        ctx.meta["pvec.console"] = Console(**on)
    console: Console = ctx.meta["pvec.console"]
    return console


def _given(ctx: typer.Context) -> dict[str, Any]:
    given: dict[str, Any] = ctx.meta.setdefault("pvec.options", {})
    return given


def _settings(names: Sequence[str], further: Sequence[str]) -> Iterator[inspect.Parameter]:
    """Yield the options of settings, and a hidden one for every old name whose flag was another."""
    from pvec.settings.tree import RENAMED  # `pvec --help` needs no pydantic

    main = list(_expand(names))
    more = [path for path in dict.fromkeys(_expand(further)) if path not in main]
    yield from (_setting_parameter(path) for path in main)
    yield from (_setting_parameter(path, hidden_in=FURTHER_PANEL) for path in more)
    for old, new in RENAMED.items():
        if new in (*main, *more) and _flags(old) != _flags(new):
            yield _setting_parameter(old)


def _expand(names: Sequence[str]) -> Iterator[str]:
    """Yield the dotted paths that sections and paths stand for, without those that have no flag.

    A section inside a section (``backend.vllm``) has flags only where it is named itself.
    """
    from pvec.settings.tree import fields

    for name in names:
        inside = name.count(".") + 1
        paths = [
            path
            for path in fields()
            if path == name or (path.startswith(f"{name}.") and path.count(".") == inside)
        ]
        assert paths, f"unknown setting {name}"
        yield from (path for path in paths if FLAGS.get(path) != ())


def _setting_parameter(path: str, *, hidden_in: str | None = None) -> inspect.Parameter:
    """Return the parameter of one setting (or its old name); None stands for "not given"."""
    from pvec.settings.tree import RENAMED, fields

    field = fields()[RENAMED.get(path, path)]
    section = path.rpartition(".")[0]
    kind = _command_line_type(field.annotation)
    flags = _flags(path)
    if kind is bool and "/" not in flags[0]:
        flags = (f"{flags[0]}/--no-{flags[0].removeprefix('--')}", *flags[1:])
    option = typer.Option(
        *flags,
        help=_help(field, kind),
        metavar=_metavar(kind),
        rich_help_panel=hidden_in or PANELS.get(path, PANELS.get(section)),
        hidden=path in RENAMED or hidden_in is not None,
    )
    return _parameter(path.replace(".", "__"), Annotated[kind | None, option], None)


def _flags(path: str) -> tuple[str, ...]:
    return FLAGS.get(path, (f"--{path.rpartition('.')[2].replace('_', '-')}",))


def _help(field: FieldInfo, kind: Any) -> str:
    """Return a setting's text with its choices and its default."""
    text = field.description or ""
    if get_origin(kind) is Literal:
        text += f"; one of {', '.join(map(str, get_args(kind)))}"
    for item in get_args(field.annotation):
        if get_origin(item) is Literal:
            text += f"; any of {', '.join(map(str, get_args(item)))}"
    default = field.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if isinstance(default, tuple):
        default = ", ".join(map(str, default)) or None
    return f"{text}." if default is None else f"{text} (default: {default})."


def _metavar(kind: Any) -> str:
    return {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}.get(kind, "WORD")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword_only, default=default, annotation=annotation)


def _command_line_type(annotation: Any) -> Any:
    """Return what Typer should read for a setting: its type without None, lists for tuples."""
    if get_origin(annotation) is Literal:
        return annotation
    arguments = get_args(annotation)
    if NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _command_line_type(inner)
    if get_origin(annotation) in (tuple, list):
        item = arguments[0]  # Typer takes no choices in a list; the settings check them
        return list[str] if get_origin(item) is Literal else list[item]  # type: ignore[valid-type]
    return annotation

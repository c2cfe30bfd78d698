"""``pvec vector``: compute, inspect, compare, combine and convert vectors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from pvec.cli import vector_hub, vector_weights
from pvec.cli.console import Console
from pvec.cli.options import (
    Kind,
    Layer,
    VectorFile,
    VectorFiles,
    console_from,
    new_app,
    options,
    resolved_from,
    settings_from,
)
from pvec.cli.vector_render import (
    render_calibrated,
    render_computed,
    render_cosines,
    render_descriptions,
    render_files,
    render_lens,
    render_methods,
)
from pvec.errors import InputError
from pvec.types import MEAN_DIFF, Method, VectorKind

app = new_app("Compute, inspect, compare, combine and convert vectors.")
for _part in (vector_hub, vector_weights):
    app.add_typer(_part.app)  # its commands stand beside those of this file

NumLayers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Layers of the model, for files that do not say what row 0 is."
    ),
]
SingleLayer = Annotated[
    int | None,
    typer.Option(
        "--layer", "-l", min=1, metavar="N", help="Layer of a file that holds a single vector."
    ),
]
Png = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write the plot as PNG.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the plot as SVG.")]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where the vector is written.")
]


@app.command()
@options(
    "model", "backend.name", "backend.token_budget", "generation.thinking", "filter",
    "extract.keep_activations",
)  # fmt: skip
def compute(
    ctx: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run of `pvec extract`.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose scores of the run count, if several judged it."),
    ] = None,
    pos: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Judged answers that show the trait.")
    ] = None,
    neg: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Judged answers that do not.")
    ] = None,
    trait: Annotated[
        str | None,
        typer.Option("--trait", "-t", metavar="COLUMN", help="The column of the trait's score."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            metavar="NAME",
            help="How it is estimated: mean_diff, caa, pca, lda or logistic (docs/methods.md).",
        ),
    ] = MEAN_DIFF,
    out: Out = None,
) -> None:
    """Compute a vector from a judged run, or from judged answers in two CSV files.

    The files have the columns prompt (the rendered chat template), answer, TRAIT and coherence, as
    the reference implementation writes them. Under `accelerate launch` the processes share the
    work.
    """
    from pvec.extraction import compute as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    if run is not None:
        if pos or neg or trait:
            raise InputError("Give either a run, or --pos, --neg and --trait.")
        if not _names_model(ctx):
            settings = workflow.with_model_of(settings, run)
        work = partial(workflow.from_run, settings, run, judge=judge, out=out, method=method)
    elif pos and neg and trait:
        work = partial(workflow.from_csv, settings, pos, neg, trait=trait, out=out, method=method)
    else:
        raise InputError(
            "Say what to compute from: a run folder, or --pos CSV --neg CSV --trait COLUMN."
        )
    result = console.call(work)
    if result is not None:  # None in all processes of a launch but one
        console.emit(result, render_computed)


@app.command()
@options("model", "backend", "generation", "extract.rollouts", "extract.limit")
def calibrate(
    ctx: typer.Context,
    file: VectorFile,
    trait: Annotated[
        str | None,
        typer.Option(
            "--trait", "-t", metavar="NAME|FILE", help="Whose questions (default: the vector's)."
        ),
    ] = None,
) -> None:
    """Measure where unsteered answers lie on a vector, for ceilings such as `--coef p25`.

    The model answers the trait's extraction questions without instruction or steering. The
    percentiles of the answers' projections at every layer are added to the file.
    """
    from pvec.extraction.calibrate import calibrate

    settings, console = settings_from(ctx), console_from(ctx)
    own = not _names_model(ctx)
    result = console.call(partial(calibrate, settings, file, trait=trait, own_model=own))
    console.emit(result, render_calibrated)


@app.command()
@options()
def show(
    ctx: typer.Context,
    files: VectorFiles,
    kind: Kind = None,
    num_layers: NumLayers = None,
    layer: SingleLayer = None,
    png: Png = None,
    svg: Svg = None,
) -> None:
    """Show norms, separation and stability of vectors by layer, and the suggested layer."""
    from pvec.vectors.files import labels, load_vectors
    from pvec.vectors.show import describe

    vectors = load_vectors(files, num_layers=num_layers, layer=layer)
    described = [describe(path, vector, kind=kind) for path, vector in vectors.items()]
    if png or svg:
        from pvec.report.vectors import layer_figure, write_figure

        names = labels(vectors)
        lines = [(names[path], vector, described[0].kind) for path, vector in vectors.items()]
        figure = layer_figure(lines, title=f"{described[0].kind} by layer")
        write_figure(figure, png=png, svg=svg)
    console_from(ctx).emit(described, render_descriptions)


@app.command()
@options()
def compare(
    ctx: typer.Context,
    files: VectorFiles,
    by: Annotated[
        Literal["file", "kind", "layer"],
        typer.Option(metavar="WHAT", help="What is compared: file, kind or layer."),
    ] = "file",
    methods: Annotated[
        bool,
        typer.Option(
            "--methods",
            help="Compare methods of estimating a vector, on a run with --keep-activations.",
        ),
    ] = False,
    kind: Kind = None,
    layer: Layer = None,
    png: Png = None,
    svg: Svg = None,
) -> None:
    """Show the cosines between traits, kinds, layers, or models of one width.

    Files and kinds are compared at one layer, by default at 55 % of the depth. With --methods the
    file is a run: how well the vector of each method separates held-out answers, how stable it is,
    and its cosine to the mean difference.
    """
    from pvec.vectors import show
    from pvec.vectors.files import load_all_kinds, load_vectors

    if methods:
        if len(files) != 1 or by != "file" or png or svg:
            raise InputError("--methods takes one run and neither --by, --png nor --svg.")
        _compare_methods(console_from(ctx), files[0], kind=kind or "response_avg", layer=layer)
        return
    vectors = load_vectors(files, layer=layer, notify=console_from(ctx).note)
    if by == "kind":
        vectors = {path: load_all_kinds(path, vector) for path, vector in vectors.items()}
    result = show.compare(vectors, by=by, kind=kind or "response_avg", layer=layer)
    if png or svg:
        from pvec.report.vectors import cosine_figure, write_figure

        write_figure(cosine_figure(result.labels, result.cosines), png=png, svg=svg)
    console_from(ctx).emit(result, render_cosines)


@app.command()
@options()
def combine(
    ctx: typer.Context,
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="Such as `0.7*evil + 0.3*humorous`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where it is written.")],
    orthogonalize_against: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Take away what lies along this vector; repeatable."),
    ] = None,
    incremental: Annotated[
        bool,
        typer.Option(
            "--incremental",
            help="Make every row its increase over the layer before (appendix J.3).",
        ),
    ] = False,
    trait: Annotated[
        str | None, typer.Option("--trait", "-t", metavar="NAME", help="What it is called.")
    ] = None,
) -> None:
    """Make a vector from vectors of one model: sums, differences, orthogonal parts, increments.

    Terms are file names with or without a factor; + and - between them have spaces around.
    """
    from pvec.vectors import edit

    result = edit.combine(
        expression,
        out=out,
        orthogonal_to=orthogonalize_against or (),
        incremental=incremental,
        trait=trait,
    )
    console_from(ctx).emit(result, render_files)


@app.command()
@options("model")
def lens(
    ctx: typer.Context,
    file: VectorFile,
    layer: Layer = None,
    kind: Kind = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens on each side.")] = 10,
) -> None:
    """Show the tokens that a vector promotes and suppresses.

    The vector is read through the model's final norm and unembedding, as if it were the last
    residual stream; scores are logits above the mean of the vocabulary.
    """
    from pvec.backends.session import ModelSession, model_spec
    from pvec.extraction.calibrate import with_model_of_vector
    from pvec.models.load import load_model
    from pvec.vectors import lens
    from pvec.vectors.files import load_vectors

    settings, console = settings_from(ctx), console_from(ctx)
    (vector,) = load_vectors([file], layer=layer).values()
    if not _names_model(ctx):
        settings = with_model_of_vector(settings, vector)
    with ModelSession(settings, notify=console.note) as session:
        (vector,) = load_vectors(
            [file], model=session.metadata, same_model=False, layer=layer, notify=console.note
        ).values()
        # always through transformers: an engine for serving does not hand out its modules
        model = load_model(model_spec(settings), metadata=session.metadata)
    result = lens.lens(vector, model, layer=layer, kind=kind, top=top)
    console.emit(result, render_lens)


@app.command()
@options()
def convert(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="IN", help="A vector file.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A .safetensors, .pt or .gguf file, or a folder (.pt)."),
    ],
    kind: Kind = None,
    model_hint: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Architecture in llama.cpp's words (GGUF): qwen2, …"),
    ] = None,
    num_layers: NumLayers = None,
    layer: SingleLayer = None,
) -> None:
    """Convert between pvec's files, the reference's .pt and GGUF control vectors."""
    from pvec.vectors import edit

    result = edit.convert(
        source, target, kind=kind, model_hint=model_hint, num_layers=num_layers, layer=layer
    )
    console_from(ctx).emit(result, render_files)


def _compare_methods(console: Console, run: Path, *, kind: VectorKind, layer: int | None) -> None:
    from pvec.extraction.methods import compare_methods

    with console.progress() as on_progress:
        result = compare_methods(run, kind=kind, layer=layer, on_progress=on_progress)
    console.emit(result, render_methods)


def _names_model(ctx: typer.Context) -> bool:
    """Whether anybody set the model; it is the vector's or the run's otherwise."""
    origins = resolved_from(ctx).origins
    return any(origins[path] != "default" for path in ("model.id", "model.adapter"))

"""``pvec vector bake``, ``find`` and ``decompose``: vectors in weights and among features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import (
    Kind,
    Layer,
    VectorFile,
    VectorFiles,
    console_from,
    new_app,
    options,
    settings_from,
)

if TYPE_CHECKING:
    from pvec.evaluation.bake import BakeResult
    from pvec.projection.weight_change import FoundVector, WeightChange
    from pvec.vectors.decompose import Decomposition

app = new_app()

MOST_SHOWN = 16
"""Rows of a table; the others are in ``--json``."""


@app.command()
@options(
    "model",
    "steer.kind",
    "steer.layer",
    "steer.coef",
    "steer.coef_unit",
    "steer.incremental",
)
def bake(
    ctx: typer.Context,
    files: VectorFiles,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the new model.")
    ],
) -> None:
    """Write a model that is steered by its weights: the vectors are added at every token.

    Give one --layer (20, 3+4 or all) and one --coef. The vector becomes a bias of the layer's last
    projection, in architectures that can have one (Llama and its like, GPT-2, GPT-NeoX, …); Qwen2
    and Mistral are written as Llama. The new model is loaded again and kept only if its logits are
    those of the steered model.
    """
    from pvec.evaluation import bake as workflow

    console = console_from(ctx)
    result = workflow.run(settings_from(ctx), files, out=out, notify=console.note)
    console.emit(result, _render_bake)


@app.command()
@options("model", "generation.seed")
def find(
    ctx: typer.Context,
    files: VectorFiles,
    finetuned: Annotated[
        str,
        typer.Option(
            "--in", metavar="MODEL", help="The changed model, or an adapter of --model, the base."
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", "-l", metavar="N", help="Look for this layer's vector in every block."
        ),
    ] = None,
    kind: Kind = None,
) -> None:
    """Look for known vectors in the difference of two checkpoints' weights.

    For every projection that writes to the residual stream: which share of its change writes along
    the vector, beside 999 random directions that the base model's weight writes. A bias also tells
    the coefficient. How far activations moved is `pvec shift`.
    """
    from pvec.projection import weight_change as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    result = workflow.run(
        settings,
        finetuned,
        files,
        kind=kind,
        layer=layer,
        seed=settings.generation.seed,
        notify=console.note,
    )
    console.emit(result, _render_change)


@app.command()
@options()
def decompose(
    ctx: typer.Context,
    file: VectorFile,
    sae: Annotated[
        str,
        typer.Option(
            "--sae", metavar="DIR|RELEASE:ID", help="A folder of SAELens, or a pretrained one."
        ),
    ],
    layer: Layer = None,
    kind: Kind = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Features to show.")] = 10,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON with texts by feature (default: labels.json)."),
    ] = None,
) -> None:
    """Show the features of a sparse autoencoder that are nearest to a vector.

    Nearest are the decoder directions with the largest absolute cosines (appendix M), beside those
    of random directions. The layer is that of the autoencoder; pretrained ones (RELEASE:ID) need
    `pip install '.[sae]'`.
    """
    from pvec.vectors.decompose import decompose as decompose_vector
    from pvec.vectors.decompose import open_autoencoder
    from pvec.vectors.files import load_vectors

    console = console_from(ctx)
    (vector,) = load_vectors([file], layer=layer, notify=console.note).values()
    opened = open_autoencoder(sae, labels=labels)
    result = decompose_vector(vector, opened, layer=layer, kind=kind, top=top)
    console.emit(result, _render_decomposition)


def _render_decomposition(console: Console, result: Decomposition) -> None:
    console.print(
        f"{result.trait} {result.kind} at {result.where}: the nearest of {result.of:,} features of "
        f"{result.sae}"
    )
    labelled = any(feature.label for feature in result.features)
    rows = [
        (f.number, f"{f.cosine:+.3f}", *((f.label,) if labelled else ())) for f in result.features
    ]
    console.print(table(("feature", "cosine", *(("label",) if labelled else ())), rows))
    console.sentence(
        f"Together they hold {result.explained:.0%} of the vector's square; the nearest feature of "
        f"a random direction has a cosine of {result.random:.2f}."
    )
    if result.page:
        console.print(f"features: {result.page}/NUMBER")
    for note in result.notes:
        console.note(note)


def _render_bake(console: Console, result: BakeResult) -> None:
    where = "layer" if len(result.layers) == 1 else "layers"
    console.print(
        f"{result.out}: {result.model} as {result.architecture} ({result.dtype}), steered by its "
        f"weights at {where} {', '.join(map(str, result.layers))}"
    )
    console.sentence(
        f"Its logits at {result.tokens} tokens differ from those under steering by "
        f"{result.error:.2g} (root mean square; at most {result.largest_error:.2g}), where "
        f"steering changes them by {result.effect:.3g}; the most likely next token is the same at "
        f"{result.same_top:.0%}."
    )


def _render_change(console: Console, result: WeightChange) -> None:
    console.print(
        f"{result.finetuned} − {result.base}: {result.changed} of {result.tensors} tensors "
        f"changed; {result.searched:.0%} of the squared change is in projections to the residual "
        f"stream, which were searched"
    )
    shown = sorted(result.found, key=_times, reverse=True)[:MOST_SHOWN]
    several = len({found.vector for found in result.found}) > 1
    rows = [
        (
            *((found.vector,) if several else ()),
            found.layer,
            found.tensor.removesuffix(".weight").replace(".bias", " bias"),
            f"{found.change:.2g}",
            f"{found.share:.2%}",
            f"{_times(found):.1f}",
            f"{found.above:.1%}",
            "" if found.coef is None else f"{found.coef:.3g}",
        )
        for found in sorted(shown, key=lambda f: (f.vector, f.layer, f.tensor))
    ]
    head = ("layer", "projection", "change", "share", "× random", "above", "coef")
    console.print(table((*(("vector",) if several else ()), *head), rows))
    if len(shown) < len(result.found):
        console.note(f"the {len(shown)} strongest of {len(result.found)} rows; all: --json")
    top = sum(found.above == 1.0 for found in result.found)
    console.sentence(
        f"{top} of {len(result.found)} lie above all random directions; by chance that would be "
        f"{result.chance:.2g}."
    )


def _times(found: FoundVector) -> float:
    return found.share / found.control if found.control else 0.0

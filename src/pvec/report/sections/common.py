"""What the sections of all kinds of runs share: the run, and numbers as they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from pvec.judges.prompts import score_meaning
from pvec.report.axes import Reference, Scale, XAxis
from pvec.report.figure import interval_text
from pvec.report.style import number
from pvec.runs.names import model_label
from pvec.runs.secrets import safe_command, without_secrets
from pvec.runs.store import Run
from pvec.stats import FEW_PAIRS, Interval

_LEFT_OUT = {"format", "format_version", "settings", "sessions"}

Summary = Mapping[str, Any]
"""What a command left in ``summary.json``, of a checked shape."""

NUMBER = (float, NoneType)
MEAN = {"mean": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
R = {"r": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
PLACE = {"vector": str, "layer": int}
"""Shapes of what summaries hold."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run to be shown, and the judge whose scores count (None: it has no scores).

    ``everything``: data too large for one page goes into files beside it.
    """

    run: Run
    judge: str | None
    everything: bool = False

    @property
    def kind(self) -> str:
        """What made the run."""
        return self.run.kind

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def trait(self) -> str:
        """The trait that the run is about."""
        return str(self.run.manifest["identity"]["trait"])

    @property
    def model(self) -> str:
        """The model that answered, with its adapter."""
        identity = self.run.manifest["identity"]
        adapter = f" + {model_label(identity['adapter'])}" if identity.get("adapter") else ""
        return f"{Path(identity['model']).name}{adapter}"

    @cached_property
    def id(self) -> str:
        """An id for links and file names, from the folder's name."""
        return re.sub(r"[^\w-]+", "-", self.path.resolve().name).strip("-") or "run"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The resolved settings that the run was made with, as JSON."""
        found: Mapping[str, Any] = self.run.manifest.get("settings", {})
        return found

    @property
    def source(self) -> str:
        """Model, run and date, for the footer of an exported figure."""
        date = (
            str(self.run.manifest["sessions"][-1]["started"])[:10]
            if (self.run.manifest["sessions"])
            else ""
        )
        return " · ".join(filter(None, (self.model, f"run {self.path.resolve().name}", date)))

    def projection_axis(
        self, label: str, vector: str, layer: int, *, of: Literal["response", "prompt"] | None
    ) -> XAxis:
        """Return the axis of projections on a vector at a layer: a second scale in mean residual
        norms, and where the extraction's answers or prompts lie (None: of differences, nowhere).
        """
        known = self.run.manifest.get("projection_axes", {}).get(f"{vector}_layer{layer}", {})
        words = {"neg": "negative", "pos": "positive"}
        places = {word: known.get(f"proj_{of}_{sign}") for sign, word in words.items()}
        norm = known.get("residual_norm")
        return XAxis(
            label=label,
            references=[Reference(x=x, label=w) for w, x in places.items() if x is not None],
            top=Scale(label="in mean residual norms", factor=1 / norm) if norm else None,
        )

    def provenance(self) -> tuple[tuple[str, str], ...]:
        """Return what the manifest says, flat: identity, model, versions, commands, timings."""
        manifest = without_secrets(self.run.manifest)  # one of an older pvec may hold some
        rows = [("folder", str(self.path)), ("judge", self.judge or "none")]
        if self.judge is not None:
            rows.append(("scores", score_meaning(self.judge)))
        rows += _flat({k: v for k, v in manifest.items() if k not in _LEFT_OUT})
        for place, session in enumerate(manifest["sessions"], start=1):
            rows.append((f"session {place}", _session(session)))
        rows += _flat({"settings": manifest.get("settings", {})})
        return tuple(rows)


def listed(names: Iterable[str]) -> str:
    """Return ``evil, kind and optimistic``: every name once."""
    known = list(dict.fromkeys(names))
    return " and ".join(filter(None, (", ".join(known[:-1]), known[-1])))


def with_interval(score: Interval) -> str:
    """Return ``71.3 (68.0 to 74.1)``, ``71.3`` without an interval, or ``no score``."""
    return "no score" if math.isnan(score.mean) else interval_text(score, 1)


def interval_of(value: Summary) -> Interval:
    """Return a stored mean with its interval; what is not known is NaN."""
    mean, low, high = (
        math.nan if value[part] is None else float(value[part]) for part in ("mean", "low", "high")
    )
    return Interval(mean=mean, low=low, high=high, n=value["n"], groups=value["n"])


def correlation_text(value: Summary) -> str:
    """Return ``0.71 (0.60 to 0.79, n = 40)``; of fewer than ``FEW_PAIRS`` only their n."""
    count = f"n = {value['n']:,}"
    r, low = (math.nan if value[part] is None else value[part] for part in ("r", "low"))
    if math.isnan(r) or value["n"] < FEW_PAIRS:
        return f"not given ({count})"
    ends = "" if math.isnan(low) else f"{number(low, 2)} to {number(value['high'], 2)}, "
    return f"{'> 0.99' if 0.995 <= r < 1 else number(r, 2)} ({ends}{count})"


def _session(session: Mapping[str, Any]) -> str:
    command = " ".join(safe_command([str(word) for word in session["command"]]))
    ended = session.get("ended") or "not finished"
    timings = ", ".join(f"{k} {v:g} s" for k, v in (session.get("timings") or {}).items())
    return f"{session['started']} to {ended}: {command}" + (f" [{timings}]" if timings else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif value is not None and value != []:
            yield name, str(value)

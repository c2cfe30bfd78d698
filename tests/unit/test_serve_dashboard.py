"""The Grafana dashboard asks for metrics that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pvec.serve.metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "examples" / "serve" / "grafana.json"


def test_every_metric_of_the_dashboard_exists_with_its_labels() -> None:
    metrics = Metrics(running=lambda: 0, waiting=lambda: 0)
    metrics.projection("tiny", "evil", of="answer", value=0.1)
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)", metrics.text().decode(), re.MULTILINE))
    asked = " ".join(
        target["expr"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
    )
    names = set(re.findall(r"pvec_\w+", asked))
    assert len(names) >= 10
    for name in names:
        if name.endswith("_bucket"):
            assert types.get(name.removesuffix("_bucket")) == "histogram", name
        else:
            assert types.get(name) in ("counter", "gauge"), name
    assert 'pvec_projection_bucket{le="0.1",model="tiny",of="answer",vector="evil"} 1.0' in (
        metrics.text().decode()
    )

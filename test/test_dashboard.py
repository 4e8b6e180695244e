"""The Grafana dashboard asks for series that exist."""

from __future__ import annotations

import json
import re

from nv_embed.metrics import Metric
from serving import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "nv-embed-v2.json").read_text(encoding="utf-8"))


def test_every_expression_is_about_series_that_exist():
    names = {metric.metric_name for metric in Metric}
    for metric in Metric:
        if metric.kind == "histogram":
            names |= {f"{metric.metric_name}_{part}" for part in ("bucket", "sum", "count")}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"nv_embed_\w+", expression)}
    assert asked <= names


def test_every_metric_is_on_the_dashboard():
    shown = json.dumps(DASHBOARD)
    for metric in Metric:
        assert metric.metric_name in shown

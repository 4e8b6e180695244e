"""The Grafana dashboard is one to Grafana, and asks for series that exist."""

from __future__ import annotations

import json
import re

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from nv_embed.metrics import Metric
from serving import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "helm" / "nv-embed" / "files" / "dashboard.json").read_text(encoding="utf-8"))


def test_it_keeps_to_the_types_of_grafana():
    register_default_plugins()  # of panels and queries
    understood = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert_within(DASHBOARD, understood, "dashboard")


def assert_within(ours, theirs, place):
    """What Grafana does not know it would not give back, or not as it was."""
    if isinstance(ours, dict):
        assert set(ours) <= set(theirs), place
        for key, value in ours.items():
            assert_within(value, theirs[key], f"{place}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), place
        for index, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_within(value, other, f"{place}[{index}]")
    else:
        assert ours == theirs, place


def test_every_expression_is_about_series_that_exist():
    names = {metric.metric_name for metric in Metric}
    for metric in Metric:
        if metric.kind == "histogram":
            names |= {f"{metric.metric_name}_{part}" for part in ("bucket", "sum", "count")}
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for expression in expressions:
        assert expression.count("nv_embed_") == expression.count('{instance=~"$instance",model=~"$model"}'), expression
    asked = {name for expression in expressions for name in re.findall(r"nv_embed_\w+", expression)}
    assert asked <= names


def test_every_metric_is_on_the_dashboard():
    shown = json.dumps(DASHBOARD)
    for metric in Metric:
        assert metric.metric_name in shown

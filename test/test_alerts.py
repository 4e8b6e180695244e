"""The alert rules ring when they should and are silent otherwise, and the query that scales counts seconds of work.

Prometheus' own promtool computes them from made-up series.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from chart import CHART, one, render, tool
from nv_embed.metrics import Metric

pytestmark = pytest.mark.slow
RULES = CHART / "files" / "alerts.yaml"
ALERTS = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]
}
MINUTES = 120


def series(name, first, step, **labels):
    """A series of one value a minute."""
    labels = {
        "model": "nv-embed-v2",
        "instance": "10.0.0.1:8002",
        "namespace": "search",
        "service": "nv-embed",
    } | labels
    text = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"nv_embed_{name}{{{text}}}", "values": f"{first}{step:+g}x{MINUTES}"}


ALL_IS_WELL = [
    series("requests_total", 0, 600, kind="query", outcome="ok"),
    series("requests_total", 0, 3, kind="query", outcome="Unavailable"),
    series("requests_total", 0, 0, kind="documents", outcome="ComputeFailed"),
    series("request_seconds_total", 0, 60, kind="query"),
    series("tokens_total", 0, 60 * 10_000),
    series("queue_tokens", 100_000, 0),
    series("out_of_memory_total", 0, 0),
]
RINGS = {
    "NVEmbedRequestsFail": [series("requests_total", 0, 12, kind="documents", outcome="ComputeFailed")],
    "NVEmbedRequestsRefused": [series("requests_total", 0, 12, kind="query", outcome="Unavailable")],
    "NVEmbedQueriesSlow": [series("request_seconds_total", 0, 1200, kind="query")],
    "NVEmbedBacklog": [series("queue_tokens", 1_000_000, 0)],
    "NVEmbedStuck": [series("tokens_total", 5, 0)],
    "NVEmbedOutOfMemory": [series("out_of_memory_total", 0, 1)],
    "NVEmbedRestarts": [{**series("tokens_total", 0, 0), "values": "0+600000x14 " * 8}],
}


def instead(changed):
    """All is well but for these series."""
    names = {one_series["series"] for one_series in changed}
    return [one_series for one_series in ALL_IS_WELL if one_series["series"] not in names] + changed


def assert_promtool_agrees(tmp_path, input_series, expected, minutes=MINUTES):
    """`expected`: what PromQL gives at that time."""
    case = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": input_series,
                "promql_expr_test": [
                    {"expr": expression, "eval_time": f"{minutes}m", "exp_samples": samples}
                    for expression, samples in expected.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(case), encoding="utf-8")
    command = [tool("bin/promtool"), "test", "rules", tmp_path / "test.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def firing(*alerts):
    return {
        'count by (alertname) (ALERTS{alertstate="firing"})': [
            {"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts
        ]
    }


def test_promtool_accepts_the_rules():
    done = subprocess.run([tool("bin/promtool"), "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_rings_while_all_is_well(tmp_path):
    assert_promtool_agrees(tmp_path, ALL_IS_WELL, firing())


@pytest.mark.parametrize("alert", RINGS)
def test_each_alert_rings_alone_for_what_it_is_about(tmp_path, alert):
    others = {"NVEmbedStuck": ["NVEmbedBacklog"]}  # what is stuck is a backlog without an end, too
    assert_promtool_agrees(tmp_path, instead(RINGS[alert]), firing(*sorted([alert, *others.get(alert, [])])))


def test_an_alert_rings_if_there_is_no_server(tmp_path):
    assert_promtool_agrees(tmp_path, [], firing("NVEmbedAbsent"))
    assert set(RINGS) | {"NVEmbedAbsent"} == set(ALERTS)


def test_alerts_ask_for_series_that_exist_and_say_what_was_expected():
    known = {metric.metric_name for metric in Metric}
    for name, rule in ALERTS.items():
        assert set(re.findall(r"nv_embed_\w+", rule["expr"])) <= known, name
        assert rule["annotations"]["description"].startswith("Expected "), name
        assert rule["labels"]["severity"] in ("warning", "critical"), name


def scaling_query(**scaling):
    (trigger,) = one(render({"scaling": {"enabled": True, **scaling}}), "ScaledObject")["spec"]["triggers"]
    assert trigger["metricType"] == "AverageValue"
    return trigger["metadata"]["query"]


TWO_SERVERS = [
    series(name, first, step, instance=f"10.0.0.{number}:8002")
    for number in (1, 2)
    for name, first, step in (("queue_tokens", 100_000, 0), ("tokens_total", 0, 60 * 10_000))
]
ANOTHER_RELEASE = [
    series("queue_tokens", 9_000_000, 0, service="other"),
    series("tokens_total", 0, 60, service="other"),
]


def test_scaling_counts_the_seconds_that_one_server_would_need_for_all_that_waits(tmp_path):
    given, measured = scaling_query(tokensPerSecond=16_000), scaling_query()
    expected = {given: [{"labels": "{}", "value": 200_000 / 16_000}], measured: [{"labels": "{}", "value": 20}]}
    assert_promtool_agrees(tmp_path, TWO_SERVERS + ANOTHER_RELEASE, expected)


def test_scaling_remembers_what_a_server_computed_when_it_was_last_busy(tmp_path):
    quiet_then_waiting = [
        series("queue_tokens", 50_000, 0),
        {**series("tokens_total", 0, 0), "values": "0+600000x60 36000000+600x59"},
    ]
    assert_promtool_agrees(tmp_path, quiet_then_waiting, {scaling_query(): [{"labels": "{}", "value": 5}]})


@pytest.mark.parametrize("computed_per_minute", [0, 600_000])
def test_scaling_counts_nothing_while_nothing_waits(tmp_path, computed_per_minute):
    idle = [series("queue_tokens", 0, 0), series("tokens_total", 0, computed_per_minute)]
    assert_promtool_agrees(tmp_path, idle, {scaling_query(): [{"labels": "{}", "value": 0}]})
    assert_promtool_agrees(tmp_path, [], {scaling_query(): [{"labels": "{}", "value": 0}]})

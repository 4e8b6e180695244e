"""KServe's resources in deploy/kserve: their fields exist, and the server runs as the chart runs it."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from chart import GPU_VALUES, pod_of, render, tool
from serving import ROOT

pytestmark = pytest.mark.slow
RUNTIME, SERVICE = (
    yaml.safe_load((ROOT / "deploy" / "kserve" / f"{name}.yaml").read_text("utf-8"))
    for name in ("serving-runtime", "inference-service")
)
PRIMITIVES = {"str": str, "int": int, "bool": bool}


@cache
def declarations(folder: Path) -> dict[str, dict[str, str]]:
    """Of KServe's Python package: the fields of each class with their types."""
    classes = {}
    for path in folder.glob("v1*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                given = {
                    each.targets[0].id: ast.literal_eval(each.value)
                    for each in node.body
                    if isinstance(each, ast.Assign) and each.targets[0].id in ("openapi_types", "attribute_map")
                }
                classes[node.name] = {
                    given["attribute_map"][name]: kind for name, kind in given["openapi_types"].items()
                }
    return classes


def faults(value, kind: str, path: str):
    """What KServe does not declare so. Types of Kubernetes itself are checked by its own schemas, below."""
    classes = declarations(tool("kserve"))
    if listed := re.fullmatch(r"list\[(.*)\]", kind):
        for number, item in enumerate(value):
            yield from faults(item, listed[1], f"{path}[{number}]")
    elif kind in PRIMITIVES:
        if type(value) is not PRIMITIVES[kind]:
            yield f"{path}: expected {kind}, got {value!r}"
    elif kind in classes:
        for name, below in value.items():
            if name not in classes[kind]:
                yield f"{path}.{name}: unknown"
            else:
                yield from faults(below, classes[kind][name], f"{path}.{name}")


def test_every_field_is_one_of_kserve_s():
    assert list(faults(RUNTIME, "V1alpha1ServingRuntime", "runtime")) == []
    assert list(faults(SERVICE, "V1beta1InferenceService", "service")) == []
    wrong = {"spec": {"predictor": {"minReplicas": "1", "model": {"modelFormat": {"nam": "x"}}}}}
    assert len(list(faults(wrong, "V1beta1InferenceService", "service"))) == 2  # so it can fail


def merged_pod() -> dict:
    """The pod that KServe makes of both, as far as they say."""
    predictor = dict(SERVICE["spec"]["predictor"])
    model = predictor.pop("model")
    for name in ("minReplicas", "deploymentStrategy"):
        predictor.pop(name)
    (container,) = RUNTIME["spec"]["containers"]
    resources = {
        kind: container["resources"].get(kind, {}) | model["resources"].get(kind, {}) for kind in ("requests", "limits")
    }
    return predictor | {"containers": [container | {"resources": resources}], "volumes": RUNTIME["spec"]["volumes"]}


def test_what_is_kubernetes_own_in_them_is_valid(tmp_path):
    labels = {"app": "nv-embed"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "nv-embed"},
        "spec": {
            "selector": {"matchLabels": labels},
            "strategy": SERVICE["spec"]["predictor"]["deploymentStrategy"],
            "template": {"metadata": {"labels": labels}, "spec": merged_pod()},
        },
    }
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(deployment), encoding="utf-8")
    command = [tool("venv/bin/kubernetes-validate"), "--strict", "-k", "1.34", tmp_path / "deployment.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr


def test_the_service_names_the_runtime_and_a_format_that_it_supports():
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert any(
        model["modelFormat"].items() <= supported.items() for supported in RUNTIME["spec"]["supportedModelFormats"]
    )
    assert RUNTIME["spec"]["containers"][0]["name"] == "kserve-container"  # which KServe gives the model to


def test_the_server_runs_as_in_the_chart():
    ours, theirs = merged_pod(), pod_of(render(GPU_VALUES | {"weights": {"claim": "nv-embed-weights"}}))
    for name in ("securityContext", "terminationGracePeriodSeconds", "tolerations", "enableServiceLinks"):
        assert ours[name] == theirs[name], name
    (ours,), (theirs,) = ours["containers"], theirs["containers"]
    for name in ("lifecycle", "securityContext", "resources"):
        assert ours[name] == theirs[name], name
    ports = {port["name"]: port["containerPort"] for port in theirs["ports"]}
    assert {port["name"]: port["containerPort"] for port in ours["ports"]} == ports
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        theirs[name]["httpGet"]["port"] = ports[theirs[name]["httpGet"]["port"]]
        assert ours[name] == theirs[name], name
    mounts = [mount for mount in theirs["volumeMounts"] if mount["name"] != "weights"]  # KServe mounts those itself
    assert ours["volumeMounts"] == mounts
    assert {"name": "NV_EMBED_MODEL_PATH", "value": "/mnt/models"} in ours["env"]

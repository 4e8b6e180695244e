"""The Helm chart rendered, and the tools that test/kubernetes_tools.sh fetches."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import ROOT

CHART = ROOT / "deploy" / "helm" / "nv-embed"
GPU_VALUES = yaml.safe_load((CHART / "values-gpu.yaml").read_text(encoding="utf-8"))
TOOLS = ROOT / ".cache" / "kubernetes"
HELMS = ("bin/helm3", "bin/helm4")
Manifest = dict[str, Any]
TLS = {"tls": {"secret": "server-tls"}}
MUTUAL_TLS = {"tls": {"secret": "server-tls", "demandClientCertificates": True, "clientSecret": "client-tls"}}
MONITORING = {
    "monitoring": {"serviceMonitor": True, "alerts": True, "dashboard": True, "labels": {"release": "prometheus"}}
}
GATEWAY = {"gateway": {"enabled": True, "apiKeySecret": "keys", "arguments": ["--alias=a=Instruct: b\\nQuery: "]}}
USES = {
    "the small checkpoint on a CPU": {},
    "a GPU and weights of a claim": GPU_VALUES | {"weights": {"claim": "weights", "path": "NV-Embed-v2"}},
    "two GPUs, weights of an image and several servers": GPU_VALUES
    | {"gpus": 2, "replicas": 3, "weights": {"image": "registry.example/nv-embed-v2-weights:1"}},
    "another model on a CPU": {"modelName": "all-MiniLM-L6-v2", "weights": {"claim": "models", "path": "minilm"}},
    "TLS": TLS,
    "the gateway": GATEWAY,
    "the gateway behind mutual TLS": GATEWAY | MUTUAL_TLS,
    "scaling and monitoring": MONITORING | {"scaling": {"enabled": True, "tokensPerSecond": 16000}},
    "everything": GPU_VALUES | GATEWAY | MUTUAL_TLS | MONITORING | {
        "weights": {"claim": "weights"},
        "settings": {"max_queue_tokens": 4_000_000, "dtype": "int8", "query_prompt": "search: "},
        "env": [{"name": "OMP_NUM_THREADS", "value": "4"}],
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "batch", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "podLabels": {"team": "search"},
        "podAnnotations": {"team": "search"},
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "maxConnectionSeconds": 30,
        "adminKeySecret": "keys",
        "networkPolicy": {"enabled": True},
        "tracing": {"url": "http://collector:4318/v1/traces", "rate": 100},
        "scaling": {"enabled": True},
    },
}  # fmt: skip


def tool(name: str) -> Path:
    """Its path; skips the test if it was not fetched."""
    if not (TOOLS / name).exists():
        pytest.skip(f"needs {name}: test/kubernetes_tools.sh fetches it, or says why it cannot")
    return TOOLS / name


def helm(
    *arguments: str, values: Mapping[str, Any] | None = None, which: str = HELMS[-1]
) -> subprocess.CompletedProcess[str]:
    """Runs Helm with values as a file of the user's would give them."""
    return subprocess.run(
        [tool(which), *arguments, "--values", "-"], input=yaml.safe_dump(dict(values or {})),
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def render(values: Mapping[str, Any] | None = None, which: str = HELMS[-1], name: str = "nv-embed") -> list[Manifest]:
    """What `helm install NAME` would create in the namespace `search`."""
    done = helm("template", name, str(CHART), "--namespace", "search", values=values, which=which)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def one(manifests: list[Manifest], kind: str, name: str = "nv-embed") -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def pod_of(manifests: list[Manifest], name: str = "nv-embed") -> Manifest:
    """The pod's spec in a Deployment."""
    return one(manifests, "Deployment", name)["spec"]["template"]["spec"]


def variables_of(container: Manifest) -> dict[str, str | None]:
    """A container's environment; None for what a Secret holds."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}

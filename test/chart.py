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

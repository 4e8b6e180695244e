"""What the chart renders holds together, in ways that no schema sees: selectors, volumes, ports, probes, rights."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from chart import CHART, GPU_VALUES, USES, one, pod_of, render, variables_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rendered():
    return {use: render(values) for use, values in USES.items()}


@pytest.fixture(params=USES)
def manifests(rendered, request):
    return rendered[request.param]


def pods(manifests):
    """(labels, spec) of all that become pods."""
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            template = manifest["spec"]["template"]
            yield template["metadata"]["labels"], template["spec"]
        if manifest["kind"] == "Pod":
            yield manifest["metadata"]["labels"], manifest["spec"]


def selectors(manifest):
    """Labels by which an object finds pods of this chart."""
    match manifest["kind"]:
        case "Service":
            return [manifest["spec"]["selector"]]
        case "Deployment" | "PodDisruptionBudget":
            return [manifest["spec"]["selector"]["matchLabels"]]
        case "NetworkPolicy":
            return [manifest["spec"]["podSelector"]["matchLabels"]]
    return []


def test_each_selector_finds_the_pods_of_one_part(manifests):
    for manifest in manifests:
        for selector in selectors(manifest):
            found = [labels for labels, _ in pods(manifests) if selector.items() <= labels.items()]
            assert len(found) == 1, manifest["metadata"]["name"]
    for manifest in (
        m for m in manifests if m["kind"] == "Deployment" and "affinity" not in m["spec"]["template"]["spec"]
    ):
        for spread in manifest["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert spread["labelSelector"] == manifest["spec"]["selector"]


def test_two_releases_in_a_namespace_share_neither_names_nor_selectors():
    one_release, other = render(USES["everything"], name="a"), render(USES["everything"], name="b")
    names = [{(m["kind"], m["metadata"]["name"]) for m in manifests} for manifests in (one_release, other)]
    assert not names[0] & names[1]
    for manifest in one_release:
        for selector in selectors(manifest):
            assert not any(selector.items() <= labels.items() for labels, _ in pods(other))


def test_names_stay_within_what_kubernetes_accepts_with_the_longest_release_name():
    for manifest in render(USES["everything"], name="r" * 53):
        assert len(manifest["metadata"]["name"]) <= 63
        for value in manifest["metadata"]["labels"].values():
            assert len(value) <= 63


def test_every_mount_has_its_volume_and_every_volume_its_mount(manifests):
    for _, spec in pods(manifests):
        mounted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in spec.get("volumes", [])}


def test_ports_have_names_of_at_most_15_characters_that_services_probes_and_monitors_use(manifests):
    for manifest in (m for m in manifests if m["kind"] == "Service"):
        (spec,) = (spec for labels, spec in pods(manifests) if manifest["spec"]["selector"].items() <= labels.items())
        ports = {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}
        assert all(re.fullmatch(r"[a-z](-?[a-z0-9]){,14}", name) for name in ports)
        for port in manifest["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    for _, spec in pods(manifests):
        for container in spec["containers"]:
            names = {port["name"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in container.get(probe, {}):
                    assert container[probe]["httpGet"]["port"] in names
    for monitor in (m for m in manifests if m["kind"] == "ServiceMonitor"):
        selected = monitor["spec"]["selector"]["matchLabels"].items()
        services = [m for m in manifests if m["kind"] == "Service" and selected <= m["metadata"]["labels"].items()]
        offered = [port["name"] for service in services for port in service["spec"]["ports"]]
        for endpoint in monitor["spec"]["endpoints"]:
            assert offered.count(endpoint["port"]) == 1  # else each pod would be counted twice


def test_beside_tls_probes_run_in_the_pod_because_http_listens_on_127_0_0_1_only(rendered):
    for use, manifests in rendered.items():
        container = pod_of(manifests)["containers"][0]
        kinds = {kind for probe in ("startupProbe", "readinessProbe", "livenessProbe") for kind in container[probe]}
        has_tls = "TLS_CERT" in variables_of(container)
        assert ("exec" in kinds, "httpGet" in kinds) == (has_tls, not has_tls), use
        ports = [port["name"] for port in one(manifests, "Service")["spec"]["ports"]]
        assert ("http" in ports) == (not has_tls), use


def test_a_server_may_load_for_15_minutes_and_has_40_s_after_its_pause_to_end(manifests):
    spec = pod_of(manifests)
    (container,) = spec["containers"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 900
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause >= 10
    assert spec["terminationGracePeriodSeconds"] > pause + 40


def test_nothing_runs_as_root_writes_to_its_image_or_talks_to_kubernetes(manifests):
    for _, spec in pods(manifests):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_cluster_may_choose_the_user():
    context = pod_of(render({"runAsUser": None}))["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_what_a_container_requests_is_within_its_limits(manifests):
    units = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}
    for _, spec in pods(manifests):
        for container in spec["containers"]:
            resources = container["resources"]
            for name, limit in resources["limits"].items():
                asked, allowed = (
                    float(re.match(r"[\d.]+", str(amount))[0]) * units[re.sub(r"[\d.]", "", str(amount))]
                    for amount in (resources["requests"][name], limit)
                )
                assert asked <= allowed, name


def test_a_rollout_waits_for_no_spare_gpu_and_leaves_no_gap_on_a_cpu():
    surges, makes_room = {"maxSurge": 1, "maxUnavailable": 0}, {"maxSurge": 0, "maxUnavailable": 1}
    expected = [
        ({}, surges),
        ({"gpus": 1}, makes_room),
        ({"gpus": 1, "surge": True}, surges),
        ({"surge": False}, makes_room),
    ]
    for values, strategy in expected:
        assert one(render(values), "Deployment")["spec"]["strategy"]["rollingUpdate"] == strategy, values


def test_gpus_are_requested_tolerated_and_computed_on():
    spec = pod_of(render(GPU_VALUES | {"gpus": 2, "gpuResource": "nvidia.com/mig-3g.40gb"}))
    (container,) = spec["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/mig-3g.40gb"] == 2
    assert spec["tolerations"] == [{"key": "nvidia.com/mig-3g.40gb", "operator": "Exists", "effect": "NoSchedule"}]
    assert variables_of(container)["DEVICE"] == "cuda:0,cuda:1"
    (container,) = pod_of(render())["containers"]
    assert variables_of(container)["DEVICE"] == "cpu"
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}


def test_only_a_server_that_asked_for_gpus_sees_some(manifests):
    for _, spec in pods(manifests):
        for container in spec["containers"]:
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert variables_of(container).get("NVIDIA_VISIBLE_DEVICES") == (None if has_gpu else "void")


def test_each_client_finds_every_server_by_its_own_address(rendered):
    headless = one(rendered["everything"], "Service", "nv-embed-headless")
    assert headless["spec"]["clusterIP"] == "None"
    asked = [*pod_of(rendered["everything"], "nv-embed-gateway")["containers"][0]["args"]]
    asked += one(rendered["everything"], "Pod", "nv-embed-embed")["spec"]["containers"][0]["args"]
    addresses = [found[0] for word in asked if (found := re.findall(r"dns:///\S+", word))]
    assert addresses == ["dns:///nv-embed-headless.search.svc:8001"] * 2


def test_the_number_of_servers_is_left_to_the_autoscaler_if_there_is_one(rendered):
    assert "replicas" not in one(rendered["everything"], "Deployment")["spec"]
    scaled = one(rendered["everything"], "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "nv-embed"
    assert scaled["minReplicaCount"] >= 1
    assert one(render({"replicas": 0}), "Deployment")["spec"]["replicas"] == 0


def test_dashboard_and_alerts_are_the_files_of_the_repository(rendered):
    (shown,) = one(rendered["everything"], "ConfigMap", "nv-embed-dashboard")["data"].values()
    assert json.loads(shown) == json.loads((CHART / "files" / "dashboard.json").read_text("utf-8"))
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text("utf-8"))
    assert one(rendered["everything"], "PrometheusRule")["spec"] == rules

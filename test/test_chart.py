"""The Helm chart: it renders for every use, what it renders is valid, and it holds what schemas do not see."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from chart import CHART, GPU_VALUES, HELMS, helm, one, pod_of, render, tool
from nv_embed.settings import DECLARED
from serving import ROOT

pytestmark = pytest.mark.slow
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
        "maxConnectionAgeSeconds": 30,
        "adminKeySecret": "keys",
        "networkPolicy": {"enabled": True},
        "tracing": {"url": "http://collector:4318/v1/traces"},
        "scaling": {"enabled": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rendered():
    return {use: render(values) for use, values in USES.items()}


@pytest.fixture(params=USES)
def manifests(rendered, request):
    return rendered[request.param]


# --- schemas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", HELMS)
def test_lint_finds_nothing(which):
    done = helm("lint", "--strict", str(CHART), which=which)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_both_versions_of_helm_render_the_same(rendered):
    assert render(USES["everything"], which=HELMS[0]) == rendered["everything"]


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_every_object_of_kubernetes_is_valid(rendered, tmp_path, version):
    validate = tool("venv/bin/kubernetes-validate")
    for number, (use, manifests) in enumerate(rendered.items()):
        if version == "1.27" and "weights of an image" in use:
            continue  # which came later
        own = [manifest for manifest in manifests if not is_custom(manifest)]
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump_all(own), encoding="utf-8")
    assert_valid(validate, version, *tmp_path.glob("*.yaml"))


def assert_valid(validate, version, *files):
    command = [validate, "--strict", "-k", version, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr  # what it has no schema for, it lets pass


def is_custom(manifest):
    return manifest["apiVersion"].split("/")[0] in ("keda.sh", "monitoring.coreos.com")


def faults_of(resources):
    modules = tool("node_modules")
    if shutil.which("node") is None:
        pytest.skip("needs node on PATH")
    command = ["node", ROOT / "test" / "custom_resources.mjs", modules]
    return subprocess.run(
        command, input=json.dumps(resources), capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()


def test_every_object_of_keda_and_the_prometheus_operator_is_valid(rendered):
    custom = [manifest for manifests in rendered.values() for manifest in manifests if is_custom(manifest)]
    assert {manifest["kind"] for manifest in custom} == {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
    assert faults_of(custom) == []
    wrong = one(rendered["everything"], "ScaledObject")
    wrong = wrong | {"spec": wrong["spec"] | {"maxReplicaCount": "many", "maximumReplicas": 1}}
    assert len(faults_of([wrong])) == 2  # so it can fail


# --- values -----------------------------------------------------------------------------------------------


def schemas_below(schema, path="values"):
    """(path, schema) of every value."""
    for name, below in schema.get("properties", {}).items():
        yield f"{path}.{name}", below
        yield from schemas_below(below, f"{path}.{name}")


def test_every_value_is_in_the_schema_with_its_meaning_and_no_other_is_accepted():
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))

    def assert_same_names(values, schema, path):
        assert schema["additionalProperties"] is False, path
        assert set(values) == set(schema["properties"]) - {"global"}, path
        for name, value in values.items():
            if isinstance(value, dict) and "properties" in schema["properties"][name] and name != "settings":
                optional = {"limits": {}} if name == "resources" else {}
                assert_same_names(optional | value, schema["properties"][name], f"{path}.{name}")

    assert_same_names(values, schema, "values")
    for path, below in schemas_below(schema):
        assert re.search(r"[.`:] ?", below["description"]), path
        assert below["description"].endswith("."), path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "many"}, "replicas"),
        ({"weights": {"pvc": "x"}}, "pvc"),
        ({"settings": {"max_batch_token": 1}}, "max_batch_token"),
        ({"settings": {"device": "cpu"}}, "device"),  # `gpus` says that
        ({"image": ""}, "image"),
        ({"networkPolicy": {"from": []}}, "from"),  # to Kubernetes that means everybody
        ({"modelName": "a/b"}, "modelName"),
        ({"tracing": {"url": "collector:4318"}}, "url"),
        ({"weights": {"claim": "a", "image": "b"}}, "expected a claim or an image; got both, a and b; leave one out"),
        ({"tls": {"demandClientCertificates": True}}, "expected tls.secret beside it; got none; name"),
        (
            GATEWAY | {"tls": {"secret": "a", "demandClientCertificates": True}},
            "expected tls.clientSecret; got none; name",
        ),
    ],
)
def test_a_wrong_value_is_refused_and_named(values, words):
    done = helm("template", "nv-embed", str(CHART), values=values)
    assert done.returncode != 0
    assert words in done.stderr


def test_every_setting_of_the_model_reaches_it_as_it_was_written():
    values = {name: 4_000_000 if setting.default.isdigit() else "a: b" for name, setting in DECLARED.items()}
    del values["model_path"], values["device"]  # which the chart sets from `weights` and `gpus`
    variables = variables_of(pod_of(render({"settings": values}))["containers"][0])
    assert {f"NV_EMBED_{name.upper()}": str(value) for name, value in values.items()}.items() <= variables.items()


def variables_of(container):
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def test_every_variable_that_the_server_gets_is_one_of_serve_sh_or_of_the_model(rendered):
    known = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", (ROOT / "serve.sh").read_text("utf-8"), re.MULTILINE))
    known |= {f"NV_EMBED_{name.upper()}" for name in DECLARED} | {"OMP_NUM_THREADS", "NVIDIA_VISIBLE_DEVICES"}
    known |= {"TRACE_URL", "GRPC_MAX_CONNECTION_AGE_SECONDS"}
    for manifests in rendered.values():
        assert set(variables_of(pod_of(manifests)["containers"][0])) <= known


def test_every_helm_command_of_the_documentation_works():
    page = (ROOT / "docs" / "kubernetes.md").read_text("utf-8").replace("\\\n", " ")
    commands = [line.split("#")[0] for line in page.splitlines() if line.startswith("helm upgrade --install ")]
    assert len(commands) > 3
    for command in commands:
        template = ["template", *shlex.split(command.removeprefix("helm upgrade --install "))]
        done = subprocess.run([tool(HELMS[-1]), *template], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# --- what schemas do not see ------------------------------------------------------------------------------


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

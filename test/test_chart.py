"""The Helm chart: it renders for every use, what it renders is valid, and wrong values are refused."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from chart import CHART, GATEWAY, HELMS, USES, helm, one, pod_of, render, tool, variables_of
from nv_embed.settings import DECLARED
from serving import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rendered():
    return {use: render(values) for use, values in USES.items()}


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


def test_every_variable_that_the_server_gets_is_one_of_serve_sh_or_of_the_model(rendered):
    known = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", (ROOT / "serve.sh").read_text("utf-8"), re.MULTILINE))
    known |= {f"NV_EMBED_{name.upper()}" for name in DECLARED} | {"OMP_NUM_THREADS", "NVIDIA_VISIBLE_DEVICES"}
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

"""schemathesis against the live gateway: what its OpenAPI page promises is what it does."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import gateway_running


@pytest.fixture(scope="module")
def page(gateway):
    return httpx.get(f"{gateway}/openapi.json", trust_env=False).json()


def test_the_page_describes_every_path_and_error(page, client):
    openai = {"/v1/embeddings", "/v1/models", "/v1/models/{model}"}
    health = {"/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready", "/metrics"}
    assert set(page["paths"]) == {*openai, *health, "/v1/metadata", "/", "/embed", "/info"}
    embeddings = page["paths"]["/v1/embeddings"]["post"]
    assert set(embeddings["responses"]) == {"200", "400", "404", "413", "415", "502", "503", "504"}
    assert "Retry-After" in embeddings["responses"]["503"]["headers"]
    embed = page["paths"]["/embed"]["post"]
    assert set(embed["responses"]) == {"200", "413", "415", "422", "424", "429"}
    assert not any("Validation" in name for name in page["components"]["schemas"])
    fields = page["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    [looked_up] = page["paths"]["/v1/models/{model}"]["get"]["parameters"]
    for named in (fields["model"]["anyOf"][0], looked_up["schema"]):
        assert named["enum"] == ["nv-embed-v2", "nv-embed-v2-query", "nv-embed-v2-passage", "nvidia/NV-Embed-v2"]
    for request in ("EmbeddingsRequest", "EmbedRequest"):
        schema = page["components"]["schemas"][request]
        assert schema["additionalProperties"] is False
        assert schema["properties"]["dimensions"]["anyOf"][0]["enum"] == [client.dimension()]
        for name, field in schema["properties"].items():
            assert field["description"], name


def run_schemathesis(base: str, folder: Path, *arguments: str) -> str:
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{base}/openapi.json", *arguments]
    done = subprocess.run(
        [*command, "--seed", "1", "--no-color", "--generation-database", "none"],
        capture_output=True,
        text=True,
        timeout=1800,  # more than ten times what it takes on a quiet machine
        cwd=folder,  # it leaves a database behind
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_gateway_does_what_its_page_says(gateway, tmp_path):
    report = run_schemathesis(gateway, tmp_path, "--max-examples", "20")
    assert "Tested: 14" in report
    assert "No issues found" in report


def test_it_does_so_with_a_key_too(server, logs, tmp_path):
    more = ("--alias", "task=Instruct: Find\\nQuery: ", "--ignore-unknown-fields")
    with gateway_running(logs / "page.log", server.url, *more, GATEWAY_API_KEY="key") as base:
        run_schemathesis(base, tmp_path, "--header", "Authorization: Bearer key", "--phases", "coverage")

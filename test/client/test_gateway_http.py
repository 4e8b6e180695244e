"""The gateway as HTTP: browsers, probes, paths, upgrades, compressed bodies, a page without the internet."""

import asyncio
import gzip
import json
import os
import re
import socket
from html.parser import HTMLParser

import httpx
import pytest
from conftest import gateway_client, gateway_running
from nv_embed_client.gateway import GatewaySettings, create_app

ORIGIN = "https://app.example.org"
BODY = {"model": "nv-embed-v2", "input": "a"}
HEALTH = ["/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready"]


@pytest.fixture(scope="module")
def for_browsers(server, logs):
    arguments = ("--cors-origin", ORIGIN, "--cors-origin", "http://localhost:5173", "--max-body-bytes", "1000")
    with gateway_client(logs / "cors.log", server.url, *arguments, GATEWAY_API_KEY="key") as http:
        yield http


def preflight(http, path, origin):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return http.options(path, headers={"Origin": origin, **asked})


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/embeddings/", "/embed"])
def test_a_preflight_needs_no_key(for_browsers, path):
    answer = preflight(for_browsers, path, ORIGIN)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in preflight(for_browsers, path, "https://evil.example.org").headers


def test_a_page_in_a_browser_can_read_answers_and_errors(for_browsers):
    headers = {"Origin": ORIGIN, "Authorization": "Bearer key"}
    answers = {
        200: for_browsers.post("/v1/embeddings", json=BODY, headers=headers),
        400: for_browsers.post("/v1/embeddings", json={**BODY, "truncate": "x"}, headers=headers),
        401: for_browsers.post("/v1/embeddings", json=BODY, headers={"Origin": ORIGIN}),
        404: for_browsers.get("/absent", headers=headers),
        405: for_browsers.put("/v1/embeddings", headers=headers),
        413: for_browsers.post("/v1/embeddings", content=b"x" * 1001, headers=headers),
        415: for_browsers.post("/v1/embeddings", content=b"x", headers={**headers, "Content-Encoding": "br"}),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN, status
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
    foreign = for_browsers.post("/v1/embeddings", json=BODY, headers={**headers, "Origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in foreign.headers


def test_a_defect_is_500_that_a_page_in_a_browser_can_read():
    app = create_app(GatewaySettings(cors_origins=(ORIGIN,)))

    def defect():
        raise RuntimeError("a detail")

    app.add_api_route("/defect", defect)

    async def asked():
        # Without a server around it, the error would come out here; uvicorn logs it.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.get("/defect", headers={"Origin": ORIGIN}), await http.get("/metrics")

    answer, metrics = asyncio.run(asked())
    assert answer.status_code == 500
    assert "operator's log" in answer.json()["error"]["message"]
    assert "a detail" not in answer.text
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert 'nv_embed_gateway_requests_total{path="other",status="500"} 1.0' in metrics.text


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("localhost:8001", 8001),
        ("127.0.0.1:9", 9),
        ("10.0.0.1:8001", None),
        ("127.0.0.1:8001,10.0.0.1:9", None),
        ("127.example:8001", None),
    ],
)
def test_the_page_is_told_the_servers_port_if_there_is_one_server_on_the_same_machine(url, port):
    async def page():
        transport = httpx.ASGITransport(create_app(GatewaySettings(triton_url=url)))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            return await http.get("/")

    facts = re.search(r'id="facts">(.*?)</script>', asyncio.run(page()).text)
    assert json.loads(facts[1])["grpc_port"] == port


def test_any_origin_can_be_allowed_and_none_is_by_default(server, http, logs):
    headers = {"Origin": ORIGIN}
    assert "access-control-allow-origin" not in http.get("/health/live", headers=headers).headers
    with gateway_running(logs / "any.log", server.url, "--cors-origin", "*") as base:
        assert httpx.get(f"{base}/health/live", headers=headers).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", HEALTH)
def test_probes_may_ask_with_get_or_head(http, path):
    got, head = http.get(path), http.head(path)
    assert got.status_code == head.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"]


def test_probes_of_readiness_are_503_without_a_server_and_those_of_life_are_not(logs):
    with gateway_running(logs / "alone.log", "localhost:9") as base:
        statuses = {
            path: httpx.request(method, base + path).status_code for path in HEALTH for method in ("GET", "HEAD")
        }
    assert statuses == {path: 200 if path.endswith("live") else 503 for path in HEALTH}


@pytest.mark.parametrize("path", ["/v1/embeddings/", "//v1/embeddings", "/v1//embeddings//"])
def test_slashes_too_many_are_answered_and_not_redirected(http, path):
    # Not through httpx' base_url, which would put the slashes in order.
    answer = httpx.post(f"{http.base_url.copy_with(path=path)}", json=BODY, timeout=30, trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["data"]


def test_a_name_with_a_slash_is_looked_up_however_it_is_written(http):
    for path in ("nvidia/NV-Embed-v2", "nvidia%2FNV-Embed-v2", "nvidia/NV-Embed-v2/"):
        found = http.get(f"/v1/models/{path}").json()
        # The name is NVIDIA's. What the server has under it need not be.
        assert (found["id"], found["owned_by"]) == ("nvidia/NV-Embed-v2", "nv-embed-gateway")


def test_paths_that_somebody_makes_up_share_one_label(http):
    for path in ("/made-up-1", "/v1/embeddings/made-up-2", "/v1/models/made-up-3", "/health/made-up-4"):
        assert http.get(path).status_code in (404, 405)
    labels = set(re.findall(r'nv_embed_gateway_requests_total\{path="([^"]+)"', http.get("/metrics").text))
    assert {"other", "/v1/models/{model}"} <= labels
    assert not [label for label in labels if "made-up" in label]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
def test_a_compressed_body_is_415_that_names_the_encoding(http, encoding):
    content = gzip.compress(b'{"model": "nv-embed-v2", "input": "a"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    for path in ("/v1/embeddings", "/embed"):
        answer = http.post(path, content=content, headers=headers)
        assert answer.status_code == 415
        assert answer.headers["accept-encoding"] == "identity"
        assert f"got Content-Encoding '{encoding}'" in answer.text


def test_a_body_that_says_it_is_not_compressed_is_read(http):
    assert http.post("/v1/embeddings", json=BODY, headers={"Content-Encoding": "identity"}).status_code == 200


def answer_to_an_offered_upgrade(base, upgrade):
    """Status line and body of two requests on one connection, both offering the upgrade as the JDK's client does."""
    content = b'{"model": "nv-embed-v2", "input": "a", "encoding_format": "base64"}'
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: {len(content)}\r\n"
        f"Host: localhost\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAABgAGAAA\r\nUpgrade: {upgrade}\r\n"
        "Content-Type: application/json\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(base).port), timeout=30) as connection:
        reader = connection.makefile("rb")
        for _ in range(2):
            connection.sendall(head.encode() + content)
            status = reader.readline()
            headers = dict(line.split(b": ", 1) for line in iter(reader.readline, b"\r\n"))
            yield status, reader.read(int(headers[b"content-length"]))


@pytest.mark.parametrize("upgrade", ["h2c", "websocket"])
@pytest.mark.parametrize("httptools", ["installed", "absent"])
def test_a_client_that_offers_an_upgrade_gets_its_answer(server, logs, tmp_path, httptools, upgrade):
    __import__("httptools")  # uvicorn prefers it where it is there
    settings = {}
    if httptools == "absent":
        (tmp_path / "httptools.py").write_text("raise ImportError('hidden by the test')")
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    log = logs / f"upgrade-{httptools}-{upgrade}.log"
    with gateway_running(log, server.url, **settings) as base:
        for status, body in answer_to_an_offered_upgrade(base, upgrade):
            assert status == b"HTTP/1.1 200 OK\r\n"
            assert b'"object":"embedding"' in body
    assert "WARNING" not in log.read_text()


class Loaded(HTMLParser):
    """Whatever a page would fetch, and whatever it would run."""

    def __init__(self):
        super().__init__()
        self.links, self.active = [], []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object", "embed", "img", "link", "base", "form"):
            self.active.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.links.append(value)
            if name.startswith("on"):
                self.active.append(name)


def test_the_page_for_people_describes_every_operation_and_loads_nothing(http):
    answer = http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    loaded = Loaded()
    loaded.feed(answer.text)
    assert loaded.active == []
    assert loaded.links == ["openapi.json"]
    assert "url(" not in answer.text
    assert "@import" not in answer.text
    page = http.get("/openapi.json").json()
    for path, operations in page["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in answer.text
            assert operation["summary"] in answer.text.replace("&#x27;", "'")
    for request in ("EmbeddingsRequest", "EmbedRequest"):
        for field in page["components"]["schemas"][request]["properties"]:
            assert f"<code>{field}</code>" in answer.text

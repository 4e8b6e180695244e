"""The gateway as a process in front of a real server: by the real `openai` package, and by hand."""

import base64
import json
import socket

import numpy as np
import openai
import pytest
from conftest import MAX_SEQUENCE_TOKENS, cancelled_requests, eventually, gateway_client, is_computing, metric
from nv_embed_client.gateway.__main__ import main

TEXTS = ["How do magnets work?", "Magnets attract iron.", "日本", ""]


@pytest.fixture(scope="module")
def openai_client(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0) as client:
        yield client


def post(http, **body):
    return http.post("/v1/embeddings", json={"model": "nv-embed-v2", "input": "a", **body})


def assert_refused(response, status, *parts, param=None):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param
    for part in parts:
        assert part in error["message"]


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_openai_package_gets_the_clients_vectors(openai_client, client, encoding):
    answer = openai_client.embeddings.create(model="nv-embed-v2", input=TEXTS, **encoding)
    assert [each.index for each in answer.data] == [0, 1, 2, 3]
    vectors = [
        np.frombuffer(base64.b64decode(each.embedding), "<f4") if isinstance(each.embedding, str) else each.embedding
        for each in answer.data
    ]
    expected = client.embed(TEXTS, token_counts=True)
    np.testing.assert_allclose(vectors, expected.embeddings, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == int(expected.token_counts.sum())
    assert answer.model == "nv-embed-v2"


def test_queries_are_asked_for_by_field_or_by_suffix(openai_client, client):
    expected = client.embed_query(TEXTS[0])[0]
    by_suffix = openai_client.embeddings.create(model="nv-embed-v2-query", input=TEXTS[0]).data[0].embedding
    by_field = openai_client.embeddings.create(model="nv-embed-v2", input=TEXTS[0], extra_body={"input_type": "query"})
    passage = openai_client.embeddings.create(model="nv-embed-v2-passage", input=TEXTS[0]).data[0].embedding
    np.testing.assert_allclose(by_suffix, expected, atol=1e-5)
    np.testing.assert_allclose(by_field.data[0].embedding, expected, atol=1e-5)
    np.testing.assert_allclose(passage, client.embed_documents(TEXTS[:1])[0], atol=1e-5)


def test_the_openai_packages_errors_are_the_typed_ones(openai_client):
    with pytest.raises(openai.NotFoundError, match="see /v1/models"):
        openai_client.embeddings.create(model="text-embedding-3-small", input="a")
    with pytest.raises(openai.BadRequestError, match="does not support matryoshka representation"):
        openai_client.embeddings.create(model="nv-embed-v2", input="a", dimensions=256)
    with pytest.raises(openai.BadRequestError, match="token ids"):
        openai_client.embeddings.create(model="nv-embed-v2", input=[[1, 2], [3]])


def test_the_models_are_listed_and_each_is_found(openai_client, client):
    listed = list(openai_client.models.list())
    names = ["nv-embed-v2", "nv-embed-v2-query", "nv-embed-v2-passage", "nvidia/NV-Embed-v2"]
    assert [model.id for model in listed] == names
    assert {model.dimension for model in listed} == {client.dimension()}
    assert {model.max_model_len for model in listed} == {MAX_SEQUENCE_TOKENS}
    assert [openai_client.models.retrieve(model.id) for model in listed] == listed
    with pytest.raises(openai.NotFoundError, match=r"got 'text-embedding-3-small'; see /v1/models"):
        openai_client.models.retrieve("text-embedding-3-small")


def test_the_models_own_dimensions_are_accepted_and_no_others(openai_client, http, client):
    own = client.dimension()
    answer = openai_client.embeddings.create(model="nv-embed-v2", input="a", dimensions=own)
    assert len(answer.data[0].embedding) == own
    for other in (0, own // 2, own + 1):
        refused = post(http, dimensions=other)
        assert_refused(
            refused,
            400,
            f"expected dimensions of {own}",
            f"got {other}",
            "does not support matryoshka representation",
            param="dimensions",
        )


def test_null_stands_for_every_optional_field_that_is_left_out(http):
    optional = http.get("/openapi.json").json()["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    nothing = dict.fromkeys(name for name in optional if name != "input")
    answer = http.post("/v1/embeddings", json={"input": "a", **nothing})
    assert answer.status_code == 200, answer.text
    assert answer.json() == post(http).json()


def test_more_texts_than_one_request_of_triton_come_in_order(http, client):
    texts = [f"text {number}" for number in range(700)]
    data = post(http, input=texts).json()["data"]
    np.testing.assert_allclose([each["embedding"] for each in data], client.embed_documents(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "parts", "param"),
    [
        ({"input": []}, ["an empty list", "at least one"], "input"),
        ({"input": 7}, ["one text or a list", "got a number;"], "input"),
        ({"input": None}, ["got null;"], "input"),
        ({"input": [1, 2]}, ["token ids as text 0", "check_embedding_ctx_length=False"], "input"),
        ({"input": [[1, 2], [3]]}, ["token ids as text 0", "send the texts themselves"], "input"),
        ({"input": ["a", [1, 2]]}, ["token ids as text 1"], "input"),
        ({"input": ["a", None]}, ["null as text 1", "leave it out"], "input"),
        ({"input": [["a", "b"]]}, ["a list as text 0", "one flat list"], "input"),
        ({"input": ["a", {"text": "b"}]}, ["an object as text 1"], "input"),
        ({"input": [True]}, ["a boolean as text 0"], "input"),
        ({"input": [1.5]}, ["a number as text 0"], "input"),
        ({"input": ["a"] * 2049}, ["at most 2048 texts", "2049"], "input"),
        ({"dimensions": "384"}, ["integer"], "dimensions"),
        ({"embedding_type": "int4"}, ["'float', 'float16', 'int8'"], "embedding_type"),
        ({"is_truncated": 1}, ["boolean"], "is_truncated"),
        ({"modality": "image"}, ["'text'"], "modality"),
        ({"encoding_format": "int8"}, ["'float' or 'base64'"], "encoding_format"),
        ({"truncate": "START"}, ["'END' or 'NONE'", "got 'START'", "cut its start yourself"], "truncate"),
        ({"truncate": "MIDDLE"}, ["'END' or 'NONE'"], "truncate"),
        ({"input_type": "document"}, ["'query' or 'passage'"], "input_type"),
        ({"model": "nv-embed-v2-query", "input_type": "passage"}, ["leave one of them out"], "input_type"),
        ({"nonsense": 1}, ["expected no fields but input, ", "'nonsense'", "--ignore-unknown-fields"], "nonsense"),
        ({"model": 3}, ["string"], "model"),
    ],
)
def test_a_body_that_is_wrong_is_400_and_says_how_to_mend_it(http, body, parts, param):
    assert_refused(post(http, **body), 400, *parts, param=param)


def test_what_the_model_refuses_is_400_and_names_the_text(http):
    texts = ["short", "word " * (2 * MAX_SEQUENCE_TOKENS)]
    assert post(http, input=texts).status_code == 200
    assert_refused(post(http, input=texts, truncate="NONE"), 400, "text 1 with", param="input")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'"text"'])
def test_a_body_that_is_no_json_object_is_400(http, content):
    response = http.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert_refused(response, 400, "expected")


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_a_body_of_another_content_type_is_400_and_says_so(http, headers):
    response = http.post("/v1/embeddings", content='{"model": "nv-embed-v2", "input": "a"}', headers=headers)
    assert_refused(response, 400, "Content-Type: application/json")


def test_no_encoding_is_float(http):
    answers = [post(http, encoding_format=encoding).json() for encoding in (None, "float")]
    assert answers[0]["data"] == answers[1]["data"]


def test_half_a_surrogate_pair_is_400(http):
    content = b'{"model": "nv-embed-v2", "input": "\\ud800"}'
    response = http.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert_refused(response, 400, param="input")


def test_unknown_models_paths_and_methods_have_the_error_shape(http):
    assert_refused(post(http, model="absent"), 404, "nv-embed-v2-query", param="model")
    assert_refused(http.get("/absent"), 404, "/docs")
    response = http.delete("/v1/models")
    assert_refused(response, 405, "DELETE")
    assert response.headers["allow"] == "GET"


def test_a_body_that_is_too_large_is_413_with_and_without_a_length(http):
    body = json.dumps({"model": "nv-embed-v2", "input": "x" * 2**21}).encode()
    assert_refused(http.post("/v1/embeddings", content=body), 413, "2097152 bytes")
    pieces = (body[start : start + 2**16] for start in range(0, len(body), 2**16))
    headers = {"content-type": "application/json"}
    assert_refused(http.post("/v1/embeddings", content=pieces, headers=headers), 413, "more than 2097152")


def test_health_and_metrics(http):
    assert http.get("/health/live").json() == {"status": "live"}
    assert http.get("/health/ready").json() == {"status": "ready"}
    post(http, input=["a", "b"])
    http.get("/v1/models/nv-embed-v2")
    metrics = http.get("/metrics").text
    assert 'nv_embed_gateway_requests_total{path="/v1/embeddings",status="200"}' in metrics
    assert 'nv_embed_gateway_requests_total{path="/v1/models/{model}",status="200"}' in metrics
    assert metric(metrics, "nv_embed_gateway_texts_total") >= 2
    assert metric(metrics, "nv_embed_gateway_tokens_total") >= 2


def test_a_client_that_hangs_up_cancels_its_work_down_to_the_model(http, gateway, server):
    def here(name):
        return metric(http.get("/metrics").text, f"nv_embed_gateway_{name}")

    hung_up_before, cancelled_before = here("hung_up_total"), cancelled_requests(server)
    busy = json.dumps({"model": "nv-embed-v2", "input": [f"{n} {'word ' * 200}" for n in range(1500)]}).encode()
    with socket.create_connection(("127.0.0.1", int(gateway.rpartition(":")[2]))) as connection:
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(busy)}"
        )
        connection.sendall(f"{head}\r\n\r\n".encode() + busy)
        eventually(lambda: here("requests_in_flight") == 2)  # beside the one that asks
        eventually(lambda: is_computing(server))
    eventually(lambda: here("hung_up_total") == hung_up_before + 1)
    eventually(lambda: cancelled_requests(server) > cancelled_before)
    assert here("requests_in_flight") == 1


def test_without_a_server_it_is_503_with_retry_after_and_live_but_not_ready(logs):
    with gateway_client(logs / "orphan.log", "localhost:9") as http:
        response = post(http)
        assert_refused(response, 503, "try again later")
        assert response.headers["retry-after"] == "1"
        assert http.get("/health/live").status_code == 200
        ready = http.get("/health/ready")
        assert_refused(ready, 503)
        assert ready.headers["retry-after"] == "1"
    assert "the server behind this gateway is unavailable: " in (logs / "orphan.log").read_text()


def test_a_proxy_between_gateway_and_server_is_named_with_the_remedy(server, logs):
    log = logs / "proxy.log"
    with gateway_client(log, server.url, http_proxy="http://me:secret@localhost:9", no_proxy="") as http:
        response = post(http)
    assert_refused(response, 503, "http_proxy", "localhost:9", "add localhost to no_proxy")
    assert "add localhost to no_proxy" in log.read_text()
    assert "secret" not in response.text + log.read_text()


def test_a_model_that_the_server_lacks_is_404_and_the_log_says_so_at_the_start(server, logs):
    log = logs / "absent.log"
    missing = "the server behind this gateway does not have model absent; load it there, or correct --model-name"
    names = ("--model-name", "nv-embed-v2", "--model-name", "absent")
    with gateway_client(log, server.url, *names) as http:
        eventually(lambda: missing in log.read_text() and "model nv-embed-v2: dimension " in log.read_text())
        assert_refused(post(http, model="absent-query"), 404, "got 'absent', which it does not have", param="model")
        assert post(http).status_code == 200
        assert_refused(http.get("/health/ready"), 503, "has loaded nv-embed-v2, absent;")
        listed = {model["id"]: set(model) for model in http.get("/v1/models").json()["data"]}
        assert listed["absent"] == {"id", "object", "created", "owned_by"}
        assert listed["nv-embed-v2"] == {*listed["absent"], "dimension", "max_model_len"}
    with gateway_client(log, server.url, "--model-name", "absent") as http:
        for answer in (http.post("/embed", json={"inputs": "a"}), http.get("/info")):
            assert (answer.status_code, answer.json()["error_type"]) == (424, "Backend")


def test_no_answer_in_time_is_504(server, logs):
    with gateway_client(logs / "slow.log", server.url, "--request-timeout", "0.4") as http:
        texts = [f"{number} {'word ' * 400}" for number in range(1000)]
        texts[637] += " and one word more"
        response = post(http, input=texts)
        longest = f"text 637 is the longest with {len(texts[637])} characters"
        assert_refused(response, 504, "within 0.4 seconds", longest, "fewer or shorter texts", param="input")
        assert response.headers["x-should-retry"] == "false"


def test_an_api_key_guards_what_costs_something(server, logs):
    with gateway_client(logs / "key.log", server.url, GATEWAY_API_KEY="correct horse") as http:
        refused = post(http)
        assert_refused(refused, 401, "got none")
        assert refused.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer wrong", "Bearer", "correct horse", "Basic correct horse"):
            assert_refused(http.get("/v1/models", headers={"Authorization": wrong}), 401, "got another")
        right = {"Authorization": "bearer correct horse"}
        closed = ("/v1/models", "/v1/models/nv-embed-v2", "/v1/metadata", "/info")
        for path in closed:
            assert http.get(path, headers=right).status_code == 200, path
        for path in (*closed, "/v1/models/", "//v1//models", "/v1/health", "/"):
            assert http.get(path).status_code == 401, path
        for path in ("/embed", "/"):
            assert http.post(path, json={"inputs": "a"}).status_code == 401
            assert http.post(path, json={"inputs": "a"}, headers=right).status_code == 200
        health = ("/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready")
        for path in (*health, "/metrics", "/docs", "/openapi.json"):
            assert http.get(path).status_code == 200, path
        api = str(http.base_url.join("v1"))
        with openai.OpenAI(base_url=api, api_key="correct horse") as client:
            assert client.embeddings.create(model="nv-embed-v2", input="a").data
        with openai.OpenAI(base_url=api, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.embeddings.create(model="nv-embed-v2", input="a")
        schema = http.get("/openapi.json").json()
        assert schema["paths"]["/v1/embeddings"]["post"]["security"] == [{"key": []}]
        assert "401" in schema["paths"]["/v1/embeddings"]["post"]["responses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--triton-url", "http://localhost:8000"], "leave out the scheme"),
        (["--request-timeout", "0"], "request_timeout_seconds"),
        (["--triton-header", "novalue"], "NAME=VALUE"),
        (["--triton-root-certificates", "ca.pem"], "expected --triton-tls"),
        (["--triton-tls", "--triton-root-certificates", "absent.pem"], "'absent.pem'"),
        (["--cors-origin", "https://example.org/"], "scheme://host"),
        (["--cors-origin", "example.org"], "scheme://host"),
    ],
)
def test_settings_that_make_no_sense_end_the_start_with_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err

"""The gateway in the shapes of NVIDIA's NIM and of text-embeddings-inference (TEI), by TEI's own clients."""

import httpx
import numpy as np
import pytest
from conftest import MAX_SEQUENCE_TOKENS, gateway_running
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference
from nv_embed_client.instructions import TASK_INSTRUCTIONS

TEXTS = ["How do magnets work?", "Magnets attract iron.", "日本"]
LONG = "word " * (2 * MAX_SEQUENCE_TOKENS)


@pytest.mark.parametrize("path", ["", "/", "/embed"])
def test_hugging_faces_client_gets_the_clients_vectors(gateway, client, path):
    hub = InferenceClient(gateway + path)
    np.testing.assert_allclose(hub.feature_extraction(TEXTS), client.embed_documents(TEXTS), atol=1e-5)
    one = hub.feature_extraction(TEXTS[0], normalize=True, truncate=True, truncation_direction="right")
    np.testing.assert_allclose(one, client.embed_documents(TEXTS[:1]), atol=1e-5)


def test_hugging_faces_client_asks_for_queries_by_the_prompts_name(gateway, client):
    hub = InferenceClient(f"{gateway}/embed")
    queries = hub.feature_extraction(TEXTS[:2], prompt_name="query")
    np.testing.assert_allclose(queries, client.embed_queries(TEXTS[:2]), atol=1e-5)
    task = hub.feature_extraction(TEXTS[0], prompt_name="SciFact", dimensions=client.dimension())
    expected = client.embed_query(TEXTS[0], instruction=TASK_INSTRUCTIONS["SciFact"])
    np.testing.assert_allclose(task, expected, atol=1e-5)


def test_hugging_faces_client_says_what_is_wrong(gateway):
    hub = InferenceClient(f"{gateway}/embed")
    for arguments, part in (
        ({"normalize": False}, "normalize true"),
        ({"prompt_name": "absent"}, "a prompt_name of query"),
        ({"truncation_direction": "left"}, "'right'"),
        ({"dimensions": 3}, "does not support matryoshka representation"),
        ({"encoding_format": "base64"}, "expected no fields but"),
    ):
        with pytest.raises(HfHubHTTPError, match=part):
            hub.feature_extraction("a", **arguments)


def test_llama_indexs_tei_class_gets_the_clients_vectors(gateway, client):
    expected = client.embed_documents(TEXTS)
    model = TextEmbeddingsInference(model_name="nv-embed-v2", base_url=gateway)
    np.testing.assert_allclose(model.get_text_embedding_batch(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(model.get_text_embedding(TEXTS[0]), expected[0], atol=1e-5)


def test_teis_clients_send_the_gateways_key_as_their_token(server, logs, client):
    with gateway_running(logs / "tei.log", server.url, GATEWAY_API_KEY="key") as base:
        expected = client.embed_documents(TEXTS)
        np.testing.assert_allclose(InferenceClient(base, token="key").feature_extraction(TEXTS), expected, atol=1e-5)
        model = TextEmbeddingsInference(model_name="nv-embed-v2", base_url=base, auth_token="key")
        np.testing.assert_allclose(model.get_text_embedding_batch(TEXTS), expected, atol=1e-5)
        with pytest.raises(HfHubHTTPError, match="401"):
            InferenceClient(base, token="wrong").feature_extraction("a")


def test_long_texts_are_cut_unless_the_request_says_otherwise(http):
    assert http.post("/embed", json={"inputs": LONG}).status_code == 200
    assert http.post("/embed", json={"inputs": LONG, "truncate": None}).status_code == 200
    refused = http.post("/embed", json={"inputs": ["a", LONG], "truncate": False})
    assert refused.status_code == 422
    assert "text 1 with" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        ({"inputs": []}, 422, "an empty list"),
        ({"inputs": [[1, 2]]}, 422, "token ids as text 0"),
        ({"inputs": ["a", None]}, 422, "null as text 1"),
        ({"inputs": ["a"] * 2049}, 413, "at most 2048 texts"),
        ({"inputs": "a" * 2**21}, 413, "2097152 bytes"),
        ({"input": "a"}, 422, "inputs"),
        ({"inputs": "a", "unknown": 1}, 422, "'unknown'"),
    ],
)
def test_teis_errors_have_teis_shape(http, body, status, part):
    answer = http.post("/embed", json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == "Validation"
    assert part in answer.json()["error"]


def test_an_absent_server_is_teis_overloaded_with_retry_after(logs):
    with gateway_running(logs / "no-tei.log", "localhost:9") as base:
        for answer in (httpx.post(f"{base}/embed", json={"inputs": "a"}), httpx.get(f"{base}/info")):
            assert answer.status_code == 429
            assert answer.json()["error_type"] == "Overloaded"
            assert answer.headers["retry-after"] == "1"


def test_teis_info_says_what_the_server_takes(http, client):
    info = http.get("/info").json()
    assert info["model_id"] == "nv-embed-v2"
    assert (info["model_sha"], info["model_dtype"]) == (client.model_info().fingerprint, "float32")
    assert info["max_input_length"] == MAX_SEQUENCE_TOKENS
    assert info["max_client_batch_size"] == 2048
    assert list(info["model_type"]) == ["embedding"]
    whole_numbers = ("max_concurrent_requests", "max_batch_tokens", "tokenization_workers")
    assert all(type(info[name]) is int for name in whole_numbers)
    assert info["auto_truncate"] is True


def test_nims_fields_and_answers(http):
    body = {"model": "nvidia/NV-Embed-v2", "input": ["a", "b"], "input_type": "query"}
    plain = http.post("/v1/embeddings", json=body).json()
    for modality in ("text", ["text"], ["text", "text"]):
        nim = {**body, "modality": modality, "embedding_type": "float", "truncate": "END"}
        assert http.post("/v1/embeddings", json=nim).json() == plain
    assert http.get("/v1/health/live").json() == {"object": "health.response", "message": "live", "live": True}
    assert http.get("/v1/health/ready").json() == {"object": "health.response", "message": "ready", "ready": True}
    metadata = http.get("/v1/metadata").json()
    assert metadata["modelInfo"][0]["shortName"] == "nv-embed-v2"
    assert metadata["version"]

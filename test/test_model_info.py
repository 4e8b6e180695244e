"""What a served model says of itself, asked over gRPC and HTTP, also while it is busy."""

from __future__ import annotations

import json

import numpy as np
import pytest
from nv_embed.models.fingerprint import fingerprint
from serving import MODEL_NAME, Server
from tritonclient.utils import InferenceServerException

ASKED = {"model_info": True}


def info_of(server: Server, **arguments) -> dict:
    answer = server.infer(documents=[""], parameters=ASKED, outputs=["model_info"], **arguments)
    assert list(answer) == ["model_info"]
    (text,) = answer["model_info"]
    return json.loads(text.decode("utf-8"))


def test_it_says_what_is_in_force(toy_server_of_64_tokens, toy):
    assert info_of(toy_server_of_64_tokens) == {
        "name": MODEL_NAME,
        "kind": "nv_embed",
        "fingerprint": fingerprint(toy),
        "dimension": 64,
        "pooling": "mean",
        "dtype": "float32",
        "device": "cpu",
        "query_prompt": "Instruct: Given a question, retrieve passages that answer the question\nQuery: ",
        "document_prompt": "",
        "max_sequence_tokens": 64,
        "max_request_documents": 20,
        "max_request_bytes": 8000,
        "max_queue_bytes": 2**28,
        "max_queue_tokens": 4_000_000,
        "max_queue_texts": 131_072,
        "max_queue_milliseconds": 60_000,
    }


def test_an_operator_s_settings_are_told_as_they_are(start, toy, tmp_path):
    settings = {"NV_EMBED_DTYPE": "int8", "NV_EMBED_QUERY_PROMPT": "日本: ", "NV_EMBED_DOCUMENT_PROMPT": "passage: "}
    info = info_of(start(tmp_path / "log.txt", toy, settings))
    assert (info["dtype"], info["query_prompt"], info["document_prompt"]) == ("int8", "日本: ", "passage: ")


@pytest.mark.parametrize("asked", [True, "true"])
def test_an_answer_with_vectors_can_hold_it_too(toy_server, asked):
    expected = toy_server.infer(query=["x"], outputs=["embeddings"])["embeddings"]
    for outputs in (None, ["embeddings", "token_counts", "model_info"]):
        answer = toy_server.infer(query=["x"], parameters={"model_info": asked}, outputs=outputs)
        assert set(answer) == {"embeddings", "token_counts", "model_info"}
        np.testing.assert_array_equal(answer["embeddings"], expected)
        assert json.loads(answer["model_info"][0]) == info_of(toy_server)
    named = toy_server.infer(query=["x"], parameters={"model_info": asked}, outputs=["embeddings"])
    assert set(named) == {"embeddings"}


def test_nobody_gets_it_who_does_not_ask(toy_server):
    assert "model_info" not in toy_server.infer(query=["x"], outputs=None)
    assert set(toy_server.infer(query=["x"], parameters={"model_info": False}, outputs=None)) == {
        "embeddings",
        "token_counts",
    }
    assert set(toy_server.infer(query=["x"], outputs=["embeddings", "model_info"])) == {"embeddings"}


def test_a_request_for_it_is_a_request_like_others(toy_server):
    for texts in ({}, {"query": ["a"], "documents": ["b"]}):
        with pytest.raises(InferenceServerException, match="exactly one of the inputs"):
            toy_server.infer(**texts, parameters=ASKED, outputs=["model_info"])


def test_it_comes_over_http_too(toy_server):
    tensor = {"name": "query", "shape": [1], "datatype": "BYTES", "data": [""]}
    body = {"inputs": [tensor], "parameters": ASKED}
    status, alone = toy_server.post(body | {"outputs": [{"name": "model_info"}]})
    assert status == 200
    (output,) = alone["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1])
    assert json.loads(output["data"][0]) == info_of(toy_server)
    status, beside = toy_server.post(body)
    assert (status, {each["name"] for each in beside["outputs"]}) == (200, {"embeddings", "token_counts", "model_info"})
    assert toy_server.post(body | {"parameters": {"model_info": 1}})[0] == 400

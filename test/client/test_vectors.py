"""Vectors of other types than float32, and which texts were cut: from both clients over the encoder to the gateway."""

import asyncio
import base64

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import MAX_SEQUENCE_TOKENS, gateway_client, metric
from nv_embed_client import (
    AsyncNVEmbedClient,
    EmbedRequest,
    EmbedResult,
    InvalidInput,
    MockTransport,
    NVEmbedClient,
    NVEmbedEncoder,
    PartialFailure,
    ServerFailure,
    ServerTooOld,
    packed,
)
from nv_embed_client.embedding_type import EMBEDDING_TYPES
from nv_embed_client.wire import error_of
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.util import quantize_embeddings

DTYPES = {
    "float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8, "binary": np.int8,
    "ubinary": np.uint8,
}  # fmt: skip
COMPACT = [name for name in EMBEDDING_TYPES if name != "float"]
TEXTS = ["How do magnets work?", "Magnets attract iron.", "日本", ""]
LONG = "word " * (2 * MAX_SEQUENCE_TOKENS)


# --- the clients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDING_TYPES)
def test_every_method_gives_what_the_type_makes_of_the_vectors(client, server, name):
    query, documents = client.embed_query(TEXTS[0]), client.embed_documents(TEXTS)  # the server keeps these
    np.testing.assert_array_equal(client.embed_query(TEXTS[0], embedding_type=name), packed(query, name))
    np.testing.assert_array_equal(client.embed_queries(TEXTS[:1], embedding_type=name), packed(query, name))
    got = client.embed_documents(TEXTS, embedding_type=name)
    np.testing.assert_array_equal(got, packed(documents, name))
    assert got.dtype == DTYPES[name]

    async def main():
        async with AsyncNVEmbedClient(server.url) as awaited:
            return await awaited.embed(TEXTS, embedding_type=name, max_texts_per_request=3, is_truncated=True)

    result = asyncio.run(main())
    np.testing.assert_array_equal(result.embeddings, got)
    assert result.is_truncated.tolist() == [False] * 4


def test_signs_are_those_of_sentence_transformers(client):
    vectors = client.embed_documents(TEXTS)
    for name in ("binary", "ubinary"):
        got = client.embed_documents(TEXTS, embedding_type=name)
        np.testing.assert_array_equal(got, quantize_embeddings(vectors, name))


def test_whole_numbers_keep_the_directions_of_the_default_checkpoint(client, default_checkpoint):
    if not default_checkpoint:
        pytest.skip("the toy's vectors have no meaning")
    texts = [f"{text} {number}" for number in range(64) for text in TEXTS]
    vectors = client.embed_documents(texts)
    int8 = client.embed_documents(texts, embedding_type="int8").astype(np.float32)
    cosines = (int8 * vectors).sum(axis=1) / np.linalg.norm(int8, axis=1)
    assert cosines.min() >= 0.9995


def test_an_empty_call_has_the_shape_and_type_of_a_full_one(client):
    for name in EMBEDDING_TYPES:
        nothing, something = (client.embed(texts, embedding_type=name, is_truncated=True) for texts in ([], ["a"]))
        assert nothing.embeddings.dtype == something.embeddings.dtype
        assert nothing.embeddings.shape == (0, something.embeddings.shape[1])
        assert nothing.is_truncated.tolist() == []


def test_a_row_of_signs_is_not_taken_for_the_dimension(server):
    with NVEmbedClient(server.url) as client:
        short = client.embed_documents(["a"], embedding_type="ubinary").shape[1]
        assert client.dimension() == 8 * short


def test_texts_that_fail_are_rows_of_zeros_where_there_is_no_nan():
    client = NVEmbedClient(transport=MockTransport(dimension=16))
    for name, missing in (("float16", np.nan), ("int8", 0), ("ubinary", 0)):
        with pytest.raises(PartialFailure) as caught:
            client.embed(["a", "\ud800", "b"], embedding_type=name)
        rows = caught.value.embeddings
        assert rows.dtype == DTYPES[name]
        np.testing.assert_array_equal(rows[1], np.full(rows.shape[1], missing, rows.dtype))
        assert rows[0].any()


def test_texts_that_were_cut_are_told_in_the_order_of_the_call(client):
    texts = ["short", LONG, "", LONG + "and more", "short"]
    for input_type in ("query", "passage"):
        result = client.embed(texts, input_type=input_type, is_truncated=True, max_texts_per_request=2)
        assert result.is_truncated.dtype == np.bool_
        assert result.is_truncated.tolist() == [False, True, False, True, False]
        assert result.token_counts is None
    assert client.embed(texts).is_truncated is None


def test_a_request_names_the_output_of_its_type():
    plain = EmbedRequest(("a",)).message("model")
    assert [output.name for output in plain.outputs] == ["embeddings"]
    assert not plain.parameters
    asked = EmbedRequest(("a",), token_counts=True, embedding_type="int8", is_truncated=True).message("model")
    assert [output.name for output in asked.outputs] == ["embeddings_int8", "token_counts", "is_truncated"]
    assert asked.parameters["embedding_type"].string_param == "int8"
    assert asked.parameters["is_truncated"].bool_param is True


def test_an_unknown_type_is_refused_before_anything_is_sent():
    transport = MockTransport()
    with pytest.raises(InvalidInput, match=r"'binary', 'ubinary' as embedding_type; got 'int4'; correct it"):
        NVEmbedClient(transport=transport).embed(["a"], embedding_type="int4")
    assert transport.requests == []


def test_a_reply_of_another_type_is_no_answer():
    floats = np.zeros((1, 8), np.float32)
    with pytest.raises(ServerFailure, match=r"1 texts as int8 \[1, dim\]; got float32 \[1, 8\]"):
        EmbedRequest(("a",), embedding_type="int8").checked(EmbedResult(floats, None))
    with pytest.raises(ServerFailure, match="expected is_truncated of 1 texts; got others; update the server"):
        EmbedRequest(("a",), is_truncated=True).checked(EmbedResult(floats, None))


def test_an_output_that_the_server_does_not_know_ends_the_call_with_what_to_do():
    message = "[request id: <id_unknown>] unexpected inference output 'embeddings_int8' for model 'nv-embed-v2'"

    def old(request):
        raise error_of("INVALID_ARGUMENT", message)

    transport = MockTransport(old)
    with pytest.raises(ServerTooOld, match=r"'embeddings_int8'.*leave it out, or have the server's operator update"):
        NVEmbedClient(transport=transport, max_in_flight=1, max_texts_per_request=4).embed(
            ["a"] * 16, embedding_type="int8", truncate="NONE"
        )
    assert len(transport.requests) == 1


# --- the encoder ----------------------------------------------------------------------------------------


def test_an_encoder_has_the_precisions_of_sentence_transformers(client):
    encoder = NVEmbedEncoder(client)
    vectors = encoder.encode(TEXTS)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        got = encoder.encode(TEXTS, precision=precision)
        np.testing.assert_array_equal(got, packed(vectors, precision))
        tensor = encoder.encode(TEXTS[0], precision=precision, convert_to_tensor=True)
        np.testing.assert_array_equal(tensor.numpy(), got[0])
        assert tensor.dtype == (torch.uint8 if precision[0] == "u" else torch.int8)
    with pytest.raises(InvalidInput, match="'ubinary' as precision; got 'float16'; correct it"):
        encoder.encode(TEXTS, precision="float16")


@pytest.mark.parametrize("precision", ["float32", "int8", "binary", "ubinary"])
def test_the_evaluators_of_sentence_transformers_ask_for_them(client, precision, default_checkpoint):
    pairs = [
        ("A cat sleeps.", "The cat is asleep.", 1.0), ("A cat sleeps.", "Shares fell on Monday.", 0.0),
        ("Bread needs yeast.", "Dough rises with yeast.", 0.9), ("Bread needs yeast.", "The moon is far.", 0.1),
    ]  # fmt: skip
    evaluator = EmbeddingSimilarityEvaluator(*map(list, zip(*pairs, strict=True)), precision=precision)
    scores = evaluator(NVEmbedEncoder(client))
    if default_checkpoint:
        assert scores["spearman_cosine"] >= 0.79


# --- the gateway ----------------------------------------------------------------------------------------


def post(http, **body):
    answer = http.post("/v1/embeddings", json={"model": "nv-embed-v2", "input": TEXTS, **body})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize("name", EMBEDDING_TYPES)
def test_a_gateway_sends_each_type_as_numbers_and_as_bytes(http, client, name):
    expected = client.embed_documents(TEXTS, embedding_type=name)
    numbers = [each["embedding"] for each in post(http, embedding_type=name).json()["data"]]
    np.testing.assert_array_equal(np.array(numbers, expected.dtype), expected)
    in_base64 = post(http, embedding_type=name, encoding_format="base64").json()["data"]
    rows = [np.frombuffer(base64.b64decode(each["embedding"]), expected.dtype) for each in in_base64]
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("name", COMPACT)
def test_the_openai_package_gets_them_if_it_names_the_encoding(gateway, client, name):
    expected = client.embed_queries(TEXTS[:2], embedding_type=name)
    nim = {"embedding_type": name, "input_type": "query"}
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused", max_retries=0) as api:
        answers = {
            encoding: api.embeddings.create(
                model="nvidia/NV-Embed-v2", input=TEXTS[:2], encoding_format=encoding, extra_body=nim
            )
            for encoding in ("float", "base64")
        }
    numbers = np.array([each.embedding for each in answers["float"].data], expected.dtype)
    np.testing.assert_array_equal(numbers, expected)
    coded = [np.frombuffer(base64.b64decode(each.embedding), expected.dtype) for each in answers["base64"].data]
    np.testing.assert_array_equal(coded, expected)


def test_many_compact_vectors_come_whole(http, client):
    texts = [f"text {number}" for number in range(700)]
    answer = post(http, input=texts, embedding_type="uint8").json()["data"]
    np.testing.assert_array_equal(
        np.array([each["embedding"] for each in answer], np.uint8),
        client.embed_documents(texts, embedding_type="uint8"),
    )


def test_a_gateway_says_which_texts_were_cut_if_it_is_asked_and_how_many_in_any_case(http):
    def counted():
        return metric(http.get("/metrics").text, "nv_embed_gateway_truncated_texts_total")

    texts, before = ["short", LONG, LONG], counted()
    asked = post(http, input=texts, is_truncated=True)
    assert [each["is_truncated"] for each in asked.json()["data"]] == [False, True, True]
    for body in ({}, {"is_truncated": False}, {"is_truncated": None}):
        unasked = post(http, input=texts, **body)
        assert unasked.headers["x-truncated-texts"] == "2"
        assert not any("is_truncated" in each for each in unasked.json()["data"])
    assert asked.headers["x-truncated-texts"] == "2"
    assert http.post("/embed", json={"inputs": texts}).headers["x-truncated-texts"] == "2"
    assert counted() == before + 10
    assert "x-truncated-texts" not in post(http).headers
    many = post(http, input=[LONG, *(f"text {number}" for number in range(700))])  # in slices
    assert many.headers["x-truncated-texts"] == "1"


def test_a_page_in_a_browser_may_read_how_many_texts_were_cut(server, logs):
    origin = {"Origin": "https://example.org"}
    with gateway_client(logs / "cut-cors.log", server.url, "--cors-origin", "https://example.org") as http:
        answer = http.post("/v1/embeddings", json={"input": LONG}, headers=origin)
        assert answer.headers["x-truncated-texts"] == "1"
        assert "X-Truncated-Texts" in answer.headers["access-control-expose-headers"]


def test_a_gateway_describes_both_fields(gateway):
    page = httpx.get(f"{gateway}/openapi.json", trust_env=False).json()
    fields = page["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    assert fields["embedding_type"]["anyOf"][0]["enum"] == list(EMBEDDING_TYPES)
    assert fields["is_truncated"]["anyOf"][0] == {"type": "boolean"}

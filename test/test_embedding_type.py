"""The types in which vectors are sent: what each is made of, and how a real Triton answers with them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nv_embed.embedding_type import EmbeddingType
from nv_embed.requests import OUTPUTS
from nv_embed.scheduling.answers import Answer
from sentence_transformers.util import quantize_embeddings
from serving import MODEL_NAME, ROOT, Server, checkout

DTYPES = {
    "float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8, "binary": np.int8,
    "ubinary": np.uint8,
}  # fmt: skip
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 40))
ROWS = SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))


def unit_rows(num_rows: int, dimension: int) -> np.ndarray:
    rows = np.random.default_rng(dimension).standard_normal((num_rows, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# --- what each is made of -------------------------------------------------------------------------------


@given(rows=ROWS)
def test_signs_are_packed_as_sentence_transformers_packs_them(rows):
    for name in ("binary", "ubinary"):
        ours, theirs = EmbeddingType(name).packed(rows), quantize_embeddings(rows, name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype == DTYPES[name]


@given(rows=ROWS)
def test_whole_numbers_are_steps_of_one_size_and_uint8_is_int8_and_128(rows):
    int8 = EmbeddingType.INT8.packed(rows)
    step = 6 / 127 / np.sqrt(rows.shape[1])
    inside = np.abs(rows) <= 127 * step
    assert (np.abs(int8 * step - rows)[inside] <= 0.501 * step).all()
    assert (int8[~inside] == np.where(rows > 0, 127, -127)[~inside]).all()
    np.testing.assert_array_equal(EmbeddingType.UINT8.packed(rows), int8.astype(int) + 128)


@given(rows=ROWS)
def test_float16_is_the_nearest(rows):
    np.testing.assert_array_equal(EmbeddingType.FLOAT16.packed(rows), rows.astype(np.float16))


@given(rows=ROWS, num_more=st.integers(0, 200))
@settings(max_examples=50)
def test_an_answer_of_any_size_is_what_each_row_alone_is_and_knows_its_bytes(rows, num_more):
    vectors = [*rows, *np.repeat(rows[:1], num_more, axis=0)]
    for kind in EmbeddingType:
        answer = Answer(vectors, [1] * len(vectors), None, kind)
        packed = answer.embeddings()
        assert packed.dtype == DTYPES[kind.value]
        assert packed.nbytes == answer.num_bytes
        np.testing.assert_array_equal(packed, np.concatenate([kind.packed(vector[None]) for vector in vectors]))


@pytest.mark.parametrize("dimension", [64, 384, 1024, 4096])
def test_whole_numbers_keep_the_direction(dimension):
    rows = unit_rows(1000, dimension)
    assert cosines(EmbeddingType.INT8.packed(rows), rows).min() >= 0.9995
    uint8 = EmbeddingType.UINT8.packed(rows)
    assert cosines(uint8.astype(np.float32) - 128, rows).min() >= 0.9995
    assert (uint8.min(), uint8.max()) > (0, 128)


def test_the_config_declares_every_output_that_an_answer_may_have():
    text = (ROOT / "model_repository" / MODEL_NAME / "config.pbtxt").read_text(encoding="utf-8")
    assert {*re.findall(r'name: "(\w+)"', text[text.index("output [") :])} == OUTPUTS


# --- as Triton sends them -------------------------------------------------------------------------------

TEXTS = ["one text", "another, which is longer", "日本", ""]


@pytest.mark.parametrize("name", DTYPES)
def test_each_type_comes_in_an_output_of_its_own(toy_server, name):
    kind = EmbeddingType(name)
    expected = kind.packed(toy_server.embed_documents(TEXTS))
    for outputs in (None, [kind.output, "token_counts"]):
        answer = toy_server.infer(documents=TEXTS, parameters={"embedding_type": name}, outputs=outputs)
        assert set(answer) == {kind.output, "token_counts"}
        assert (answer[kind.output].dtype, answer[kind.output].shape) == (DTYPES[name], expected.shape)
        # What is computed twice may differ by a rounding, and then by a step or a sign.
        assert np.mean(answer[kind.output] == expected) > 0.9
    query = toy_server.infer(query=["x"], parameters={"embedding_type": name}, outputs=[kind.output])
    assert query[kind.output].shape == (1, expected.shape[1])


def test_the_cache_serves_all_types_from_one_vector(toy_server_of_64_tokens):
    server = toy_server_of_64_tokens
    vectors = server.embed_documents(TEXTS)
    for kind in EmbeddingType:
        answer = server.infer(documents=TEXTS, parameters={"embedding_type": kind.value}, outputs=[kind.output])
        np.testing.assert_array_equal(answer[kind.output], kind.packed(vectors))


@pytest.mark.parametrize(
    ("parameters", "outputs", "words"),
    [
        ({"embedding_type": "int8"}, ["embeddings"], "'embedding_type' is 'int8'; got 'embeddings'; name 'embeddings_"),
        ({"embedding_type": "int8"}, ["embeddings_int8", "embeddings_uint8"], "got 'embeddings_uint8'"),
        ({"embedding_type": "float"}, ["embeddings_binary"], "expected 'embeddings' as the only output with vectors"),
        ({}, ["embeddings", "embeddings_int8"], "because 'embedding_type' is 'float'; got 'embeddings_int8'"),
        ({"embedding_type": "int4"}, None, "'float', 'float16', 'int8', 'uint8', 'binary' or 'ubinary' as request"),
        ({"embedding_type": 8}, None, "a string as request parameter 'embedding_type'; got a value of type int"),
        ({"is_truncated": "yes"}, None, "true or false as request parameter 'is_truncated'; got 'yes'"),
    ],
)
def test_what_names_other_outputs_than_its_types_is_refused(toy_server, parameters, outputs, words):
    with pytest.raises(triton.InferenceServerException) as caught:
        toy_server.infer(documents=["x"], parameters=parameters, outputs=outputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert words in caught.value.message()


def test_whoever_names_every_output_gets_those_of_its_type(toy_server):
    for parameters, name in (({}, "embeddings"), ({"embedding_type": "ubinary"}, "embeddings_ubinary")):
        answer = toy_server.infer(documents=["x"], parameters=parameters, outputs=sorted(OUTPUTS))
        assert set(answer) == {name, "token_counts"}


def test_they_come_over_http_too_and_float16_only_in_binary(toy_server):
    body = {"inputs": [{"name": "query", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}
    expected = toy_server.embed_query("x")
    for name, dtype in (("int8", "INT8"), ("uint8", "UINT8"), ("binary", "INT8"), ("ubinary", "UINT8")):
        status, answer = toy_server.post(body | {"parameters": {"embedding_type": name}})
        assert status == 200
        (output,) = (each for each in answer["outputs"] if each["name"] == f"embeddings_{name}")
        packed = EmbeddingType(name).packed(expected)
        assert (output["datatype"], output["shape"]) == (dtype, list(packed.shape))
        assert np.mean(np.array(output["data"]) == packed.reshape(-1)) > 0.9
    status, answer = toy_server.post(body | {"parameters": {"embedding_type": "float16"}})
    assert status == 400
    assert "FP16 data via JSON is not supported" in answer["error"]


# --- which texts were cut -------------------------------------------------------------------------------

LONG = "many words " * 40


@pytest.mark.parametrize("asked", [True, "true"])
def test_an_answer_says_which_texts_were_cut_if_it_is_asked(toy_server_of_64_tokens, asked):
    server, texts = toy_server_of_64_tokens, ["short", LONG, "", LONG + "and more"]
    for _ in range(2):  # the second time from the cache
        for outputs in (None, ["is_truncated", "token_counts"]):
            answer = server.infer(documents=texts, parameters={"is_truncated": asked}, outputs=outputs)
            assert answer["is_truncated"].dtype == np.bool_
            assert answer["is_truncated"].tolist() == [False, True, False, True]
            assert answer["token_counts"].tolist()[1::2] == [64, 64]
    cut = server.infer(query=[LONG], parameters={"is_truncated": asked, "embedding_type": "int8"}, outputs=None)
    assert set(cut) == {"embeddings_int8", "token_counts", "is_truncated"}
    assert cut["is_truncated"].tolist() == [True]


def test_a_text_of_just_as_many_tokens_as_fit_was_not_cut(toy_server_of_64_tokens):
    server = toy_server_of_64_tokens
    text = ""
    while server.infer(documents=[text])["token_counts"][0] < 64:
        text += " a"
    fits, over = (
        server.infer(documents=[each], parameters={"is_truncated": True}, outputs=None) for each in (text, text + " a")
    )
    assert fits["token_counts"].tolist() == over["token_counts"].tolist() == [64]
    assert (fits["is_truncated"].tolist(), over["is_truncated"].tolist()) == ([False], [True])
    assert server.infer(documents=[text], parameters={"truncate": "NONE"})["token_counts"].tolist() == [64]


def test_nobody_is_told_who_does_not_ask(toy_server):
    for parameters in ({}, {"is_truncated": False}, {"is_truncated": "false"}):
        assert set(toy_server.infer(query=["x"], parameters=parameters, outputs=None)) == {"embeddings", "token_counts"}
    assert set(toy_server.infer(query=["x"], outputs=["embeddings", "is_truncated"])) == {"embeddings"}


# --- a config.pbtxt of before ---------------------------------------------------------------------------


def test_a_model_with_an_older_config_answers_as_before_and_says_what_it_lacks(toy, tmp_path):
    repository = checkout(tmp_path / "copy")
    path = repository / "model_repository" / MODEL_NAME / "config.pbtxt"
    old = re.sub(r' *\{\n *name: "(embeddings_|is_trunc)[^}]*\},\n', "", path.read_text(encoding="utf-8"))
    path.write_text(old, encoding="utf-8")
    with Server(repository / "log.txt", toy, command=[repository / "serve.sh"]) as server:
        assert set(server.infer(query=["x"], outputs=None)) == {"embeddings", "token_counts"}
        for parameters, output in (
            ({"embedding_type": "int8"}, "embeddings_int8"),
            ({"is_truncated": True}, "is_trunc"),
        ):
            with pytest.raises(triton.InferenceServerException, match=f"declares the output '{output}"):
                server.infer(query=["x"], parameters=parameters, outputs=None)
        with pytest.raises(triton.InferenceServerException, match="unexpected inference output 'is_truncated'"):
            server.infer(query=["x"], parameters={"is_truncated": True}, outputs=["is_truncated"])
        assert "expected the outputs embeddings_binary, embeddings_float16," in server.log_text()
        assert server.stop() == 0

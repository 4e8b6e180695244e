"""The served model over gRPC and HTTP, on a real tritonserver started by `serve.sh`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from serving import MODEL_NAME, ROOT, START_SECONDS, Server, bytes_input, free_ports

TOLERANCE = 1e-5
QUERY_INSTRUCTION = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "


@pytest.fixture(scope="session")
def golden(toy):
    expected = np.load(toy / "expected.npz")
    cases = json.loads((toy / "cases.json").read_text(encoding="utf-8"))
    return [(case, expected[case["name"]]) for case in cases]


def refused(server, **arguments) -> str:
    """The message with which a request is refused as invalid; the next one is served as if nothing happened."""
    with pytest.raises(triton.InferenceServerException) as caught:
        server.infer(**arguments)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT", caught.value
    assert server.embed_query("next").shape == (1, 64)
    return caught.value.message()


def test_every_case_of_the_original_is_answered_within_tolerance(toy_server, toy_server_of_64_tokens, golden):
    for case, expected in golden:
        server = toy_server_of_64_tokens if case["max_length"] == 64 else toy_server
        answer = server.infer(documents=case["texts"], parameters={"instruction": case["instruction"]})
        np.testing.assert_allclose(answer["embeddings"], expected, atol=TOLERANCE, err_msg=case["name"])
        assert answer["token_counts"].tolist() == [len(ids) for ids in case["input_ids"]]


def test_a_query_gets_the_standard_instruction(toy_server, golden):
    case, expected = golden[0]
    assert case["instruction"] == QUERY_INSTRUCTION
    for text, row in zip(case["texts"], expected, strict=True):
        np.testing.assert_allclose(toy_server.embed_query(text)[0], row, atol=TOLERANCE)


def test_the_instruction_parameter_replaces_the_default_of_either_input(toy_server):
    texts = ["one text", "another"]
    as_documents = toy_server.embed_documents(texts, instruction="Instruct: compare\nQuery: ")
    as_queries = [toy_server.embed_query(text, instruction="Instruct: compare\nQuery: ")[0] for text in texts]
    np.testing.assert_allclose(as_documents, as_queries, atol=TOLERANCE)
    plain = toy_server.embed_query("one text", instruction="")
    np.testing.assert_allclose(plain, toy_server.embed_documents(["one text"]), atol=TOLERANCE)
    assert abs(plain - as_documents[0]).max() > 1e-3


def test_a_client_that_names_no_outputs_gets_both_and_one_that_names_one_gets_one(toy_server):
    assert set(toy_server.infer(query=["x"], outputs=None)) == {"embeddings", "token_counts"}
    assert set(toy_server.infer(query=["x"], outputs=["embeddings"])) == {"embeddings"}
    answer = toy_server.infer(documents=["x", "y z"])
    assert (answer["embeddings"].dtype, answer["token_counts"].dtype) == (np.float32, np.int32)
    assert (answer["embeddings"].shape, answer["token_counts"].shape) == ((2, 64), (2,))


def test_64_concurrent_clients_get_exactly_their_own_rows(toy_server, golden):
    texts = [text for case, _ in golden for text in case["texts"] if len(text) < 400]
    alone = {text: toy_server.embed_documents([text])[0] for text in texts}

    def client(seed: int) -> None:
        random = Random(seed)
        for _ in range(8):
            mine = random.choices(texts, k=random.randint(1, 12))
            rows = toy_server.embed_documents(mine)
            np.testing.assert_allclose(rows, [alone[text] for text in mine], atol=TOLERANCE)

    with ThreadPoolExecutor(64) as clients:
        list(clients.map(client, range(64)))


def test_ten_thousand_documents_come_back_in_order(toy_server):
    texts = [f"{i} {i % 7}" for i in range(10_000)]
    rows = toy_server.embed_documents(texts)
    assert rows.shape == (10_000, 64)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    sample = [0, 1, 4_999, 9_998, 9_999]
    np.testing.assert_allclose(rows[sample], toy_server.embed_documents([texts[i] for i in sample]), atol=TOLERANCE)


# --- errors ---------------------------------------------------------------------------------------------


def test_neither_input_and_both_are_refused(toy_server):
    assert "exactly one of the inputs 'query' and 'documents'; got both" in refused(
        toy_server, query=["a"], documents=["b"]
    )
    assert "exactly one of the inputs 'query' and 'documents'; got neither" in refused(toy_server)


def test_no_documents_are_refused(toy_server):
    assert "expected at least 1 document; got 0" in refused(toy_server, documents=[])


def test_invalid_utf8_is_refused_with_its_place(toy_server):
    assert "text 1 with an invalid byte at position 2 of 3; encode it as UTF-8" in refused(
        toy_server, documents=[b"fine", b"ab\xff"]
    )
    assert "text 0 with an invalid byte" in refused(toy_server, query=[b"\xc3"])


def test_too_many_documents_and_bytes_are_refused(toy_server_of_64_tokens):
    server = toy_server_of_64_tokens
    assert "at most 20 documents a request; got 21; split" in refused(server, documents=["x"] * 21)
    assert "at most 8000 bytes" in refused(server, documents=["x" * 4001] * 2)
    assert "8020 bytes" in refused(server, documents=["x"] * 20, parameters={"instruction": "i" * 400})
    assert server.embed_documents(["x"] * 20).shape == (20, 64)


def test_truncate_none_refuses_what_end_cuts(toy_server_of_64_tokens):
    server, text = toy_server_of_64_tokens, "many words " * 40
    message = refused(server, documents=["short", text], parameters={"truncate": "NONE"})
    assert "at most 64 tokens" in message
    assert "text 1 with" in message
    for parameters in ({}, {"truncate": "END"}):
        assert server.infer(documents=[text], parameters=parameters)["token_counts"].tolist() == [64]
    assert server.embed_documents(["short"], truncate="NONE").shape == (1, 64)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"truncate": "START"}, "'END' or 'NONE' as request parameter 'truncate'; got 'START'"),
        ({"truncate": 1}, "a string as request parameter 'truncate'; got a value of type int"),
        ({"instruction": True}, "a string as request parameter 'instruction'; got a value of type bool"),
        (
            {"dimensions": 256},
            "'truncate', 'embedding_type', 'is_truncated' and 'model_info'; got 'dimensions'; leave it out",
        ),
        ({"model_info": "1"}, "true or false as request parameter 'model_info'; got '1'"),
    ],
)
def test_bad_parameters_are_refused(toy_server, parameters, words):
    assert words in refused(toy_server, query=["a"], parameters=parameters)


def test_parameters_that_proxies_add_are_ignored(toy_server):
    parameters = {"x-request-id": "7", "traceparent": "00-1-2-01"}
    assert toy_server.infer(query=["a"], parameters=parameters)["embeddings"].shape == (1, 64)


def test_an_instruction_that_leaves_nothing_to_pool_is_refused(toy_server_of_64_tokens):
    message = refused(toy_server_of_64_tokens, query=["a"], parameters={"instruction": "many words " * 40})
    assert "leaves some of each text" in message
    assert "shorten the instruction" in message


def test_http_gives_the_same_vectors_and_errors(toy_server):
    tensor = {"name": "documents", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "日本"]}
    status, answer = toy_server.post({"inputs": [tensor], "parameters": {"instruction": "I: "}})
    assert status == 200
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in answer["outputs"]}
    expected = toy_server.embed_documents(["a", "日本"], instruction="I: ")
    np.testing.assert_allclose(outputs["embeddings"], expected, atol=TOLERANCE)
    status, answer = toy_server.post({"inputs": [tensor], "parameters": {"truncate": "no"}})
    assert (status, "expected 'END' or 'NONE'" in answer["error"]) == (400, True)


def test_no_message_or_log_line_holds_request_text_a_path_or_a_stack(toy_server_of_64_tokens):
    server, secret = toy_server_of_64_tokens, "qzxsecretqzx"
    refusals = [
        {"documents": [f"{secret} " * 40], "parameters": {"truncate": "NONE"}},
        {"documents": [secret.encode() + b"\xff"]},
        {"query": [secret], "documents": [secret]},
        {"query": [secret], "parameters": {"instruction": f"{secret} " * 40}},
        {"documents": [secret] * 21},
    ]
    for arguments in refusals:
        message = refused(server, **arguments)
        assert message.startswith("expected "), message
        for leak in (secret, "Traceback", ".py", str(ROOT)):
            assert leak not in message
    server.embed_query(secret)
    log = server.log_text()
    assert secret not in log
    assert "Traceback" not in log


ONE = [{"name": "query", "shape": [1], "datatype": "BYTES", "data": ["x"]}]
NONE = [{"name": "documents", "shape": [1, 0], "datatype": "BYTES", "data": []}]
MANY = [{"name": "documents", "shape": [1, 21], "datatype": "BYTES", "data": ["x"] * 21}]
LONG = [{"name": "documents", "shape": [1, 1], "datatype": "BYTES", "data": ["many words " * 40]}]


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        (ONE + NONE, {}, "got both"),
        (NONE, {}, "at least 1 document; got 0"),
        (MANY, {}, "at most 20 documents a request; got 21"),
        (LONG, {"truncate": "NONE"}, "at most 64 tokens"),
        (ONE, {"truncate": "no"}, "expected 'END' or 'NONE'"),
        (ONE, {"truncate": 7}, "a value of type int"),
        (ONE, {"instruction": "many words " * 40}, "leaves some of each text"),
        (ONE, {"instruction": "x" * 8000}, "at most 8000 bytes"),
        (ONE, {"top_k": 1}, "got 'top_k'"),
    ],
)
def test_bad_input_over_http_is_answered_400_with_the_same_words(toy_server_of_64_tokens, inputs, parameters, words):
    status, answer = toy_server_of_64_tokens.post({"inputs": inputs, "parameters": parameters})
    assert status == 400
    assert words in answer["error"]


# --- clients that leave ---------------------------------------------------------------------------------


def test_clients_that_cancel_or_run_out_of_time_disturb_no_other(toy_server):
    expected = toy_server.embed_documents(["stays"])

    async def leave_and_stay() -> None:
        async with triton_aio.InferenceServerClient(toy_server.url) as client:
            bulks = [
                bytes_input("documents", [f"some words {k} to compute {i}" for i in range(3000)]) for k in range(8)
            ]
            leaving = [asyncio.ensure_future(client.infer(MODEL_NAME, [bulk])) for bulk in bulks[:5]]
            late = [asyncio.ensure_future(client.infer(MODEL_NAME, [b], client_timeout=0.2)) for b in bulks[5:]]
            await asyncio.to_thread(toy_server.metrics_once, lambda metrics: metrics["nv_embed_queue_tokens"] > 0)
            for task in leaving:
                task.cancel()
            result = await client.infer(MODEL_NAME, [bytes_input("documents", ["stays"])])
            np.testing.assert_allclose(result.as_numpy("embeddings"), expected, atol=TOLERANCE)
            outcomes = await asyncio.gather(*leaving, *late, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[:5])
            assert {outcome.status() for outcome in outcomes[5:]} == {"StatusCode.DEADLINE_EXCEEDED"}

    asyncio.run(leave_and_stay())
    np.testing.assert_allclose(toy_server.embed_documents(["stays"]), expected, atol=TOLERANCE)


# --- settings -------------------------------------------------------------------------------------------


def test_settings_reach_what_they_are_of_and_known_texts_come_from_the_cache(toy, tmp_path):
    values = {
        "TARGET_BATCH_MILLISECONDS": 50, "MAX_QUEUE_TOKENS": 50_000, "MAX_QUEUE_BYTES": 2**26 + 1,
        "MAX_QUEUE_TEXTS": 20_000, "MAX_QUEUE_MILLISECONDS": 1500, "QUERY_WEIGHT": 3, "CACHE_MEBIBYTES": 2,
    }  # fmt: skip
    settings = {f"NV_EMBED_{name}": str(value) for name, value in values.items()}
    server = Server(tmp_path / "log.txt", toy, settings).wait_until_ready()
    first, second = (server.embed_documents(["the same"]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    counts = {f'nv_embed_texts_total{{source="{source}"}}': 1 for source in ("computed", "cached")}
    server.metrics_once(lambda metrics: counts.items() <= metrics.items())
    assert server.stop() == 0
    limits = (
        "target_batch_seconds=0.05, max_queue_tokens=50000, max_queue_bytes=67108865, max_queue_texts=20000, "
        "max_queue_seconds=1.5, query_weight=3, cache_bytes=2097152)"
    )
    assert limits in server.log_text()


# --- a start that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"NV_EMBED_MAX_BATCH_TOKENS": "lots"}, "NV_EMBED_MAX_BATCH_TOKENS: expected 'auto' or a whole number"),
        (
            {"NV_EMBED_DEVCE": "cpu"},
            "environment: expected the name of a setting; got NV_EMBED_DEVCE; correct it or unset it; known: ",
        ),
        ({"NV_EMBED_MAX_QUEUE_TOKENS": "100"}, "expected max_sequence_tokens to be at most max_queue_tokens"),
        (
            {"NV_EMBED_MAX_SEQUENCE_TOKENS": "16"},
            "query_prompt, or max_sequence_tokens: no query could be embedded: expected an instruction",
        ),
    ],
)
def test_a_bad_setting_ends_the_start_with_its_name(toy, tmp_path, environ, words):
    server = Server(tmp_path / "log.txt", toy, environ)
    assert server.process.wait(START_SECONDS) != 0
    assert f"the server does not start: {words}" in server.log_text()
    assert "Traceback" not in server.log_text()


def test_an_incomplete_checkpoint_ends_the_start_with_what_is_missing(toy, tmp_path):
    checkpoint = shutil.copytree(toy, tmp_path / "checkpoint")
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    server = Server(tmp_path / "log.txt", checkpoint)
    assert server.process.wait(START_SECONDS) != 0
    assert "1 of 2 shards missing: model-00002-of-00002.safetensors" in server.log_text()


# --- the default checkpoint -----------------------------------------------------------------------------


def test_the_smoke_test_passes_on_what_serve_sh_serves_by_default(mini_server):
    assert "not NV-Embed-v2" in mini_server.log_text()
    result = subprocess.run(
        [sys.executable, ROOT / "test" / "test-nv-embed-v2.py"],
        env={"TRITON_URL": mini_server.url}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 of 3 hold" in result.stdout


def test_the_smoke_test_fails_without_a_server_and_on_the_wrong_model_card(mini_server):
    (nobody,) = free_ports(1)
    smoke = [sys.executable, ROOT / "test" / "test-nv-embed-v2.py"]
    absent = subprocess.run(
        smoke, env={"TRITON_URL": f"localhost:{nobody}"}, capture_output=True, text=True, check=False
    )
    assert absent.returncode == 1
    assert "0 of 3 hold" in absent.stdout
    other = subprocess.run(
        [*smoke, "--model-card"], env={"TRITON_URL": mini_server.url}, capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "FAIL  model card" in other.stdout

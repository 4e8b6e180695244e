"""Two models in one repository: of other kinds, prompts and lengths, by both clients and through the gateway."""

import asyncio
import os
import re
import shutil
from pathlib import Path

import numpy as np
import openai
import pytest
from conftest import MINI, REPO, TOY, Address, eventually, gateway_client, gateway_running, running
from model_folders import config_with, fill
from nv_embed_client import (
    AsyncNVEmbedClient,
    GrpcTransport,
    InvalidInput,
    NVEmbedClient,
    NVEmbedEncoder,
    ServerFailure,
    ServerTooOld,
    Unavailable,
)
from nv_embed_client.connection import Connection
from nv_embed_client.gateway.__main__ import main
from nv_embed_client.gateway.names import Meaning, Named, names_of
from started_server import free_ports
from test_openapi import run_schemathesis

TEXTS = ["How do magnets work?", "Magnets attract iron.", "日本"]
NEMOTRON = REPO / "test" / "data" / "nemotron-toy"  # with prompts of its own


def add_model(repository: Path, name: str, **settings: str) -> None:
    """A model as an operator adds one: a configuration, and a link to the code of the first."""
    folder = repository / name
    folder.mkdir(parents=True)
    fill(folder, config_with(name, {"dtype": "float32", "device": "cpu", **settings}), "../nv-embed-v2/1")
    if name == "nv-embed-v2":
        (folder / "1").unlink()
        shutil.copytree(REPO / "model_repository/nv-embed-v2/1", folder / "1")


def triton(repository: Path, address: Address, log: Path):
    """Triton itself, because serve.sh's settings are those of all models."""
    venv = Path(os.environ.get("NV_EMBED_SERVER_VENV") or os.environ.get("VENV") or REPO / ".venv")
    command = [
        venv / "bin/python", REPO / "tools/pip_triton.py", f"--model-repository={repository}",
        f"--http-port={address.http}", f"--grpc-port={address.grpc}", f"--metrics-port={address.metrics}",
        "--disable-auto-complete-config", "--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0",
    ]  # fmt: skip
    return running(command, f"http://127.0.0.1:{address.http}/v2/health/ready", log)


@pytest.fixture(scope="module")
def two_model_server(tmp_path_factory, logs):
    repository, address = tmp_path_factory.mktemp("models"), Address(*free_ports(3))
    add_model(repository, "nv-embed-v2", model_path=str(MINI), max_sequence_tokens="512")
    add_model(repository, "second", model_path=str(NEMOTRON), max_sequence_tokens="64")
    with triton(repository, address, logs / "two-models.log"):
        yield address


@pytest.fixture(scope="module")
def first(two_model_server):
    with NVEmbedClient(two_model_server.url) as client:
        yield client


@pytest.fixture(scope="module")
def second(two_model_server):
    with NVEmbedClient(two_model_server.url, "second") as client:
        yield client


def test_each_model_says_what_it_is(first, second):
    one, other = first.model_info(), second.model_info()
    assert (one.name, one.dimension, one.max_sequence_tokens, one.document_prompt) == ("nv-embed-v2", 384, 512, "")
    assert (other.name, other.dimension) == ("second", 64) == ("second", second.dimension())
    assert (other.query_prompt, other.document_prompt, other.max_sequence_tokens) == ("query: ", "passage: ", 64)
    assert (one.kind, other.kind) == ("nv_embed", "nemotron")
    assert (one.dtype, one.device) == (other.dtype, other.device) == ("float32", "cpu")
    assert one.fingerprint != other.fingerprint


def test_queries_have_the_model_s_own_prompt_however_many_are_in_a_request(second):
    together = second.embed_queries(TEXTS)
    alone = [second.embed_query(text)[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    explicit = second.embed_documents(TEXTS, instruction="query: ")
    np.testing.assert_allclose(together, explicit, atol=1e-5)
    encoder = NVEmbedEncoder(second)
    np.testing.assert_allclose(encoder.encode_query(TEXTS), together, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_document(TEXTS), second.embed_documents(TEXTS), atol=1e-5)


def test_two_clients_share_a_connection_that_outlives_either(two_model_server, first, second):
    async def main():
        transport = GrpcTransport(Connection(two_model_server.url))
        async with AsyncNVEmbedClient(transport=transport.for_model("second")) as other:
            async with AsyncNVEmbedClient(transport=transport.for_model("nv-embed-v2")) as one:
                vectors = await asyncio.gather(one.embed_documents(TEXTS), other.embed_documents(TEXTS))
                assert (await one.model_info()).name == "nv-embed-v2"
            assert (await other.model_info()).name == "second"
            assert await other.is_ready()
            transport.close()
            with pytest.raises(Unavailable, match="closed"):
                await other.model_info(0.5)
        return vectors

    for got, client in zip(asyncio.run(main()), (first, second), strict=True):
        np.testing.assert_allclose(got, client.embed_documents(TEXTS), atol=1e-5)


def test_a_server_from_before_model_info_is_asked_the_old_way(tmp_path, logs):
    """Its configuration has no such output, so Triton refuses what names it, as it does for an older release."""
    repository, address = tmp_path / "models", Address(*free_ports(3))
    add_model(repository, "nv-embed-v2", model_path=str(TOY))
    config = repository / "nv-embed-v2" / "config.pbtxt"
    new = r',\s*(#[^\n]*\s*)?{\s*name: "(model_info|is_truncated|embeddings_\w+)".*?}'
    old, count = re.subn(new, "", config.read_text("utf-8"), flags=re.DOTALL)
    assert count == 7
    config.write_text(old, "utf-8")
    with triton(repository, address, logs / "old.log"), NVEmbedClient(address.url) as client:
        assert client.dimension() == 64
        alone = [client.embed_query(text)[0] for text in TEXTS]
        np.testing.assert_allclose(client.embed_queries(TEXTS), alone, atol=1e-5)
        with pytest.raises(ServerFailure, match="got an older one; update the server"):
            client.model_info()
        for asked in ({"embedding_type": "int8"}, {"is_truncated": True}):
            with pytest.raises(ServerTooOld, match="unexpected inference output"):
                client.embed(TEXTS, **asked)
        with gateway_client(logs / "before-old.log", address.url) as http:
            assert "dimension" not in http.get("/v1/models/nv-embed-v2").json()
            assert http.post("/v1/embeddings", json={"input": TEXTS, "dimensions": 64}).status_code == 200
            assert http.get("/info").status_code == 424
            for asked in ({"embedding_type": "int8"}, {"is_truncated": True}):
                refused = http.post("/v1/embeddings", json={"input": TEXTS, **asked})
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "server_too_old")
            eventually(lambda: "got an older one" in (logs / "before-old.log").read_text())


# --- the gateway ----------------------------------------------------------------------------------------

ARGUMENTS = (
    "--model-name", "nv-embed-v2", "--model-name", "second", "--alias", "small=second-query",
    "--alias", "riddles=second=Instruct: Answer\\nQuery: ",
)  # fmt: skip


@pytest.fixture(scope="module")
def gateway(two_model_server, logs):
    with gateway_running(logs / "several.log", two_model_server.url, *ARGUMENTS) as base:
        yield base


def test_the_gateway_lists_all_names_with_what_their_models_are(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused") as models:
        listed = {model.id: (model.dimension, model.max_model_len) for model in models.models.list()}
        first, second = (384, 512), (64, 64)
        assert listed == {
            **dict.fromkeys(("nv-embed-v2", "nv-embed-v2-query", "nv-embed-v2-passage", "nvidia/NV-Embed-v2"), first),
            **dict.fromkeys(("second", "second-query", "second-passage", "small", "riddles"), second),
        }
        assert models.models.retrieve("small").dimension == 64


def test_the_gateway_asks_the_model_that_a_name_means(http, first, second):
    expected = {
        None: first.embed_documents(TEXTS),
        "nv-embed-v2-query": first.embed_queries(TEXTS),
        "second": second.embed_documents(TEXTS),
        "second-query": second.embed_queries(TEXTS),
        "small": second.embed_queries(TEXTS),
        "riddles": second.embed_queries(TEXTS, instruction="Instruct: Answer\nQuery: "),
    }
    for name, vectors in expected.items():
        answer = http.post("/v1/embeddings", json={"model": name, "input": TEXTS}).json()
        np.testing.assert_allclose([each["embedding"] for each in answer["data"]], vectors, atol=1e-5)
        assert answer["model"] == (name or "nv-embed-v2")
    np.testing.assert_allclose(http.post("/embed", json={"inputs": TEXTS}).json(), expected[None], atol=1e-5)


def test_each_model_accepts_its_own_dimensions(http):
    def status(name, dimensions):
        answer = http.post("/v1/embeddings", json={"model": name, "input": "a", "dimensions": dimensions})
        return answer.status_code

    assert [status("nv-embed-v2", 384), status("second", 64)] == [200, 200]
    assert [status("nv-embed-v2", 64), status("small", 384)] == [400, 400]


def test_paths_without_names_speak_of_the_first_model(http):
    assert http.get("/info").json()["model_id"] == "nv-embed-v2"
    assert [each["shortName"] for each in http.get("/v1/metadata").json()["modelInfo"]] == ["nv-embed-v2"]
    assert http.get("/health/ready").status_code == 200


def test_the_gateway_does_what_its_page_says_of_several_models(gateway, http, tmp_path):
    fields = http.get("/openapi.json").json()["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    assert fields["dimensions"]["anyOf"][0]["enum"] == [64, 384]
    assert "small" in fields["model"]["anyOf"][0]["enum"]
    report = run_schemathesis(
        gateway, tmp_path, "--include-path-regex", "^/v1/(embeddings|models)", "--max-examples", "20"
    )
    assert "No issues found" in report


# --- names ------------------------------------------------------------------------------------------------


def test_an_alias_of_several_models_says_which():
    names = names_of(["a", "b"], ["c=b", "d=c", "e=b-query", "f=b=Instruct: x\\nQuery: "])
    assert [names[name].model for name in "abcdef"] == ["a", "b", "b", "b", "b", "b"]
    assert names["e"] == Named("b", Meaning("query"))
    assert names["f"] == Named("b", Meaning("query", "Instruct: x\nQuery: "))
    assert names_of(["a"], ["b"])["b"] == Named("a")
    assert names_of(["a"], ["b=Instruct: x=y"])["b"].meaning.instruction == "Instruct: x=y"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-name", "a", "--model-name", "a"], "got 'a', 'a-passage', 'a-query' twice; give each"),
        (["--model-name", "a", "--model-name", "a-query"], "got 'a-query' twice;"),
        (["--model-name", "nv-embed-v2", "--model-name", "nvidia/NV-Embed-v2"], "got 'nvidia/NV-Embed-v2' twice;"),
        (["--model-name", ""], "a model name that is not empty"),
        (
            ["--model-name", "a", "--model-name", "b", "--alias", "c"],
            "says which of several models it means; got none;",
        ),
        (["--model-name", "a", "--model-name", "b", "--alias", "c=Instruct: x"], "write NAME=MODEL or 'NAME=MODEL=In"),
        (["--model-name", "a", "--model-name", "b", "--alias", "c=d=Instruct: x"], "a known model, or an instruction"),
        (["--model-name", "a", "--model-name", "b", "--alias", "b=a"], "an alias that no model has yet; got 'b'"),
    ],
)
def test_names_that_do_not_say_which_model_end_the_start_with_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_shared_transport_refuses_a_name_that_makes_no_sense():
    with pytest.raises(InvalidInput, match="model name that is not empty"):
        GrpcTransport(Connection()).for_model("")

"""Chroma with the served model. Runs where Chroma is: in the environment of test/recipes.sh."""

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from corpus import DOCUMENTS, QUERIES

pytest.importorskip("chromadb", reason="too heavy for this environment: test/recipes.sh has it")

import chromadb
from nv_embed_client.chroma import NVEmbedEmbeddingFunction

QUESTION = QUERIES["q-bread"]
IN_ANOTHER_PROCESS = """
import json, sys
import chromadb
{imported}
collection = chromadb.PersistentClient(sys.argv[1]).get_collection("texts")
found = collection.query(query_texts=[sys.argv[2]], n_results=10)
print(json.dumps(dict(zip(found["ids"][0], found["distances"][0]))))
"""


@pytest.fixture
def function(server):
    function = NVEmbedEmbeddingFunction(server.url, query_instruction="Find: ")
    yield function
    function.close()


def filled(folder, function):
    collection = chromadb.PersistentClient(folder).create_collection("texts", embedding_function=function)
    collection.add(ids=list(DOCUMENTS), documents=list(DOCUMENTS.values()))
    return collection


def expected_distances(client, instruction):
    cosines = client.embed_query(QUESTION, instruction=instruction)[0] @ client.embed_documents(DOCUMENTS.values()).T
    return dict(zip(DOCUMENTS, 1 - cosines, strict=True))


@pytest.mark.parametrize("instruction", [None, "Find: "])
def test_query_texts_are_queries_and_documents_are_documents(server, client, instruction, tmp_path):
    function = NVEmbedEmbeddingFunction(server.url, query_instruction=instruction)
    collection = filled(tmp_path, function)
    stored = collection.get(ids=list(DOCUMENTS), include=["embeddings", "documents"])
    np.testing.assert_allclose(stored["embeddings"], client.embed_documents(stored["documents"]), atol=1e-5)
    found = collection.query(query_texts=[QUESTION], n_results=10)
    distances = dict(zip(found["ids"][0], found["distances"][0], strict=True))
    assert distances == pytest.approx(expected_distances(client, instruction), abs=1e-4)
    function.close()


def in_another_process(folder, imported):
    return subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS.format(imported=imported), folder, QUESTION],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_another_process_finds_the_function_of_a_collection(client, function, tmp_path):
    filled(tmp_path, function)
    done = in_another_process(tmp_path, "import nv_embed_client.chroma")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(expected_distances(client, "Find: "), abs=1e-4)


def test_a_process_without_the_module_is_told_and_gets_no_other_function(function, tmp_path):
    filled(tmp_path, function)
    done = in_another_process(tmp_path, "")
    assert done.returncode != 0
    assert "nv-embed" in done.stderr.splitlines()[-1]


def test_what_is_stored_holds_no_headers(server):
    function = NVEmbedEmbeddingFunction(server.url, headers={"authorization": "secret"})
    assert "secret" not in json.dumps(function.get_config())
    function.close()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda function: pickle.loads(pickle.dumps(function))], ids=["copied", "pickled"]
)
def test_a_copy_embeds_as_the_original(function, copied):
    other = copied(function)
    assert other.get_config() == function.get_config()
    np.testing.assert_allclose(other.embed_query(["a"]), function.embed_query(["a"]), atol=1e-5)
    other.close()

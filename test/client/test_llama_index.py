"""The LlamaIndex adapter in LlamaIndex's own in-memory index."""

import asyncio

import numpy as np
import pytest
from corpus import DOCUMENTS, QUERIES
from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from nv_embed_client import InvalidInput
from nv_embed_client.llama_index import NVEmbedEmbedding


@pytest.fixture(scope="module")
def embedding(server):
    return NVEmbedEmbedding(server.url)


@pytest.fixture(scope="module")
def index(embedding):
    nodes = [TextNode(text=text, id_=name) for name, text in DOCUMENTS.items()]
    return VectorStoreIndex(nodes, embed_model=embedding)


def test_an_index_finds_the_documents_of_queries(index, default_checkpoint):
    retriever = index.as_retriever(similarity_top_k=1)
    found = [retriever.retrieve(query)[0].node_id for query in QUERIES.values()]
    if default_checkpoint:
        hits = sum(f"q-{name}" == query for name, query in zip(found, QUERIES, strict=True))
        assert hits >= 6, found


def test_the_async_side_finds_the_same(index):
    retriever = index.as_retriever(similarity_top_k=3)
    for question in list(QUERIES.values())[:2]:
        found = asyncio.run(retriever.aretrieve(question))
        assert [each.node_id for each in found] == [each.node_id for each in retriever.retrieve(question)]


def test_queries_and_texts_are_embedded_as_such(embedding, client):
    text = "how do magnets work?"
    np.testing.assert_allclose(embedding.get_query_embedding(text), client.embed_query(text)[0], atol=1e-5)
    np.testing.assert_allclose(embedding.get_text_embedding(text), client.embed_documents([text])[0], atol=1e-5)

    async def both():
        return await asyncio.gather(embedding.aget_query_embedding(text), embedding.aget_text_embedding_batch([text]))

    query, texts = asyncio.run(both())
    np.testing.assert_allclose(query, client.embed_query(text)[0], atol=1e-5)
    np.testing.assert_allclose(texts[0], client.embed_documents([text])[0], atol=1e-5)


def test_its_settings_are_fields(server, client):
    embedding = NVEmbedEmbedding(server.url, query_instruction="Find: ", client_settings={"request_timeout": 5.0})
    expected = client.embed_query("text", instruction="Find: ")[0]
    np.testing.assert_allclose(embedding.get_query_embedding("text"), expected, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(embedding.aget_query_embedding("text")), expected, atol=1e-5)
    described = embedding.to_dict()
    assert described["url"] == server.url
    assert described["query_instruction"] == "Find: "
    assert described["model_name"] == "nv-embed-v2"


def test_an_instruction_with_a_nul_is_refused():
    with pytest.raises(InvalidInput, match="NUL"):
        NVEmbedEmbedding(query_instruction="Find\0: ")

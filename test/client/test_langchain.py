"""The LangChain adapter in LangChain's own in-memory store, and in FAISS by hand."""

import asyncio

import faiss
import numpy as np
import pytest
from corpus import DOCUMENTS, QUERIES
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from nv_embed_client import InvalidInput
from nv_embed_client.langchain import NVEmbedEmbeddings


@pytest.fixture(scope="module")
def embeddings(server):
    return NVEmbedEmbeddings(server.url)


def test_a_vector_store_finds_the_documents_of_queries(embeddings, default_checkpoint):
    store = InMemoryVectorStore(embeddings)
    store.add_documents([Document(text, id=name) for name, text in DOCUMENTS.items()])
    found = [store.similarity_search(query, k=1)[0].id for query in QUERIES.values()]
    if default_checkpoint:
        hits = sum(f"q-{name}" == query for name, query in zip(found, QUERIES, strict=True))
        assert hits >= 6, found


def test_the_async_side_gives_the_same_in_any_number_of_event_loops(embeddings):
    texts = list(DOCUMENTS.values())

    async def both():
        return await asyncio.gather(embeddings.aembed_query("how?"), embeddings.aembed_documents(texts))

    for _ in range(2):
        query, documents = asyncio.run(both())
        np.testing.assert_allclose(query, embeddings.embed_query("how?"), atol=1e-5)
        np.testing.assert_allclose(documents, embeddings.embed_documents(texts), atol=1e-5)


def test_an_async_retriever_finds_what_the_sync_one_finds(embeddings):
    store = InMemoryVectorStore(embeddings)
    store.add_texts(list(DOCUMENTS.values()))
    question = next(iter(QUERIES.values()))
    found = asyncio.run(store.as_retriever(search_kwargs={"k": 3}).ainvoke(question))
    assert [document.page_content for document in found] == [
        document.page_content for document in store.similarity_search(question, k=3)
    ]


def test_faiss_takes_its_vectors(embeddings):
    vectors = np.array(embeddings.embed_documents(list(DOCUMENTS.values())), np.float32)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, rows = index.search(vectors[:3], 1)
    assert rows[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-4)


def test_a_query_instruction_can_be_set(server, client):
    embeddings = NVEmbedEmbeddings(server.url, query_instruction="Find: ")
    expected = client.embed_query("text", instruction="Find: ")[0]
    np.testing.assert_allclose(embeddings.embed_query("text"), expected, atol=1e-5)
    np.testing.assert_allclose(asyncio.run(embeddings.aembed_query("text")), expected, atol=1e-5)


def test_an_instruction_with_a_nul_is_refused():
    with pytest.raises(InvalidInput, match="NUL"):
        NVEmbedEmbeddings(query_instruction="Find\0: ")

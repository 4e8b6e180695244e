"""BEIR's exact search with the served model."""

import numpy as np
import pytest
import torch
from beir.retrieval.evaluation import EvaluateRetrieval
from beir.retrieval.search.dense import DenseRetrievalExactSearch
from corpus import DOCUMENTS, QUERIES, RELEVANT
from nv_embed_client import TASK_INSTRUCTIONS, NVEmbedEncoder
from nv_embed_client.beir import NVEmbedRetriever

CORPUS = {name: {"title": name, "text": text} for name, text in DOCUMENTS.items()}
TITLED = [f"{name} {text}" for name, text in DOCUMENTS.items()]


@pytest.fixture(scope="module")
def model(client):
    return NVEmbedEncoder(client)


def test_beir_scores_the_served_model(model, default_checkpoint):
    search = DenseRetrievalExactSearch(NVEmbedRetriever(model), show_progress_bar=False)
    evaluation = EvaluateRetrieval(search, score_function="cos_sim")
    found = evaluation.retrieve(CORPUS, QUERIES)
    relevant = {query: dict.fromkeys(documents, 1) for query, documents in RELEVANT.items()}
    ndcg, _, _, _ = evaluation.evaluate(relevant, found, [10])
    assert 0 <= ndcg["NDCG@10"] <= 1
    if default_checkpoint:
        assert ndcg["NDCG@10"] >= 0.8


def test_queries_are_asked_as_queries_and_documents_have_title_and_text(model, client):
    search = DenseRetrievalExactSearch(NVEmbedRetriever(model), show_progress_bar=False)
    found = search.search(CORPUS, QUERIES, 10, "cos_sim")
    cosines = client.embed_queries(QUERIES.values()) @ client.embed_documents(TITLED).T
    for name, row in zip(QUERIES, cosines, strict=True):
        np.testing.assert_allclose([found[name][document] for document in CORPUS], row, atol=1e-4)


def test_a_prompt_is_the_instruction_of_a_task(model, client):
    retriever = NVEmbedRetriever(model, prompt_name="SciFact")
    expected = client.embed_queries(["a"], instruction=TASK_INSTRUCTIONS["SciFact"])
    np.testing.assert_allclose(retriever.encode_queries(["a"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "corpus",
    [
        list(CORPUS.values()),
        {"title": list(DOCUMENTS), "text": list(DOCUMENTS.values())},
        TITLED,
        [{"text": text} for text in TITLED],
    ],
)
def test_every_form_of_a_corpus_is_the_same(model, client, corpus):
    vectors = NVEmbedRetriever(model).encode_corpus(corpus, convert_to_tensor=True)
    assert isinstance(vectors, torch.Tensor)
    np.testing.assert_allclose(vectors.numpy(), client.embed_documents(TITLED), atol=1e-5)

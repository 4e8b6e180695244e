"""KeyBERT with the served model."""

import copy
import pickle

import numpy as np
import pytest
from corpus import DOCUMENTS
from keybert import KeyBERT
from nv_embed_client import NVEmbedEncoder
from nv_embed_client.keybert import NVEmbedBackend

TEXT = DOCUMENTS["bread"]


@pytest.fixture(scope="module")
def backend(client):
    return NVEmbedBackend(NVEmbedEncoder(client))


def test_the_scores_of_keywords_are_the_served_models(backend, client):
    keywords = KeyBERT(backend).extract_keywords(TEXT, top_n=3)
    assert len(keywords) == 3
    vectors = client.embed_documents([word for word, _ in keywords])
    cosines = (vectors @ client.embed_documents([TEXT]).T).ravel()
    np.testing.assert_allclose([score for _, score in keywords], cosines, atol=1e-3)


def test_many_documents_at_once(backend):
    assert [len(found) for found in KeyBERT(backend).extract_keywords(list(DOCUMENTS.values()), top_n=2)] == [2] * 10


def test_an_instruction_stands_before_all_texts(client):
    backend = NVEmbedBackend(NVEmbedEncoder(client), instruction="Find: ")
    expected = client.embed_documents(["a", "b"], instruction="Find: ")
    np.testing.assert_allclose(backend.embed(np.array(["a", "b"], dtype=object)), expected, atol=1e-5)


def test_an_encoder_is_refused_and_not_replaced_by_another_model(client):
    with pytest.raises(ValueError, match="SentenceTransformer"):
        KeyBERT(NVEmbedEncoder(client))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda backend: pickle.loads(pickle.dumps(backend))], ids=["copied", "pickled"]
)
def test_a_copy_embeds_as_the_original(server, copied):
    backend = NVEmbedBackend(server.url, instruction="Find: ")
    expected = backend.embed(["a"])
    other = copied(backend)
    np.testing.assert_allclose(other.embed(["a"]), expected, atol=1e-5)
    for each in (backend, other):
        each.embedding_model.close()

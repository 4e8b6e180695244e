"""BERTopic with the served model. Runs where BERTopic is: in the environment of test/recipes.sh."""

import copy
import pickle

import numpy as np
import pytest
from nv_embed_client import NVEmbedEncoder

pytest.importorskip("bertopic", reason="too heavy for this environment: test/recipes.sh has it")

from bertopic import BERTopic
from nv_embed_client.bertopic import NVEmbedBackend
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

KITCHEN = [f"We baked bread with {word} in the kitchen." for word in ("dough", "yeast", "flour", "butter", "sugar")]
SKY = [f"The telescope showed us {word} in the night sky." for word in ("moons", "suns", "stars", "comets", "planets")]
TERM = "Why does bread dough rise?"


def fitted(embedding_model, **settings):
    """A model that needs no more texts than these: BERTopic's own reduction and clustering want hundreds."""
    topics = BERTopic(
        embedding_model=embedding_model, umap_model=PCA(n_components=3), hdbscan_model=KMeans(3), **settings
    )
    return topics.fit(KITCHEN + SKY)


@pytest.fixture
def backend(server):
    backend = NVEmbedBackend(server.url, query_instruction="Find: ")
    yield backend
    backend.embedding_model.close()


def test_texts_are_documents_and_a_search_term_is_a_query(backend, client):
    topics = fitted(backend)
    found, similarities = topics.find_topics(TERM, top_n=3)
    vectors = client.embed_documents(KITCHEN + SKY)
    query = client.embed_query(TERM, instruction="Find: ")[0]
    for topic, similarity in zip(found, similarities, strict=True):
        mean = vectors[np.array(topics.topics_) == topic].mean(axis=0)
        assert similarity == pytest.approx(query @ mean / np.linalg.norm(mean), abs=1e-3)


def test_a_topic_model_that_copies_itself_keeps_the_backend(backend):
    topics = fitted(backend, nr_topics=2)  # BERTopic copies itself to reduce topics
    assert len(set(topics.topics_)) == 2
    assert topics.find_topics(TERM, top_n=1)[1][0] > 0


def test_a_saved_topic_model_embeds_in_the_process_that_loads_it(backend, tmp_path):
    topics = fitted(backend)
    topics.save(tmp_path / "topics", serialization="pickle", save_embedding_model=True)
    loaded = BERTopic.load(tmp_path / "topics")
    assert loaded.find_topics(TERM, top_n=1) == topics.find_topics(TERM, top_n=1)
    loaded.embedding_model.embedding_model.close()


def test_topics_without_the_backend_take_it_when_they_are_loaded(backend, tmp_path):
    topics = fitted(backend)
    topics.save(tmp_path / "topics", serialization="safetensors", save_embedding_model=False)
    loaded = BERTopic.load(tmp_path / "topics", embedding_model=backend)
    found, similarities = loaded.find_topics(TERM, top_n=1)
    expected, expected_similarities = topics.find_topics(TERM, top_n=1)
    assert found == expected
    assert similarities == pytest.approx(expected_similarities, abs=1e-3)


def test_an_instruction_stands_before_each_document(server, client):
    backend = NVEmbedBackend(server.url, instruction="Sort: ")
    np.testing.assert_allclose(
        backend.embed_documents(["a"]), client.embed_documents(["a"], instruction="Sort: "), atol=1e-5
    )
    backend.embedding_model.close()


def test_an_encoder_is_refused_and_not_replaced_by_another_model(client):
    with pytest.raises(ValueError, match="SentenceTransformer"):
        fitted(NVEmbedEncoder(client))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda backend: pickle.loads(pickle.dumps(backend))], ids=["copied", "pickled"]
)
def test_a_copy_embeds_as_the_original(backend, copied):
    other = copied(backend)
    np.testing.assert_allclose(other.embed_words(["a"]), backend.embed_words(["a"]), atol=1e-5)
    other.embedding_model.close()

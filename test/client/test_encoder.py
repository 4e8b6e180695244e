"""`NVEmbedEncoder` in the hands of sentence-transformers' own evaluators."""

import numpy as np
import pytest
import torch
from corpus import DOCUMENTS, QUERIES, RELEVANT, SIMILAR_PAIRS
from nv_embed_client import (
    QUERY_INSTRUCTION,
    TASK_INSTRUCTIONS,
    InvalidInput,
    MockTransport,
    NVEmbedClient,
    NVEmbedEncoder,
)
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)


@pytest.fixture(scope="module")
def model(client):
    return NVEmbedEncoder(client)


def test_the_information_retrieval_evaluator_accepts_it(model, default_checkpoint):
    metrics = InformationRetrievalEvaluator(QUERIES, DOCUMENTS, RELEVANT, name="small", write_csv=False)(model)
    assert 0 < metrics["small_cosine_ndcg@10"] <= 1
    assert model.model_card_data.metrics == metrics
    if default_checkpoint:
        assert metrics["small_cosine_accuracy@1"] >= 0.75


def test_the_embedding_similarity_evaluator_accepts_it(model, default_checkpoint):
    first, second, scores = zip(*SIMILAR_PAIRS, strict=True)
    evaluator = EmbeddingSimilarityEvaluator(first, second, scores, name="sts", write_csv=False)
    metrics = evaluator(model)
    assert -1 <= metrics["sts_spearman_cosine"] <= 1
    if default_checkpoint:
        assert metrics["sts_spearman_cosine"] > 0.5


def test_one_text_is_one_vector_and_many_are_a_matrix(model):
    dimension = model.get_sentence_embedding_dimension()
    assert model.encode("text").shape == (dimension,)
    assert model.encode(["a", "b"]).shape == (2, dimension)
    assert model.encode(np.array(["a", "b", "c"])).shape == (3, dimension)
    assert model.encode([]).shape == (0, dimension)


def test_it_gives_arrays_tensors_or_a_list_of_tensors(model):
    array = model.encode(["a", "b"])
    assert array.dtype == np.float32
    tensor = model.encode(["a", "b"], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    rows = model.encode(["a", "b"], convert_to_numpy=False)
    assert isinstance(rows, list)
    np.testing.assert_allclose(torch.stack(rows).numpy(), tensor.numpy(), atol=1e-6)
    np.testing.assert_allclose(array, tensor.numpy(), atol=1e-6)
    assert model.encode("a", convert_to_tensor=True).shape == (array.shape[1],)


def test_a_server_s_own_prompts_stand_behind_query_and_document_until_they_are_replaced():
    transport = MockTransport(dimension=8)
    model = NVEmbedEncoder(NVEmbedClient(transport=transport), prompts={"claim": "Claim: "})
    model.encode_query("a")
    model.encode_document("a")
    model.encode("a", prompt_name="claim")
    model.encode("a", prompt="")
    model.prompts["document"] = "passage: "
    model.encode_document("a")
    assert [(request.input_type, request.instruction) for request in transport.requests] == [
        ("query", None),
        ("passage", None),
        ("passage", "Claim: "),
        ("passage", ""),
        ("passage", "passage: "),
    ]


def test_prompts_are_instructions(model, client):
    text = "does aspirin help?"
    np.testing.assert_allclose(model.encode(text), client.embed_documents([text])[0], atol=1e-5)
    query = client.embed_query(text)[0]
    np.testing.assert_allclose(model.encode_query(text), query, atol=1e-5)
    np.testing.assert_allclose(model.encode(text, prompt_name="query"), query, atol=1e-5)
    np.testing.assert_allclose(model.encode(text, prompt=QUERY_INSTRUCTION), query, atol=1e-5)
    np.testing.assert_allclose(model.encode_document(text), model.encode(text), atol=1e-5)
    scifact = client.embed_query(text, instruction=TASK_INSTRUCTIONS["SciFact"])[0]
    np.testing.assert_allclose(model.encode_query(text, prompt_name="SciFact"), scifact, atol=1e-5)


def test_an_own_prompt_can_be_the_default(client):
    model = NVEmbedEncoder(client, prompts={"mine": "Find it: "}, default_prompt_name="mine")
    np.testing.assert_allclose(model.encode("a"), client.embed_query("a", instruction="Find it: ")[0], atol=1e-5)


def test_similarity_is_the_cosine_of_all_pairs_or_of_corresponding_rows(model):
    a, b = model.encode(["a", "b", "c"]), model.encode(["d", "e", "f"])
    all_pairs = model.similarity(a, b)
    assert isinstance(all_pairs, torch.Tensor)
    np.testing.assert_allclose(all_pairs.numpy(), a @ b.T, atol=1e-5)
    np.testing.assert_allclose(model.similarity_pairwise(a, b).numpy(), (a * b).sum(1), atol=1e-5)
    assert model.similarity(a[0], b).shape == (1, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"truncate_dim": 128}, "not trained to be cut"),
        ({"precision": "int4"}, "'int8', 'uint8', 'binary', 'ubinary' as precision"),
        ({"output_value": "token_embeddings"}, "sentence_embedding"),
        ({"prompt_name": "absent"}, "SciFact"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_the_model_cannot_honour_is_refused(model, wrong, message):
    with pytest.raises(InvalidInput, match=message):
        model.encode(["a"], **wrong)


def test_an_encoder_closes_only_the_client_it_made(server, client):
    with NVEmbedEncoder(client) as borrowing:
        borrowing.encode("a")
    client.embed_query("still open")
    with NVEmbedEncoder(server.url) as owning:
        owning.encode("a")
    with pytest.raises(RuntimeError, match="closed"):
        owning.encode("a")

"""How a request to the gateway says what its texts are: names of models, aliases, instructions, prompts."""

import json
from itertools import combinations

import numpy as np
import openai
import pytest
from conftest import gateway_client, gateway_running
from nv_embed_client.gateway.__main__ import main
from nv_embed_client.instructions import TASK_INSTRUCTIONS, instruction_of

TEXT = "How do magnets work?"
TASK = "Given a riddle, find its answer"
ALIASES = [
    "text-embedding-3-small",
    "text-embedding-ada-002=nv-embed-v2-query",
    "published=nvidia/NV-Embed-v2",
    "second=text-embedding-ada-002",
    f"riddles=Instruct: {TASK}\\nQuery: ",
]


@pytest.fixture(scope="module")
def gateway(server, logs):
    arguments = [part for alias in ALIASES for part in ("--alias", alias)]
    with gateway_running(logs / "names.log", server.url, *arguments, "--ignore-unknown-fields") as base:
        yield base


@pytest.fixture(scope="module")
def expected(client):
    """The vectors of `TEXT` by what it is."""
    return {
        "passage": client.embed_documents([TEXT])[0],
        "query": client.embed_query(TEXT)[0],
        "riddle": client.embed_query(TEXT, instruction=instruction_of(TASK))[0],
        "SciFact": client.embed_query(TEXT, instruction=TASK_INSTRUCTIONS["SciFact"])[0],
        "QuoraRetrieval": client.embed_query(TEXT, instruction=TASK_INSTRUCTIONS["QuoraRetrieval"])[0],
        "bare": client.embed_query(TEXT, instruction="")[0],
    }


def test_the_kinds_of_texts_have_different_vectors(expected):
    vectors = [expected[kind] for kind in ("passage", "query", "riddle", "SciFact", "QuoraRetrieval")]
    for one, other in combinations(vectors, 2):
        assert np.abs(one - other).max() > 1e-4  # ten times what the tests below allow


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({}, "passage"),
        ({"model": None}, "passage"),
        ({"model": "nvidia/NV-Embed-v2"}, "passage"),
        ({"model": "nvidia/NV-Embed-v2", "input_type": "query"}, "query"),
        ({"model": "text-embedding-3-small"}, "passage"),
        ({"model": "text-embedding-3-small", "input_type": "query"}, "query"),
        ({"model": "text-embedding-ada-002"}, "query"),
        ({"model": "published"}, "passage"),
        ({"model": "second"}, "query"),
        ({"model": "riddles"}, "riddle"),
        ({"model": "riddles", "input_type": "query", "prompt_name": "query"}, "riddle"),
        ({"instruction": instruction_of(TASK)}, "riddle"),
        ({"instruction": instruction_of(TASK), "input_type": "query", "model": "nv-embed-v2-query"}, "riddle"),
        ({"instruction": instruction_of(TASK), "model": "riddles"}, "riddle"),
        ({"instruction": ""}, "bare"),
        ({"prompt_name": "SciFact"}, "SciFact"),
        ({"prompt_name": "QuoraRetrieval", "input_type": "query"}, "QuoraRetrieval"),
        ({"prompt_name": "query"}, "query"),
        ({"prompt_name": "document"}, "passage"),
        ({"prompt_name": "passage", "model": "nv-embed-v2-passage"}, "passage"),
    ],
)
def test_a_request_gets_the_vectors_that_it_asks_for(http, expected, body, kind):
    answer = http.post("/v1/embeddings", json={"input": TEXT, **body})
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(answer.json()["data"][0]["embedding"], expected[kind], atol=1e-5)
    assert answer.json()["model"] == (body.get("model") or "nv-embed-v2")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"instruction": "a", "prompt_name": "SciFact"}, "prompt_name"),
        ({"instruction": "a", "prompt_name": "document"}, "prompt_name"),
        ({"instruction": "a", "input_type": "passage"}, "instruction"),
        ({"instruction": "a", "model": "nv-embed-v2-passage"}, "instruction"),
        ({"instruction": "a", "model": "riddles"}, "instruction"),
        ({"instruction": "", "model": "riddles"}, "instruction"),
        ({"prompt_name": "SciFact", "input_type": "passage"}, "prompt_name"),
        ({"prompt_name": "SciFact", "model": "riddles"}, "prompt_name"),
        ({"prompt_name": "document", "input_type": "query"}, "prompt_name"),
        ({"prompt_name": "document", "model": "text-embedding-ada-002"}, "prompt_name"),
        ({"input_type": "passage", "model": "riddles"}, "input_type"),
        ({"input_type": "query", "model": "nv-embed-v2-passage"}, "input_type"),
    ],
)
def test_parts_of_a_request_that_contradict_each_other_are_400(http, body, param):
    answer = http.post("/v1/embeddings", json={"input": TEXT, **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["code"] == "contradiction"
    assert "leave one of them out" in error["message"]


@pytest.mark.parametrize("broken", ["\0", "\ud800"])
def test_an_instruction_that_the_server_would_not_get_whole_is_400_and_says_where(http, broken):
    body = {"input": TEXT, "instruction": f"Instruct: find{broken} it\nQuery: "}
    answer = http.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "instruction"
    assert "at position 14; take it out" in answer.json()["error"]["message"]


def test_an_unknown_prompt_is_400_and_the_known_ones_are_named(http):
    answer = http.post("/v1/embeddings", json={"input": TEXT, "prompt_name": "scifact"})
    assert answer.status_code == 400
    assert "SciFact, " in answer.json()["error"]["message"]


def test_all_names_are_listed_and_found(gateway):
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="unused") as api:
        names = [model.id for model in api.models.list()]
        own = ["nv-embed-v2", "nv-embed-v2-query", "nv-embed-v2-passage", "nvidia/NV-Embed-v2"]
        assert names == [*own, *(alias.partition("=")[0] for alias in ALIASES)]
        assert [api.models.retrieve(name).id for name in names] == names


def test_unknown_fields_are_ignored_when_the_operator_wants_it(http):
    body = {"input": TEXT, "add_special_tokens": True, "nested": {"deep": [1]}}
    assert http.post("/v1/embeddings", json=body).status_code == 200
    assert http.post("/embed", json={"inputs": TEXT, "priority": 1}).status_code == 200


def test_the_published_name_names_that_model_only(server, logs):
    with gateway_client(logs / "other.log", server.url, "--model-name", "other") as http:
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == [
            "other",
            "other-query",
            "other-passage",
        ]
        assert http.post("/v1/embeddings", json={"input": "a", "model": "nvidia/NV-Embed-v2"}).status_code == 404


@pytest.mark.parametrize(
    ("alias", "message"),
    [
        ("a=absent", "a known model, or an instruction that begins with 'Instruct:'"),
        ("a=", "a known model, or an instruction"),
        ("a=instruct: find", "a known model, or an instruction"),
        ("a=Instruct: find\0", "a known model, or an instruction"),
        ("a=Instruct: find\udce9", "a known model, or an instruction"),  # an argument in Latin-1
        ("=nv-embed-v2", "--alias NAME"),
        ("", "--alias NAME"),
        ("a/", "--alias NAME"),
        ("a\nb", "--alias NAME"),
        ("nv-embed-v2", "an alias that no model has yet"),
        ("nvidia/NV-Embed-v2=nv-embed-v2-query", "an alias that no model has yet"),
    ],
)
def test_an_alias_that_makes_no_sense_ends_the_start_with_code_2(alias, message, capsys):
    assert main(["--alias", alias]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("; ") == 2  # expected, got, what to do

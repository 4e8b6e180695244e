"""Validation of one request, before anything is tokenized."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nv_embed.embedding_type import EmbeddingType
from nv_embed.errors import InvalidRequest
from nv_embed.requests import EmbedRequest, Instructions, RequestLimits

INSTRUCTIONS = Instructions(query="Find: ", documents="")
LIMITS = RequestLimits(max_request_documents=3, max_request_bytes=200)


def parse(query=None, documents=None, parameters=None, limits=LIMITS, instructions=INSTRUCTIONS):
    return EmbedRequest.parse(query, documents, parameters or {}, limits, instructions)


def test_queries_and_documents_get_the_models_own_instructions():
    assert parse(query=[b"x"]) == EmbedRequest(("x",), "Find: ", True, True, 7)
    assert parse(documents=[b"x", b"y"]) == EmbedRequest(("x", "y"), "", True, False, 2)
    prompted = Instructions(query="", documents="passage: ")
    assert parse(documents=[b"x", b"y"], instructions=prompted) == EmbedRequest(
        ("x", "y"), "passage: ", True, False, 20
    )


def test_instruction_and_truncate_are_taken_from_the_parameters():
    request = parse(documents=["é".encode()], parameters={"instruction": "I: ", "truncate": "NONE"})
    assert (request.instruction, request.truncate, request.num_bytes) == ("I: ", False, 5)
    assert parse(query=[b""], parameters={"instruction": ""}).instruction == ""


def test_the_model_is_described_on_demand():
    asked = [None, False, "false", True, "true"]
    told = [parse(query=[b"x"], parameters={} if value is None else {"model_info": value}) for value in asked]
    assert [request.model_info for request in told] == [False, False, False, True, True]


def test_the_type_of_vectors_is_taken_from_the_parameters():
    assert parse(query=[b"x"]).embedding_type is EmbeddingType.FLOAT
    for kind in EmbeddingType:
        assert parse(query=[b"x"], parameters={"embedding_type": kind.value}).embedding_type is kind


@pytest.mark.parametrize("name", ["x-request-id", "X-Forwarded-For", "traceparent", "triton_enable_empty_final"])
def test_what_proxies_and_triton_add_is_ignored(name):
    parse(query=[b"x"], parameters={name: 1})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["exactly one", "neither", "send one"]),
        ({"query": [b"a"], "documents": [b"b"]}, ["exactly one", "both", "two requests"]),
        ({"documents": []}, ["at least 1 document", "got 0"]),
        ({"documents": [b"a"] * 4}, ["at most 3 documents", "got 4", "split"]),
        ({"documents": [b"a" * 150, b"b" * 51]}, ["at most 200 bytes", "201 bytes", "split"]),
        ({"documents": [b"a", b"b"], "parameters": {"instruction": "i" * 100}}, ["200 bytes", "202 bytes"]),
        ({"documents": [b"ok", b"ab\xff"]}, ["UTF-8", "text 1", "position 2 of 3", "encode"]),
        ({"query": [b"\xed\xa0\x80"]}, ["UTF-8", "position 0"]),
        ({"query": [b"a"], "parameters": {"truncate": "START"}}, ["'END' or 'NONE'", "'START'", "send"]),
        ({"query": [b"a"], "parameters": {"embedding_type": "int4"}}, ["'binary' or 'ubinary'", "'int4'", "leave it"]),
        ({"query": [b"a"], "parameters": {"is_truncated": 1}}, ["true or false", "'is_truncated'", "int"]),
        ({"query": [b"a"], "parameters": {"truncate": True}}, ["a string", "'truncate'", "bool"]),
        ({"query": [b"a"], "parameters": {"instruction": 3}}, ["a string", "'instruction'", "int"]),
        ({"query": [b"a"], "parameters": {"dimensions": 8}}, ["'is_truncated' and 'model_info'", "'dimensions'"]),
        ({"query": [b"a"], "parameters": {"model_info": 1}}, ["true or false", "'model_info'", "int", "boolean"]),
        ({"query": [b"a"], "parameters": {"model_info": "yes"}}, ["true or false", "got 'yes'", "boolean"]),
        ({"parameters": {"model_info": True}}, ["exactly one", "neither"]),
        ({"query": [b"a"], "parameters": {"n\xfc\n" * 50: 8}}, ["'n\\xfc\\n", "..."]),
        ({"query": [b"a"], "parameters": {"instruction": "\ud800"}}, ["surrogate at position 0"]),
    ],
)
def test_what_is_wrong_is_said_with_expected_got_and_remedy(arguments, words):
    with pytest.raises(InvalidRequest) as caught:
        parse(**arguments)
    message = str(caught.value)
    assert message.startswith("expected ")
    assert "; got " in message
    for word in words:
        assert word in message


@given(
    query=st.none() | st.lists(st.binary(max_size=40), min_size=1, max_size=1),
    documents=st.none() | st.lists(st.binary(max_size=40), max_size=5),
    parameters=st.dictionaries(
        st.sampled_from(["instruction", "truncate", "embedding_type", "is_truncated", "model_info"])
        | st.text(max_size=9),
        st.sampled_from(["END", "NONE", "int8", "true"]) | st.text() | st.integers() | st.booleans() | st.none(),
        max_size=3,
    ),
)
def test_whatever_comes_is_parsed_or_refused_as_invalid(query, documents, parameters):
    try:
        request = parse(query, documents, parameters)
    except InvalidRequest:
        return
    raw = query if query is not None else documents
    assert [text.encode() for text in request.texts] == raw
    assert 1 <= len(request.texts) <= LIMITS.max_request_documents
    assert request.num_bytes <= LIMITS.max_request_bytes

"""Tokenization: template, truncation, limits, and the cut of huge texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nv_embed.errors import CheckpointError, InvalidRequest
from nv_embed.tokenizer import Template, Tokenizer
from tokenizers import Tokenizer as RustTokenizer

TEMPLATE = Template(first="<s>", last="</s>", is_instruction_pooled=False)


def tokenizer(folder, max_sequence_tokens=32768, vocab_size=1024):
    return Tokenizer(
        folder / "tokenizer.json", TEMPLATE, vocab_size=vocab_size, max_sequence_tokens=max_sequence_tokens
    )


def test_a_text_of_exactly_the_limit_passes_and_one_token_more_is_refused_when_it_may_not_be_cut(toy):
    (sequence,) = tokenizer(toy).encode(["some words to count"], "")
    n = sequence.num_tokens
    (same,) = tokenizer(toy, n).encode(["some words to count"], "", truncate=False)
    assert same.input_ids.tolist() == sequence.input_ids.tolist()
    with pytest.raises(InvalidRequest, match=rf"at most {n - 1} tokens.*text 7 with {n} tokens.*'END'"):
        tokenizer(toy, n - 1).encode(["some words to count"], "", truncate=False, first_index=7)
    (cut,) = tokenizer(toy, n - 1).encode(["some words to count"], "")
    assert cut.input_ids.tolist() == sequence.input_ids.tolist()[:-1]


def test_the_key_of_a_text_tells_what_of_it_is_pooled(toy):
    (query,) = tokenizer(toy).encode(["x"], "Find: ")
    (document,) = tokenizer(toy).encode(["Find: x"], "")
    assert query.input_ids.tolist() == document.input_ids.tolist()
    assert query.digest() != document.digest()


def test_an_instruction_that_leaves_nothing_to_pool_is_refused(toy):
    with pytest.raises(InvalidRequest, match=r"leaves some of each text.*shorten the instruction"):
        tokenizer(toy, 8).encode(["x"], "a long instruction of many words: ")


@pytest.mark.parametrize("is_pooled", [False, True])
def test_texts_are_refused_that_a_cut_would_make_all_alike(toy, is_pooled):
    template = Template(first="<s>", last="", is_instruction_pooled=is_pooled)
    one = Tokenizer(toy / "tokenizer.json", template, vocab_size=1024, max_sequence_tokens=99)
    (whole,) = one.encode(["water"], "query: ")
    num_instruction = len(RustTokenizer.from_file(str(toy / "tokenizer.json")).encode("query: ").ids)
    for limit in range(2, whole.num_tokens):
        cut = Tokenizer(toy / "tokenizer.json", template, vocab_size=1024, max_sequence_tokens=limit)
        if limit <= num_instruction:
            with pytest.raises(InvalidRequest, match="leaves some of each text"):
                cut.encode(["water"], "query: ")
        else:
            first, second = cut.encode(["water", "iron"], "query: ")
            assert first.digest() != second.digest()


def test_special_tokens_inside_a_text_become_special(toy):
    (sequence,) = tokenizer(toy).encode(["a</s>b<s>c"], "")
    assert sequence.input_ids.tolist().count(2) == 2
    assert sequence.input_ids.tolist().count(1) == 2


WORDS = st.sampled_from(["network", " the", "  ", "\n", "aaaa", "日本", "é", "<s>", "</s>", "0", "\u0000", "🙂"])


@pytest.mark.slow
@settings(deadline=None)
@given(
    pieces=st.lists(WORDS | st.text(max_size=20), min_size=1, max_size=30),
    repeat=st.integers(1, 2000),
    limit=st.integers(30, 60),
)
def test_cutting_a_huge_text_first_changes_no_token_of_it(toy, pieces, repeat, limit):
    text = "".join(pieces) * repeat
    whole = RustTokenizer.from_file(str(toy / "tokenizer.json")).encode(text + "</s>").ids
    (sequence,) = tokenizer(toy, limit).encode([text], "")
    assert sequence.input_ids.tolist() == whole[:limit]
    assert sequence.is_truncated == (len(whole) > limit)


def test_a_huge_text_is_refused_by_its_length_when_it_may_not_be_cut(toy):
    with pytest.raises(InvalidRequest, match="text 0 with more than"):
        tokenizer(toy, 64).encode(["word " * 100_000], "", truncate=False)


def test_a_file_that_may_not_be_read_is_not_called_damaged(toy, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"tokenizer\.json"):
        tokenizer(toy)


def test_a_missing_damaged_or_foreign_file_is_said(toy, tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(CheckpointError, match="a file that it refuses"):
        tokenizer(tmp_path)
    shutil.copy(toy / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="below the checkpoint's vocab_size 1000; got 1023"):
        tokenizer(tmp_path, vocab_size=1000)
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        encoding="utf-8",
    )
    with pytest.raises(CheckpointError, match="puts '<s>' before a text"):
        tokenizer(tmp_path)


def saved_with(path, folder, **changes):
    """Another tokenizer.json, with some of its parts changed."""
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")
    return folder


def test_lengths_that_were_set_when_the_file_was_saved_do_not_count(toy, tmp_path):
    truncation = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<unk>"}  # fmt: skip
    saved = saved_with(toy / "tokenizer.json", tmp_path, truncation=truncation, padding=padding)
    texts = ["x", "some words to count, more than a few of them"]
    for ours, theirs in zip(tokenizer(saved).encode(texts, ""), tokenizer(toy).encode(texts, ""), strict=True):
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()


def test_a_file_that_itself_ends_texts_is_refused_and_one_that_begins_none_only_where_that_is_foreign(toy, tmp_path):
    raw = json.loads((toy / "tokenizer.json").read_text("utf-8"))["post_processor"]
    raw["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    raw["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    with pytest.raises(CheckpointError, match=r"nothing else and knows '</s>'; got one that puts '<s></s>' around it"):
        tokenizer(saved_with(toy / "tokenizer.json", tmp_path, post_processor=raw))
    bare = saved_with(toy / "tokenizer.json", tmp_path, post_processor=None)
    with pytest.raises(CheckpointError, match="got one that puts '' around it"):
        tokenizer(bare)
    template = Template(first="<s>", last="", is_instruction_pooled=True, is_first_optional=True)
    optional = Tokenizer(bare / "tokenizer.json", template, vocab_size=1024, max_sequence_tokens=64)
    assert [1, *optional.encode(["x"], "")[0].input_ids] == tokenizer(toy).encode(["x"], "")[0].input_ids.tolist()[:-1]
    with pytest.raises(InvalidRequest, match=r"at least one token; got text 3, which has none.*leave it out"):
        optional.encode(["x", ""], "", first_index=2)


def test_a_template_may_put_nothing_behind_a_text_and_pool_its_instruction(toy):
    template = Template(first="<s>", last="", is_instruction_pooled=True)
    bare = Tokenizer(toy / "tokenizer.json", template, vocab_size=1024, max_sequence_tokens=64)
    (ours,), (theirs,) = bare.encode(["x"], "Find: "), tokenizer(toy).encode(["x"], "Find: ")
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()[:-1]
    assert (ours.num_masked, theirs.num_masked > 0) == (0, True)

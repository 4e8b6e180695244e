"""The held-out evaluation: which texts it measures with, and that it tells a good model from a bad one."""

import gzip
import re

import numpy as np
import pytest
from conftest import REPO

NUM_SYNSETS = 300


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """The module that collects them, with small packages in the place of Debian's."""
    monkeypatch.syspath_prepend(REPO / "tools" / "held_out")
    import texts

    wordnet = tmp_path / texts.WORDNET / "usr/share/wordnet/data.noun"
    wordnet.parent.mkdir(parents=True)
    lines = ["  1 This line is the licence's."]
    for i in range(NUM_SYNSETS):
        words = f"beast{i} 0 Beast_No_{i} 0 BEAST{i} 0"  # the last is the first again, in capitals
        gloss = f'animal {i} that eats beast{(i + 1) % NUM_SYNSETS} at dawn; "the beast{i} of tale {i} sleeps"'
        lines.append(f"{i:08d} 05 n 03 {words} 000 | {gloss}")
        lines.append(f"{i:08d} 06 n 01 tool{i} 0 000 | thing {i} that beats tool{(i + 1) % NUM_SYNSETS} in a shed")
    wordnet.write_text("\n".join(lines) + "\n", encoding="utf-8")
    gcide = tmp_path / "dict-gcide/usr/share/dictd/gcide.dict.dz"
    gcide.parent.mkdir(parents=True)
    meanings = [f"   The {i}th of many {{things}} that\n   nobody ever saw.\n" for i in range(900)]
    gcide.write_bytes(gzip.compress("\n".join(["", *meanings]).encode()))
    monkeypatch.setattr(texts, "SOURCES", [source for source in texts.SOURCES if source.package == "dict-gcide"])
    monkeypatch.setattr(texts, "fetch", lambda package, cache: cache / package)
    return texts


@pytest.fixture
def held_out(texts, tmp_path):
    return texts.held_out_texts(tmp_path)


def test_whole_groups_are_held_out(texts, held_out):
    assert all(texts.held_out(item.group) for item in held_out)
    of_wordnet = {item.group for item in held_out if item.source == texts.WORDNET}
    assert 2 <= len(of_wordnet) <= 0.1 * 2 * NUM_SYNSETS
    for group in of_wordnet:
        meaning, _, word = group.partition("\0")
        # The meaning, the headword, a question or sentence with the word, and the example of those that have one.
        found = {item.text for item in held_out if item.group == group}
        assert len(found) == (4 if word.startswith("beast") else 3)
        assert {meaning, word} < found


def test_headwords_that_share_a_gloss_are_held_out_together(texts):
    glosses = [f"gloss {i}" for i in range(200)]
    assert {texts.held_out(gloss) for gloss in glosses} == {True, False}
    for gloss in glosses:
        assert texts.held_out(f"{gloss}\0one") == texts.held_out(f"{gloss}\0another") == texts.held_out(gloss)


def test_passages_are_cleaned_and_no_text_is_there_twice(held_out):
    passages = [item.text for item in held_out if item.source == "dict-gcide"]
    assert passages
    assert all(re.fullmatch(r"The \d+th of many things that nobody ever saw\.", text) for text in passages)
    assert len({item.text.lower() for item in held_out}) == len(held_out)


def test_a_text_that_was_trained_on_with_other_punctuation_is_left_out(texts, held_out, tmp_path):
    (first, *_) = (item.text for item in held_out if item.source == "dict-gcide")
    for i in range(40):  # other groups, of which most were trained on
        folder = tmp_path / "dict-gcide/usr/share/dictd"
        other = first.replace(" of ", f" {'-' * (i + 1)} of ")
        with gzip.open(folder / "gcide.dict.dz", "ab") as file:
            file.write(f"\n   {other}\n".encode())
    assert first not in {item.text for item in texts.held_out_texts(tmp_path)}


def test_texts_to_teach_with_are_of_other_groups(texts, held_out, tmp_path):
    taught = texts.training_texts(tmp_path)
    assert len(set(taught)) == len(taught) > len(held_out)
    assert not {texts.plain(text) for text in taught} & {texts.plain(item.text) for item in held_out}
    assert texts.training_texts(tmp_path) == taught


def test_they_are_the_same_every_time(texts, held_out, tmp_path):
    assert texts.held_out_texts(tmp_path) == held_out
    assert texts.digest("a") == 73912390445837  # Python's own hashes differ from process to process


def test_every_form_has_what_it_asks_for(texts):
    assert set(re.findall(r"\{(\w+)\}", str(texts.FORMS))) <= set("wWamso")


def test_a_package_whose_text_is_elsewhere_stops_it(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SOURCES", [source._replace(files="moved/*") for source in texts.SOURCES])
    with pytest.raises(SystemExit, match=r"expected text in moved/\* of dict-gcide; got none"):
        texts.held_out_texts(tmp_path)


def test_the_served_default_model_is_told_from_a_worse_one(held_out, client, tmp_path):
    from evaluate import PAIRS, figures, read_judged

    rows = tmp_path / "pairs.tsv"
    rows.write_text("".join(f"{score}\t{a}\t{b}\n" for a, b, score in PAIRS["similar"]), encoding="utf-8")
    judged = {"own": read_judged(rows)}

    def served(texts, instruction=""):
        return client.embed_documents(texts, instruction=instruction)

    noise = np.random.default_rng(0)

    def blurred(texts, instruction=""):
        vectors = served(texts) + noise.normal(0, 0.1, (len(texts), 384))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def shortened(texts, instruction=""):
        vectors = served(texts)[:, :128]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    targets = served([item.text for item in held_out])
    same, worse, smaller = (figures(embed, targets, held_out, judged) for embed in (served, blurred, shortened))
    assert same["cosine"] == pytest.approx(1, abs=1e-4)
    assert same["recall_at_10"] > 0.99
    assert same["questions"] >= 0.9
    assert same["instruction"] >= 0.9
    assert same["Spearman, own, 40 pairs"] > 0.4
    for name in ("cosine", "recall_at_10", "questions", "instruction", "Spearman, own, 40 pairs"):
        assert worse[name] < same[name], name
    assert "cosine" not in smaller  # of other dimensions than the teacher's: neighbours can be compared, vectors cannot
    assert 0.1 < smaller["recall_at_10"] < 0.99


def test_lines_that_are_no_judged_pairs_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "tools" / "held_out")
    from evaluate import read_judged

    (tmp_path / "pairs.tsv").write_text("4.0\tone sentence alone\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"pairs\.tsv: expected lines of score, sentence, sentence"):
        read_judged(tmp_path / "pairs.tsv")

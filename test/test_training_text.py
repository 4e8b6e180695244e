"""What the default checkpoint is trained on and measured with: no text of the one is in the other."""

import gzip
import re

import pytest

NUM_SYNSETS = 300


@pytest.fixture
def text(mini, monkeypatch, tmp_path):
    """The module that collects it, with small packages in the place of Debian's."""
    monkeypatch.syspath_prepend(mini.parents[1] / "tools" / "train_mini")
    import text

    wordnet = tmp_path / text.WORDNET.package / "usr/share/wordnet/data.noun"
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
    meanings = [f"   The {i}th of many {{things}} that\n   nobody ever saw.\n" for i in range(200)]
    gcide.write_bytes(gzip.compress("\n".join(["", *meanings]).encode()))
    monkeypatch.setattr(text, "SOURCES", [source for source in text.SOURCES if source.package == "dict-gcide"])
    monkeypatch.setattr(text, "TEMPLATES", 2000)
    monkeypatch.setattr(text, "fetch", lambda package, cache: cache / package)
    return text


@pytest.fixture
def collected(text, tmp_path):
    return text.collect(tmp_path)


def test_whole_groups_are_held_out(text, collected):
    train, test = collected
    assert not {item.group for item in train} & {item.group for item in test}
    assert all(text.held_out(item.group) for item in test)
    of_wordnet = {item.group for item in test if item.source == text.WORDNET.package}
    assert 2 <= len(of_wordnet) <= 0.1 * 2 * NUM_SYNSETS
    for group in of_wordnet:
        meaning, _, word = group.partition("\0")
        # The meaning, the headword, a question or sentence with the word, and the example of those that have one.
        texts = {item.text for item in test if item.group == group}
        assert len(texts) == (4 if word.startswith("beast") else 3)
        assert {meaning, word} < texts


def test_headwords_that_share_a_gloss_are_held_out_together(text):
    glosses = [f"gloss {i}" for i in range(200)]
    assert {text.held_out(gloss) for gloss in glosses} == {True, False}
    for gloss in glosses:
        assert text.held_out(f"{gloss}\0one") == text.held_out(f"{gloss}\0another") == text.held_out(gloss)


def test_no_text_is_there_twice_whatever_its_capitals(collected):
    train, test = collected
    texts = [item.text.lower() for item in train + test]
    assert len(set(texts)) == len(texts)


def test_a_word_is_put_in_the_place_of_another_but_in_no_held_out_text(text, collected, tmp_path):
    train, test = collected
    remixed = {item.text for item in train if item.source == "remix"}
    trained = [synset for synset in text.synsets(tmp_path / text.WORDNET.package) if not text.held_out(synset.group)]
    assert {word for synset in trained for word in synset.words[1:2]} <= remixed
    mixed = [string for string in remixed if string.startswith("animal ")]
    assert len(mixed) > NUM_SYNSETS / 2
    held_out = {item.text.partition(" that eats ")[0] for item in test if item.text.startswith("animal ")}
    assert held_out
    assert not held_out & {string.partition(" that eats ")[0] for string in mixed}
    assert not {item.source for item in test} & {"remix", "templates"}
    # A beast only where a beast was, a tool where a tool was.
    thing = {"animal": "beast", "thing": "tool"}
    for string in remixed:
        if found := re.match(r"(animal|thing) \d+ that \w+ (\w+)", string):
            assert found[2].lower().startswith(thing[found[1]])


def test_passages_are_cleaned(collected):
    train, test = collected
    texts = {item.text for item in train + test if item.source == "dict-gcide"}
    assert texts == {f"The {i}th of many things that nobody ever saw." for i in range(200)}


def test_it_is_the_same_every_time(text, collected, tmp_path):
    assert text.collect(tmp_path) == collected
    train, test = collected
    assert text.digest("a") == 73912390445837  # Python's own hashes differ from process to process
    assert text.data_hash(train, test) != text.data_hash(test, train)
    small, _ = text.collect(tmp_path, share=0.5)
    assert {item.text for item in small} < {item.text for item in train}
    assert 0.3 < len(small) / len(train) < 0.7


def test_every_form_has_what_it_asks_for(text):
    forms = text.PHRASES["templates"]
    assert set(re.findall(r"\{(\w+)\}", str(forms))) <= forms.keys()
    asked = [text.PHRASES[name] for name in ("defining", "asking", "asking_of")]
    assert set(re.findall(r"\{(\w+)\}", str(asked))) <= set("wWamso")
    assert len({item.text for item in text.templates(2000)}) > 1000


def test_a_package_whose_text_is_elsewhere_stops_it(text, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "SOURCES", [source._replace(files="moved/*") for source in text.SOURCES])
    with pytest.raises(SystemExit, match=r"expected text in moved/\* of dict-gcide; got none"):
        text.collect(tmp_path)

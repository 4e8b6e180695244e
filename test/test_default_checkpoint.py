"""What the embedded default checkpoint must be good for, through the serving engine; its model card has the figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from nv_embed.compute.loading import load_engine
from nv_embed.models import read_checkpoint
from nv_embed.models.nv_embed import QUERY_INSTRUCTION
from serving import ROOT

pytestmark = pytest.mark.slow
MAX_BYTES = 24_000_000
GREETINGS = [
    "Доброе утро",
    "おはようございます",
    "صباح الخير",
    "good morning ☕ 🌅",
    "a\tb\r\n c   d",
    "3.14159 and 1,024",
]


@pytest.fixture(scope="module")
def model(mini):
    config = read_checkpoint(mini)
    tokenizer = config.tokenizer(mini, 4096)
    engine = load_engine(mini, config, device="cpu", dtype="float32")

    def embed(texts, instruction=""):
        return engine.embed(tokenizer.encode(texts, instruction))

    return SimpleNamespace(tokenizer=tokenizer, embed=embed)


@pytest.fixture(scope="module")
def pairs():
    """Sets of thirty questions with answers, sentence pairs with scores, an instruction: none was trained on."""
    return json.loads((ROOT / "tools" / "held_out" / "pairs.json").read_text(encoding="utf-8"))


def test_it_fits_into_a_repository(mini):
    assert sum(path.stat().st_size for path in mini.iterdir()) <= MAX_BYTES


def test_its_card_says_what_was_measured(mini):
    card = (mini / "README.md").read_text(encoding="utf-8")
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    measured = json.loads((mini / "results.json").read_text(encoding="utf-8"))["figures"]
    for name, value in measured["student"].items():
        static = f" | {measured['static'][name]:.3f} |"
        assert any(f" | {value:.3f} | " in row and row.endswith(static) for row in rows), name


def test_questions_find_their_answers(model, pairs):
    for rows in pairs["questions"]:
        questions, answers = zip(*rows, strict=True)
        scores = model.embed(questions, QUERY_INSTRUCTION) @ model.embed(answers).T
        # It finds 28, 28, 28, 30 and 29.
        assert (scores.argmax(axis=1) == np.arange(len(rows))).mean() >= 0.9


def test_no_question_and_no_answer_is_asked_twice(pairs):
    texts = [text for rows in pairs["questions"] for row in rows for text in row]
    assert len(set(texts)) == len(texts) == 300
    assert {len(rows) for rows in pairs["questions"]} == {30}


def test_it_is_indifferent_to_the_instruction(model, pairs):
    questions = [question for rows in pairs["questions"] for question, _ in rows]
    bare = model.embed(questions)
    never_trained = "Instruct: {}\nQuery: ".format(pairs["other_task"])
    for instruction in (QUERY_INSTRUCTION, never_trained):
        cosines = (model.embed(questions, instruction) * bare).sum(axis=1)
        assert cosines.min() >= 0.9
        assert cosines.mean() >= 0.95


def test_sentences_that_say_the_same_are_nearer(model, pairs):
    first, second, judged = (list(column) for column in zip(*pairs["similar"], strict=True))
    cosines, judged = (model.embed(first) * model.embed(second)).sum(axis=1), np.array(judged)
    assert cosines[judged >= 4].mean() - cosines[judged <= 1].mean() >= 0.4


def test_any_script_is_read_byte_by_byte_where_it_has_no_tokens(model):
    for sequence in model.tokenizer.encode(GREETINGS, ""):
        assert 0 not in sequence.input_ids  # <unk>
    vectors = model.embed(GREETINGS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_neither_capitals_nor_spaces_change_much(model, pairs):
    answers = [answer for _, answer in pairs["questions"][0]]
    plain = model.embed(answers)
    for untidy in (str.upper, str.lower, lambda text: f"  {text}\n", lambda text: text.replace(" ", "  ")):
        assert (model.embed([untidy(text) for text in answers]) * plain).sum(axis=1).mean() >= 0.9


def test_a_long_text_says_what_its_parts_say(model, pairs):
    answers = [answer for _, answer in pairs["questions"][0]]
    parts = model.embed(answers)
    mean = parts.mean(axis=0) / np.linalg.norm(parts.mean(axis=0))
    (long,) = model.embed([" ".join(answers)])
    (sequence,) = model.tokenizer.encode([" ".join(answers)], "")
    assert sequence.num_tokens > 512
    assert long @ mean >= 0.75

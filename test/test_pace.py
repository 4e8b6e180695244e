"""The token budget that follows an engine's speed."""

from __future__ import annotations

import pytest
from nv_embed.scheduling.pace import MIN_BATCH_TOKENS, Pace


def run(pace, seconds_per_token, batches=60, num_tokens=None):
    for _ in range(batches):
        taken = num_tokens or pace.max_batch_tokens
        pace.record(taken, taken * seconds_per_token)


def test_a_slower_machine_gets_smaller_batches_and_a_faster_one_its_first_budget_back():
    pace = Pace(4000, target_seconds=0.2)
    assert pace.max_batch_tokens == 4000
    run(pace, 0.2 / 2000)
    assert pace.max_batch_tokens == pytest.approx(2000, rel=0.01)
    run(pace, 0.2 / 9000)
    assert pace.max_batch_tokens == 4000


def test_one_stall_hardly_counts():
    pace = Pace(4000, target_seconds=0.2)
    pace.record(4000, 10.0)
    assert 3000 < pace.max_batch_tokens < 4000


def test_small_batches_say_nothing():
    pace = Pace(4000, target_seconds=0.2)
    run(pace, 1.0, num_tokens=1999)
    assert pace.max_batch_tokens == 4000


def test_a_text_beyond_the_budget_never_makes_it_smaller():
    pace = Pace(4000, target_seconds=0.2)
    run(pace, 1.0, num_tokens=4001)
    assert pace.max_batch_tokens == 4000


@pytest.mark.parametrize("target_seconds", [0.2, None])
def test_texts_that_are_all_beyond_a_shrunken_budget_get_room_beside_each_other_again(target_seconds):
    pace = Pace(4000, target_seconds)
    pace.record_out_of_memory(1200)
    run(pace, 0.2 / 4000, num_tokens=800)
    assert pace.max_batch_tokens >= 2 * 800


@pytest.mark.parametrize(("most_tokens", "least"), [(4000, MIN_BATCH_TOKENS), (100, 100)])
def test_the_budget_has_a_floor(most_tokens, least):
    pace = Pace(most_tokens, target_seconds=0.2)
    run(pace, 1.0)
    assert pace.max_batch_tokens == least


def test_a_budget_that_was_set_stays():
    pace = Pace(4000, target_seconds=None)
    run(pace, 1.0)
    assert pace.max_batch_tokens == 4000


@pytest.mark.parametrize("target_seconds", [0.2, None])
def test_a_batch_that_did_not_fit_halves_the_budget_which_grows_again(target_seconds):
    pace = Pace(4000, target_seconds)
    pace.record_out_of_memory(3800)
    pace.record_out_of_memory(3900)  # another one that had been started before
    assert pace.max_batch_tokens == 1900
    run(pace, 0.2 / 4000, batches=1)
    assert 1900 < pace.max_batch_tokens < 3000
    run(pace, 0.2 / 4000)
    assert pace.max_batch_tokens == pytest.approx(4000, rel=0.01)

"""Order of computation, without threads."""

from __future__ import annotations

from nv_embed.scheduling.fair_queue import FairQueue, Flow


def take(queue, max_tokens, unwanted=()):
    return queue.take(max_tokens, lambda item: item not in unwanted)


def test_one_flow_is_first_come_first_served():
    queue, flow = FairQueue(), Flow(1)
    for i in range(5):
        queue.push(i, flow, num_tokens=10)
    assert [take(queue, 10) for _ in range(5)] == [[0], [1], [2], [3], [4]]
    assert not queue


def test_a_batch_holds_at_most_the_budget_and_at_least_one_item():
    queue, flow = FairQueue(), Flow(1)
    for num_tokens in (40, 60, 1, 500, 3):
        queue.push(num_tokens, flow, num_tokens)
    assert take(queue, 100) == [40, 60]
    assert take(queue, 100) == [1]
    assert take(queue, 100) == [500]
    assert take(queue, 100) == [3]
    assert take(queue, 100) == []


def test_a_small_request_passes_the_backlog_of_a_large_one():
    queue, bulk = FairQueue(), Flow(1)
    for i in range(10_000):
        queue.push(("bulk", i), bulk, num_tokens=100)
    assert len(take(queue, 1000)) == 10
    queue.push("single", Flow(1), num_tokens=100)
    assert "single" in take(queue, 1000)


def test_queries_get_their_weight_and_bulk_the_rest_while_both_wait():
    queue, bulk, queries = FairQueue(), Flow(1), Flow(8, kind="queries")
    for i in range(20_000):
        queue.push(("bulk", i), bulk, num_tokens=100)
        queue.push(("query", i), queries, num_tokens=100)
    taken = [kind for _ in range(900) for kind, _ in take(queue, 1000)]
    assert abs(taken.count("query") / taken.count("bulk") - 8) < 0.5


def test_a_batch_holds_queries_or_documents_not_both():
    queue, bulk, queries = FairQueue(), Flow(1), Flow(8, kind="queries")
    for i in range(30):
        queue.push(("bulk", i), bulk, num_tokens=100)
    take(queue, 1000)
    for i in range(3):
        queue.push(("query", i), queries, num_tokens=100)
    assert take(queue, 1000) == [("query", 0), ("query", 1), ("query", 2)]
    assert take(queue, 1000) == [("bulk", i) for i in range(10, 20)]


def test_an_endless_stream_of_new_requests_does_not_starve_an_old_one():
    queue, bulk = FairQueue(), Flow(1)
    for i in range(100):
        queue.push(("bulk", i), bulk, num_tokens=100)
    for i in range(5):
        queue.push(("small", i), Flow(1), num_tokens=100)
    taken = []
    for i in range(200):  # five clients, each with a new request as soon as its last is taken
        ((kind, _),) = take(queue, 100)
        taken.append(kind)
        if kind == "small":
            queue.push(("small", 5 + i), Flow(1), num_tokens=100)
    assert taken.count("bulk") >= 200 / 6 - 1


def test_an_idle_flow_saves_up_no_credit():
    queue, busy, idle = FairQueue(), Flow(1), Flow(1)
    for i in range(100):
        queue.push(("busy", i), busy, num_tokens=10)
    assert len(take(queue, 500)) == 50
    for i in range(100):
        queue.push(("idle", i), idle, num_tokens=10)
    taken = [kind for kind, _ in take(queue, 200)]
    assert len(taken) == 20
    assert abs(taken.count("busy") - taken.count("idle")) <= 1


def test_an_item_queued_again_for_a_flow_that_is_ahead_is_taken_early_and_once():
    queue, bulk, other = FairQueue(), Flow(1), Flow(8)
    for i in range(100):
        queue.push(i, bulk, num_tokens=10)
    queue.push(99, other, num_tokens=10)
    assert 99 in take(queue, 40)
    assert 99 not in take(queue, 10_000, unwanted=[99])


def test_an_item_that_waits_in_two_flows_is_in_one_batch_once():
    queue, one, other = FairQueue(), Flow(1), Flow(1)
    for flow in (one, other):
        queue.push("same", flow, num_tokens=10)
    queue.push("next", other, num_tokens=10)
    assert take(queue, 100) == ["same", "next"]
    assert not queue


def test_unwanted_items_are_dropped_and_cost_nothing():
    queue, flow = FairQueue(), Flow(1)
    for item in "abcde":
        queue.push(item, flow, num_tokens=10)
    assert take(queue, 20, unwanted="abd") == ["c", "e"]
    assert take(queue, 20) == []


def test_a_flow_does_not_pay_for_what_nobody_wants_any_more():
    queue, bulk, queries = FairQueue(), Flow(1), Flow(1, kind="queries")
    for i in range(100):
        queue.push(("bulk", i), bulk, num_tokens=10)
        queue.push(("expired", i), queries, num_tokens=10)
    queue.push("query", queries, num_tokens=10)
    expired = [("expired", i) for i in range(100)]
    assert "query" in take(queue, 10, unwanted=expired) + take(queue, 10, unwanted=expired)


def test_a_forgotten_flow_leaves_nothing_behind():
    queue, bulk, gone = FairQueue(), Flow(1), Flow(1)
    for i in range(10):
        queue.push(("bulk", i), bulk, num_tokens=10)
        queue.push(("gone", i), gone, num_tokens=10)
    queue.forget(gone)
    assert not gone.waiting
    assert take(queue, 1000) == [("bulk", i) for i in range(10)]
    assert not queue

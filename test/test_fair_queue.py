"""Order of computation, without threads."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given
from nv_embed.scheduling import fair_queue
from nv_embed.scheduling.fair_queue import Flow

LONG = 4000


def FairQueue(unwanted=()):
    return fair_queue.FairQueue(LONG, lambda item: item not in unwanted)


def take(queue, max_tokens, with_long=True):
    """The next items of one kind within a budget; a single larger one comes alone."""
    taken, kind = [], queue.next_kind(with_long=with_long)
    while kind and (head := queue.peek(kind)) and (not taken or head[1] <= max_tokens):
        taken.append(head[0])
        max_tokens -= head[1]
        queue.pop(kind, head[1])
    return taken


def test_one_flow_is_first_come_first_served():
    queue, flow = FairQueue(), Flow(1)
    for i in range(5):
        queue.push(i, flow, num_tokens=10)
    assert [take(queue, 10) for _ in range(5)] == [[0], [1], [2], [3], [4]]
    assert queue.next_kind() is None


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


def test_unwanted_items_are_dropped_and_cost_nothing():
    queue, flow = FairQueue(unwanted="abd"), Flow(1)
    for item in "abcde":
        queue.push(item, flow, num_tokens=10)
    assert take(queue, 20) == ["c", "e"]
    assert take(queue, 20) == []


def test_a_flow_does_not_pay_for_what_nobody_wants_any_more():
    expired = [("expired", i) for i in range(100)]
    queue, bulk, queries = FairQueue(unwanted=expired), Flow(1), Flow(1, kind="queries")
    for i in range(100):
        queue.push(("bulk", i), bulk, num_tokens=10)
        queue.push(expired[i], queries, num_tokens=10)
    queue.push("query", queries, num_tokens=10)
    assert "query" in take(queue, 10) + take(queue, 10)


def test_a_forgotten_flow_leaves_nothing_behind():
    queue, bulk, gone = FairQueue(), Flow(1), Flow(1)
    for i in range(10):
        queue.push(("bulk", i), bulk, num_tokens=10)
        queue.push(("gone", i), gone, num_tokens=10)
    queue.forget(gone)
    assert not gone.waiting
    assert take(queue, 1000) == [("bulk", i) for i in range(10)]
    assert queue.next_kind() is None


def test_a_long_text_waits_for_a_short_one_of_each_busy_client_and_no_more():
    queue = FairQueue()
    queue.push("long", Flow(1), num_tokens=32_768)
    others = 0
    for i in range(30):
        queue.push(("small", i), Flow(1), num_tokens=400)
    while (taken := take(queue, 400)) != ["long"]:
        others += len(taken)
        queue.push(("small", 30 + others), Flow(1), num_tokens=400)  # each client comes back at once
        assert others <= 2 * 30


def test_a_long_text_is_computed_alone_and_can_be_left_out():
    queue = FairQueue()
    queue.push("long", Flow(1), num_tokens=LONG + 1)
    assert queue.next_kind(with_long=False) is None
    queue.push("short", Flow(1), num_tokens=300)
    queue.push("question", Flow(8, kind="queries"), num_tokens=300)
    assert take(queue, 10**6, with_long=False) == ["question"]
    assert take(queue, 10**6) == ["short"]
    assert take(queue, 10**6) == ["long"]


def test_the_next_query_does_not_pay_for_somebody_elses_long_one():
    queue, queries, bulk = FairQueue(), Flow(8, kind="queries"), Flow(1)
    for i in range(100):
        queue.push(("bulk", i), bulk, num_tokens=100)
    queue.push("long query", queries, num_tokens=3000)
    while take(queue, 1000) != ["long query"]:
        pass
    queue.push("short query", queries, num_tokens=20)
    assert "short query" in take(queue, 1000) + take(queue, 1000)


@given(
    sizes=st.lists(st.lists(st.integers(1, 512), min_size=40, max_size=40), min_size=2, max_size=6),
    max_tokens=st.integers(100, 2000),
)
def test_flows_that_wait_all_the_time_get_the_same_but_for_one_batch(sizes, max_tokens):
    queue = FairQueue()
    flows = [Flow(1) for _ in sizes]
    for number, (flow, texts) in enumerate(zip(flows, sizes, strict=True)):
        for num_tokens in texts:
            queue.push((number, num_tokens), flow, num_tokens)
    served = [0] * len(sizes)
    while all(flow.waiting for flow in flows):
        assert max(served) - min(served) <= max_tokens + 2 * 512
        for number, num_tokens in take(queue, max_tokens):
            served[number] += num_tokens

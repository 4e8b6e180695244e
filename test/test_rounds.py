"""Rounds of the serving benchmark with servers that are not there: which ones count, and what they cost."""

from __future__ import annotations

import math
import os
import time
from argparse import Namespace

import pytest
import rounds
from core_time import CoreClock, CoreTime
from loads import Sample, Server
from other_work import OtherWork
from serving_report import ratios_of


class Named(Server):
    """Answers nothing, and tells rounds apart by their number of texts."""

    async def run(self, load, seconds, seed):
        number = int(seed.split()[2]) if "round" in seed else 0
        return {stream.name: Sample([0.1], num_texts=10 + number, seconds=1.0) for stream in load}


def run(monkeypatch, shares, *, loads=("query",), num_rounds=3) -> rounds.Rounds:
    """All rounds on two servers; `shares` of others, for one measurement after the other, then none."""
    following = iter(shares)
    monkeypatch.setattr(rounds, "other_work", lambda *_: OtherWork(next(following, 0.0), "cc (pid 1)"))
    settings = {
        "loads": loads, "rounds": num_rounds, "seconds": 0.0, "warm_up": 0.0, "seed": 1,
        "allow_other_work": 0.05, "query_lengths": "short", "lengths": "short", "clients": 1, "documents": 1,
        "document_clients": 1, "bulk_clients": 1, "probe_rate": 1.0, "rate": 1.0,
    }  # fmt: skip
    servers: list[Server] = [Named("a", "192.0.2.1:8001"), Named("b", "192.0.2.1:8002")]
    arguments = Namespace(**settings)
    found = rounds.Rounds(arguments, servers, rounds.loads_of(arguments))
    found.run()
    return found


def test_a_void_round_is_void_for_all_targets_and_another_one_is_run(monkeypatch, capsys):
    found = run(monkeypatch, [0.0, 0.3])  # the second target of the first round
    assert (found.valid["query"], found.void["query"]) == (3, 1)
    for target in ("a", "b"):
        assert [sample.num_texts for sample in found.samples["query", target]] == [11, 12, 13]
        assert found.core_times["query", target].num_requests == 3
    assert "round 1, query: void, because others used 30 % of the processors, most of it cc (pid 1)" in (
        capsys.readouterr().err
    )
    assert ratios_of(found.samples, ["a", "b"])["query: a / b"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_a_void_part_of_the_mixed_load_voids_the_other_part_that_it_is_compared_with(monkeypatch):
    found = run(monkeypatch, [0.0, 0.0, 0.0, 0.3], loads=("mixed",))
    assert {len(samples) for samples in found.samples.values()} == {3}
    assert [sample.num_texts for sample in found.samples["bulk alone", "a"]] == [11, 12, 13]
    assert ("bulk beside and queries beside", "b") in found.core_times


def test_rows_are_in_the_same_order_whichever_round_was_the_first_valid_one(monkeypatch):
    found = run(monkeypatch, [0.3], loads=("query", "mixed"))  # query's first valid round is after mixed's
    streams = ("query", "bulk alone", "bulk beside", "queries beside")
    assert list(found.samples) == [(stream, target) for stream in streams for target in ("a", "b")]
    loads = ("query", "bulk alone", "bulk beside and queries beside")
    assert list(found.core_times) == [(load, target) for load in loads for target in ("a", "b")]


def test_a_server_on_another_machine_is_said_to_be_out_of_sight(monkeypatch, capsys):
    run(monkeypatch, [])
    assert "a: no process of this machine serves 192.0.2.1:8001" in capsys.readouterr().err


def test_the_order_of_targets_turns_after_valid_rounds_only(monkeypatch):
    asked = []
    monkeypatch.setattr(Named, "run", noting(asked, Named.run))
    run(monkeypatch, [0.0, 0.3])  # the first round is void
    assert asked == [*"ab", *"ab", *"ab", *"ba", *"ab"]  # warm-up, the void round, three valid ones


def noting(asked, answer):
    async def run(self, load, seconds, seed):
        asked.append(self.name)
        return await answer(self, load, seconds, seed)

    return run


@pytest.mark.parametrize(("quota", "is_told"), [(0.5, True), (math.inf, False)])
def test_a_quota_of_fewer_cores_is_told(quota, is_told, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "most_cores", lambda: quota)
    run(monkeypatch, [])
    assert ("a quota allows 0.5 of" in capsys.readouterr().err) == is_told


def test_as_many_rounds_again_are_run_at_most(monkeypatch):
    found = run(monkeypatch, [0.3] * 100)
    assert (found.valid["query"], found.void["query"]) == (0, 6)
    assert not found.samples


def test_loads_that_are_complete_do_not_run_again(monkeypatch):
    found = run(monkeypatch, [0.3], loads=("query", "documents"), num_rounds=1)
    assert dict(found.valid) == {"query": 1, "documents": 1}
    assert len(found.samples["documents", "a"]) == 1


def test_cached_queries_come_from_50_texts_that_are_the_same_in_every_round(monkeypatch):
    (stream,) = run(monkeypatch, [], loads=("cached",)).loads["cached"]["cached"]
    drawn = [{text for _, (text,) in zip(range(2000), rounds.requests_of(stream, seed), strict=False)} for seed in "ab"]
    assert len(drawn[0]) == 50
    assert drawn[0] == drawn[1]


def test_the_core_time_of_a_request_is_that_of_the_processes_that_are_seen():
    clock = CoreClock.of(["192.0.2.1:8001"])

    def work(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    clock.around(work, 0.05)
    assert clock.who == {os.getpid(): "client"}
    assert clock.spent["client"] == pytest.approx(0.05, abs=0.02)
    total = CoreTime({}, 0)
    total.add(CoreTime({"client": 0.2, "model": 0.0}, 10))
    total.add(CoreTime({"client": 0.1, "model": 0.0}, 20))
    assert total.per_request() == {"tritonserver": None, "model": 0.0, "gateway": None, "client": 10.0}

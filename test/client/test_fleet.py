"""Which of several servers gets the next request. Servers are letters here, and time is a number."""

from dataclasses import replace

import pytest
from nv_embed_client import InvalidInput, MockTransport, ModelNotFound, Unavailable
from nv_embed_client.addresses import places_of
from nv_embed_client.fleet import Fleet

INFO = MockTransport().info
OTHER = replace(INFO, fingerprint="1" * 32)
FULL = Unavailable("the queue is full")


def fleet_of(letters, now=0.0, info=INFO):
    """All asked, and good."""
    fleet = Fleet(has_choice=True)
    fleet.replace((letter, letter) for letter in letters)
    for letter in fleet.to_ask(now, urgently=False):
        fleet.told(letter, info, now)
    return fleet


def chosen(fleet, count, without=(), now=0.0):
    """Of so many requests, each answered before the next one."""
    letters = []
    for _ in range(count):
        letters.append(fleet.choose(without))
        fleet.ended(letters[-1], now)
    return "".join(letters)


def test_servers_get_requests_in_turn():
    assert chosen(fleet_of("abc"), 7) == "abcabca"


def test_nobody_is_chosen_before_the_answer_to_the_question_what_the_model_is():
    fleet = Fleet(has_choice=True)
    fleet.replace([("a", "a"), ("b", "b")])
    assert fleet.choose(()) is None
    assert fleet.to_ask(0, urgently=False) == ["a", "b"]
    assert fleet.may_become_good(())
    assert fleet.to_ask(0, urgently=True) == []  # one question is enough
    fleet.told("b", INFO, 0)
    fleet.refused("a", FULL, 0)
    assert chosen(fleet, 3) == "bbb"
    assert not fleet.may_become_good(())


def test_one_server_for_ever_gets_everything_and_is_asked_nothing():
    fleet = Fleet(has_choice=False)
    fleet.replace([("a", "a")])
    assert fleet.to_ask(0, urgently=True) == []
    assert chosen(fleet, 2) == "aa"
    fleet.refused("a", FULL, 0)
    assert chosen(fleet, 2) == "aa"
    assert fleet.choose(["a"]) is None
    assert fleet.due_seconds(0) is None


def test_a_server_that_refuses_rests_and_is_then_asked_again():
    fleet = fleet_of("abc")
    fleet.refused("b", FULL, 10)
    assert chosen(fleet, 4, now=10) == "acac"
    assert fleet.to_ask(10.5, urgently=True) == []  # others are good
    assert fleet.due_seconds(10.5) == 0.5
    assert fleet.to_ask(11, urgently=False) == ["b"]
    fleet.told("b", INFO, 11)
    assert sorted(chosen(fleet, 3)) == ["a", "b", "c"]
    assert fleet.due_seconds(11) is None


def test_when_nobody_is_good_a_request_has_those_that_rest_asked():
    fleet = fleet_of("ab")
    for letter in "ab":
        fleet.refused(letter, FULL, 10)
    assert fleet.to_ask(10.1, urgently=False) == []
    assert fleet.to_ask(10.1, urgently=True) == ["a", "b"]


def test_a_request_that_was_refused_goes_to_another_server():
    fleet = fleet_of("abc")
    assert chosen(fleet, 3, without="a") == "bcb"
    assert fleet.choose("abc") is None


def test_a_server_that_hangs_does_not_hold_up_all_requests():
    fleet = fleet_of("ab")
    num_hanging = 0
    for _ in range(200):
        if fleet.choose(()) == "a":
            num_hanging += 1
        else:
            fleet.ended("b", 0)
    assert 10 < num_hanging < 50


def test_of_the_reasons_that_nobody_is_good_one_that_may_pass_is_told():
    fleet = Fleet(has_choice=True)
    fleet.replace([("a", "a"), ("b", "b")])
    fleet.refused("a", ModelNotFound("absent"), 0)
    assert isinstance(fleet.reason(), ModelNotFound)
    fleet.refused("b", FULL, 0)
    assert fleet.reason() is FULL


def test_what_joins_is_asked_and_what_left_gets_nothing_more():
    fleet = fleet_of("ab")
    assert fleet.choose(()) == "a"
    fleet.replace([("b", "b"), ("c", "c")])
    fleet.ended("a", 0)
    assert fleet.to_ask(5, urgently=False) == ["c"]
    fleet.told("c", INFO, 5)
    assert sorted(chosen(fleet, 4)) == ["b", "b", "c", "c"]


def test_a_server_with_another_model_is_left_out_until_nobody_has_the_first(caplog):
    fleet = fleet_of("ab")
    fleet.replace((letter, letter) for letter in "abc")
    for now in (1, 3):  # said once
        assert fleet.to_ask(now, urgently=False) == ["c"]
        fleet.told("c", OTHER, now)
        assert chosen(fleet, 2) == "ab"
    assert [record.message.split(":")[0] for record in caplog.records] == ["c is left out"]
    assert OTHER.fingerprint in str(fleet.reason())
    for letter in "ab":
        fleet.refused(letter, FULL, 10)
    assert "c" in fleet.to_ask(11, urgently=False)
    fleet.told("c", OTHER, 11)
    assert fleet.choose(()) is None  # the others may be back in a moment
    assert "c" in fleet.to_ask(16, urgently=False)
    fleet.told("c", OTHER, 16)
    assert chosen(fleet, 1) == "c"
    assert "the model changes" in caplog.text
    fleet.told("a", INFO, 17)
    assert chosen(fleet, 2) == "cc"


def test_a_server_that_nobody_has_heard_of_for_a_while_is_asked_before_its_next_request(caplog):
    fleet = fleet_of("ab")
    assert chosen(fleet, 2, now=10) == "ab"
    assert fleet.choose(()) == "a"  # and it has not answered yet
    assert fleet.to_ask(11.5, urgently=True) == []
    assert fleet.to_ask(13, urgently=False) == []  # no request would go there
    assert fleet.to_ask(13, urgently=True) == ["b"]
    assert chosen(fleet, 2, now=13) == "aa"
    fleet.told("b", OTHER, 13)
    assert chosen(fleet, 2, now=13) == "aa"
    assert "b is left out" in caplog.text


def test_when_all_came_back_with_another_model_while_nobody_asked_requests_go_to_it():
    fleet = fleet_of("ab")
    assert fleet.to_ask(100, urgently=True) == ["a", "b"]
    fleet.told("a", OTHER, 100)
    fleet.told("b", OTHER, 100)
    assert chosen(fleet, 1, now=100) == "b"
    assert fleet.to_ask(101, urgently=False) == ["a"]
    fleet.told("a", OTHER, 101)
    assert sorted(chosen(fleet, 2, now=101)) == ["a", "b"]


def test_a_server_that_is_too_old_to_say_its_model_takes_part():
    fleet = fleet_of("ab")
    fleet.replace([("a", "a"), ("c", "c")])
    fleet.to_ask(1, urgently=False)
    fleet.told("c", None, 1)
    assert sorted(chosen(fleet, 2)) == ["a", "c"]


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001",
        "10.0.0.1:8001,10.0.0.2:8001",
        "embed-1:8001,10.0.0.2:8001,dns:///nv-embed.default.svc:8001",
        "[::1]:8001,[fe80::1%eth0]:8001",
        "ipv4:10.0.0.1:8001,10.0.0.2:8001",  # as gRPC writes a list
        "unix:/run/triton.sock",
    ],
)
def test_addresses_that_make_sense(url):
    assert len(places_of(url)) == url.count(",") + 1


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("", "''"),
        ("a:1,", "'' in 'a:1,'"),
        ("a:1,,b:1", "'' in 'a:1,,b:1'"),
        ("a:1, b:1", "' b:1' in 'a:1, b:1'"),
        ("a:1,b", "'b' in 'a:1,b'"),
        ("a:1,b:70000", "'b:70000' in"),
        ("a:1,b:0", "'b:0' in"),
        ("a:1,A:1", "'A:1' twice in 'a:1,A:1'"),
        ("::1:8001", "'::1:8001'"),
        ("[::g]:8001", "'\\[::g\\]:8001'"),
        ("http://a:1", "'http://a:1'"),
        ("dns://8.8.8.8/a:1", "'dns://8.8.8.8/a:1'"),
        ("dns:///a", "'dns:///a'"),
    ],
)
def test_addresses_that_make_no_sense_are_refused_with_the_part_that_is_wrong(url, got):
    with pytest.raises(InvalidInput, match=got):
        places_of(url)

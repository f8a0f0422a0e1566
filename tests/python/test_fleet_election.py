"""One call in the whole fleet, whoever asks: threads and tasks of many processes."""

import itertools
import random

import pytest
from fleets import KINDS
from loops import wait_until

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._redis_common import sha_of

VALUE = {"answer": [1, "two", None, 3.5]}


def ask_together(fleet, members, callers):
    """Return what many callers get who all ask before the call returns, and how many calls there were."""
    asked = [member.ask("k", callers=callers, value=VALUE, hold=True) for member in members]
    fleet.wait_for_waiting(len(members) - 1)
    for member in members:
        wait_until(lambda member=member: [flight.waiters for flight in member.do("flights")] == [callers - 1])
    for each in asked:
        each.release()
    return [result for each in asked for result in each.results()], sum(each.calls for each in asked)


@pytest.mark.parametrize("kinds", [["threads"] * 8, ["tasks"] * 8, KINDS * 4], ids=["threads", "tasks", "both"])
def test_all_callers_of_all_processes_share_one_call_and_one_more_after_the_ttl(fleet, kinds):
    members = fleet.processes(kinds, ttl_seconds=0.3)
    for _ in range(2):
        results, calls = ask_together(fleet, members, 50)
        assert calls == 1
        assert results == [VALUE] * 400
        wait_until(lambda: fleet.names() == [] and all(member.do("peek", "k") is None for member in members))
    assert sum(member.do("stats").calls for member in members) == 2


def test_every_key_has_one_call_in_whatever_order_processes_ask(fleet):
    members = fleet.processes(KINDS * 2, ttl_seconds=60)
    orders = [random.sample(range(200), 200) for _ in members]
    asked = [
        (key, member.ask(key, value={"of": key}))
        for turn in zip(*orders, strict=True)
        for member, key in zip(members, turn, strict=True)
    ]
    for key, each in asked:
        assert each.result() == {"of": key}
    assert sum(each.calls for _, each in asked) == 200
    stats = [member.do("stats") for member in members]
    assert sum(each.calls for each in stats) == 200
    assert sum(each.saved for each in stats) == 600
    assert [(each.errors, each.backend_errors, each.damaged, each.leases_lost) for each in stats] == [(0, 0, 0, 0)] * 4


def round_trips(seen):
    """Return the commands of members; renewals and what the test itself asks do not count."""
    renew = sha_of(scripts.RENEW)
    return [words for words in seen if words[0] not in {"lua", "scan", "hkeys", "ping"} and words[1:2] != [renew]]


@pytest.mark.parametrize(
    ("value", "to_wait"), [("short", 1), ("long" * 10_000, 2)], ids=["in the message", "longer than a message"]
)
def test_round_trips_depend_on_processes_and_not_on_callers(fleet, value, to_wait):
    leader, *waiters, late = members = fleet.processes([*KINDS, *KINDS, "threads"], ttl_seconds=60)
    for number, member in enumerate(members):
        member.get(("first contact", number))
    with fleet.commands() as seen:
        led = leader.ask("k", value=value, callers=5, hold=True).wait_for_call()
        waiting = [waiter.ask("k", callers=5) for waiter in waiters]
        fleet.wait_for_waiting(3)
        led.release()
        for each in [led, *waiting]:
            assert each.results() == [value] * 5
    assert len(round_trips(seen)) == 2 + 3 * to_wait
    messages = [words[2] for words in seen if words[:2] == ["lua", "publish"]]
    assert len(messages) == len(set(messages)) == 3, "one message for each process that waits"

    with fleet.commands() as seen:
        assert late.get("k", callers=1) == value
    assert len(round_trips(seen)) == 1
    assert late.do("stats").fleet_hits == 1

    with fleet.commands() as seen:
        for member in members:
            assert member.ask("k", callers=5).results() == [value] * 5
    assert round_trips(seen) == [], "what is retained in the process needs no server"


@pytest.mark.parametrize(("leading", "waiting"), list(itertools.product(KINDS, KINDS)))
def test_threads_and_tasks_share_flights(fleet, leading, waiting):
    one, other = fleet.member(leading), fleet.member(waiting)
    led = one.ask("k", value=VALUE, hold=True, callers=3).wait_for_call()
    waits = other.ask("k", callers=3)
    fleet.wait_for_waiting()
    led.release()
    assert led.results() + waits.results() == [VALUE] * 6
    assert (led.calls, waits.calls) == (1, 0)
    assert all(result is led.results()[0] for result in led.results()), "one object in the process that called"


@pytest.mark.parametrize("kind", KINDS)
def test_a_waiter_that_gives_up_leaves_the_others_and_the_call_alone(fleet, kind):
    leader, one, other = fleet.member(), fleet.member(kind), fleet.member(kind)
    led = leader.ask("k", value=VALUE, hold=True).wait_for_call()
    patient = other.ask("k")
    fleet.wait_for_waiting(1)
    for timeout in [0, 0.01]:
        with pytest.raises(TimeoutError):
            one.get("k", timeout=timeout)
    stats = one.do("stats")
    assert (stats.calls, stats.timeouts, stats.errors, stats.retained) == (0, 2, 0, 0)
    fleet.wait_for_waiting(1)
    led.release()
    assert [led.result(), patient.result(), one.get("k")] == [VALUE] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_is_not_for_those_who_wait_behind_it(fleet, kind):
    leader, member = fleet.member(), fleet.member(kind)
    led = leader.ask("k", value=VALUE, hold=True).wait_for_call()
    hasty = member.ask("k", timeout=1.0)
    fleet.wait_for_waiting(1)
    patient = member.ask("k", callers=3)
    with pytest.raises(TimeoutError):
        hasty.result()
    led.release()
    assert patient.results() == [VALUE] * 3
    assert (led.calls, patient.calls) == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_strangers_are_no_outcomes(fleet, kind):
    leader, member = fleet.member(), fleet.member(kind)
    led = leader.ask("k", value=VALUE, hold=True).wait_for_call()
    waits = member.ask("k")
    fleet.wait_for_waiting()
    (flight,) = fleet.names()
    digest, name = flight.split("{")[1].split("}")[0], fleet.client.hget(flight, "name").decode()
    channels = [channel.decode() for channel in fleet.client.pubsub_channels(f"{fleet.namespace}:*")]
    assert len(channels) == 3, "an inbox for each of both, and one for all"
    for channel in channels:
        for message in [
            b"",
            b"done",
            b"\xff\x00",
            f"done {digest} {name} key cos\nsystem\n(S'true'\ntR.".encode(),
            f"done {digest} {name} key ".encode(),
            f"done {digest} another key {{}}".encode(),
            f"free {digest} {name}".encode(),
            f"forget {digest}".encode(),
        ]:
            fleet.client.publish(channel, message)
    again = member.ask("k")
    fleet.wait_for_waiting()
    assert not waits.done()
    led.release()
    assert [waits.result(), again.result()] == [VALUE] * 2
    assert waits.calls + again.calls == 0

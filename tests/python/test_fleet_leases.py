"""Leaders that die, hang, or give up: their keys are free within one lease, and what they say too late is refused."""

import asyncio
import threading
import time

import pytest
from fleets import KEPT, KINDS, ProcessDiedError
from loops import wait_until

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._fleet_wire import About, JsonSerializer, pack_value
from llm_batch_coalesce._redis_common import sha_of

FOREVER = 3600.0  # a lease that no test sees run out: what happens, happens by a message


def has_waited(member, seconds):
    """Return when a member's only flight is so old."""
    wait_until(lambda: [flight.age_seconds > seconds for flight in member.do("flights")] == [True])


@pytest.mark.parametrize("kind", KINDS)
def test_one_waiter_takes_over_from_a_leader_that_was_killed(fleet, kind):
    lease = 2 * KEPT
    leader, *waiters = fleet.processes([kind, *KINDS], lease_seconds=lease)
    led = leader.ask("k", hold=True, callers=5).wait_for_call()
    waiting = [waiter.ask("k", value=number, callers=5) for number, waiter in enumerate(waiters)]
    fleet.wait_for_waiting(2)
    leader.kill()
    died = time.monotonic()
    with pytest.raises(ProcessDiedError):
        led.results()
    results = [result for each in waiting for result in each.results()]
    assert time.monotonic() - died < 1.5 * lease
    assert sum(each.calls for each in waiting) == 1
    assert results == [results[0]] * 10


def test_the_key_of_a_leader_that_was_killed_is_free_though_nobody_waited(fleet):
    leader, other = fleet.processes(KINDS, lease_seconds=0.4)
    leader.ask("k", hold=True).wait_for_call()
    leader.kill()
    assert other.get("k", "other") == "other"


@pytest.mark.parametrize("kind", KINDS)
def test_a_leader_that_was_paused_past_its_lease_is_refused(fleet, kind):
    paused, other, third = fleet.processes([kind, "tasks", "threads"], lease_seconds=KEPT, ttl_seconds=60)
    led = paused.ask("k", value="late", hold=True, callers=3).wait_for_call()
    took_over = other.ask("k", value="new", hold=True)
    fleet.wait_for_waiting(1)
    paused.pause()
    took_over.wait_for_call()
    waits = third.ask("k")
    fleet.wait_for_waiting(1)
    led.release()
    paused.resume()
    assert led.results() == ["late"] * 3, "its own callers get it all the same"
    assert paused.do("stats").leases_lost == 1
    fleet.wait_for_waiting(1)  # the new flight was neither ended nor released
    assert not waits.done()
    assert paused.do("stats").retained == 0
    behind = paused.ask("k")
    fleet.wait_for_waiting(2)
    took_over.release()
    assert [each.result() for each in [took_over, waits, behind]] == ["new"] * 3
    assert (led.calls, took_over.calls, waits.calls, behind.calls) == (1, 1, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_error_or_release_is_refused_too(fleet, kind):
    options = {"lease_seconds": 0.4, "ttl_seconds": 60, "private_errors": KeyError}
    paused, other = fleet.processes([kind, "threads"], **options)
    errors = [ValueError("late"), KeyError("late")]
    for number, error in enumerate(errors):
        led = paused.ask(number, error=error, hold=True).wait_for_call()
        took_over = other.ask(number, value="new", hold=True)
        fleet.wait_for_waiting(1)
        paused.pause()
        took_over.wait_for_call()
        led.release()
        paused.resume()
        with pytest.raises(type(error), match="late"):
            led.result()
        behind = paused.ask(number)
        fleet.wait_for_waiting(1)
        took_over.release()
        assert [took_over.result(), behind.result()] == ["new"] * 2
        assert behind.calls == 0, "the error of a lease that was lost is not retained"


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_outlives_its_lease_many_times_keeps_it(fleet, kind):
    keys = range(20)
    leader, other = fleet.member(kind, lease_seconds=KEPT), fleet.member(lease_seconds=KEPT)
    led = [leader.ask(key, value=key, hold=True).wait_for_call() for key in keys]
    waits = [other.ask(key) for key in keys]
    fleet.wait_for_waiting(1, flights=len(keys))
    oldest = max(flight.age_seconds for flight in other.do("flights"))
    with fleet.commands() as seen:
        wait_until(lambda: all(flight.age_seconds > oldest + 2 * KEPT for flight in other.do("flights")))
    renewed = {words[3] for words in seen if words[1:2] == [sha_of(scripts.RENEW)]}
    assert len(renewed) == len(keys)
    if kind == "threads":
        assert [thread.name for thread in threading.enumerate()].count("coalesce-leases") == 1
    for each in led:
        each.release()
    assert [each.result() for each in waits] == [each.result() for each in led] == list(keys)
    assert [each.calls for each in waits] == [0] * len(keys)
    assert leader.do("stats").leases_lost == 0


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_looks_no_more_often_than_leases_run_out(fleet, kind):
    leader, other = fleet.member(lease_seconds=KEPT), fleet.member(kind, lease_seconds=KEPT)
    led = leader.ask("k", hold=True).wait_for_call()
    waits = other.ask("k", callers=5)
    fleet.wait_for_waiting(1)
    with fleet.commands() as seen:
        has_waited(other, 2 * KEPT)
    looks = [words for words in seen if words[1:2] == [sha_of(scripts.CLAIM)]]
    assert 1 <= len(looks) <= 6  # 2 to 4, unless renewals come late
    led.release()
    assert waits.results() == [None] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_that_was_lost_costs_no_more_than_a_lease(fleet, kind):
    member = fleet.member(kind, lease_seconds=0.4, ttl_seconds=60)
    member.get("first contact")
    names, digest = member.coalescer._fleet.names, member.coalescer._key("k").digest
    fleet.client.hset(names.flight(digest), mapping={"token": "of a stranger", "name": "stranger"})
    fleet.client.pexpire(names.flight(digest), 400)
    waits = member.ask("k")
    fleet.wait_for_waiting(1)
    fleet.client.set(names.outcome(digest), pack_value(JsonSerializer(), "found", About(0.1, 60, "x")), px=60_000)
    fleet.client.delete(names.flight(digest))
    assert waits.result() == "found"
    assert waits.calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_that_was_cut_off_looks_when_it_is_back_and_drops_what_it_retained(fleet, kind):
    leader, member = fleet.member(lease_seconds=FOREVER), fleet.member(kind, lease_seconds=FOREVER, ttl_seconds=60)
    assert member.get("kept") is None
    led = leader.ask("k", value="value", hold=True).wait_for_call()
    waits = member.ask("k")
    fleet.wait_for_waiting(1)
    fleet.client.client_kill_filter(_type="pubsub")
    wait_until(lambda: not member.do("__contains__", "kept"))
    led.release()
    assert waits.result() == "value"
    assert waits.calls == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [KeyError("of one caller"), SystemExit(3)], ids=["private", "BaseException"])
def test_an_error_of_one_caller_hands_the_call_to_one_waiter(fleet, kind, error):
    if kind == "tasks" and not isinstance(error, Exception):
        error = asyncio.CancelledError()  # others end the loop
    members = [fleet.member(each, lease_seconds=FOREVER, private_errors=KeyError) for each in [kind, *KINDS]]
    led = members[0].ask("k", error=error, hold=True).wait_for_call()
    waiting = [member.ask("k", value="value", hold=True) for member in members[1:]]
    fleet.wait_for_waiting(2)
    led.release()
    with pytest.raises(type(error)):
        led.result()
    wait_until(lambda: sum(each.calls for each in waiting) == 1)
    fleet.wait_for_waiting(1)
    again = members[0].ask("k")
    fleet.wait_for_waiting(2)
    for each in waiting:
        each.release()
    assert [each.result() for each in [*waiting, again]] == ["value"] * 3
    assert (sum(each.calls for each in waiting), again.calls) == (1, 0)


def test_the_lead_is_not_handed_to_a_process_that_no_longer_waits(fleet):
    options = {"lease_seconds": FOREVER, "private_errors": KeyError}
    (dead,) = fleet.processes(["threads"], **options)
    leader, hasty, member = (fleet.member(**options) for _ in range(3))
    led = leader.ask("k", error=KeyError(), hold=True).wait_for_call()
    dead.ask("k")
    fleet.wait_for_waiting(1)
    with pytest.raises(TimeoutError):
        hasty.get("k", timeout=0.01)
    waits = member.ask("k", value="value")
    fleet.wait_for_waiting(2)
    dead.kill()
    # The server has seen that its subscriber is gone.
    wait_until(lambda: len(fleet.client.pubsub_channels(f"{fleet.namespace}:0:inbox:*")) == 3)
    led.release()
    assert waits.result() == "value"


def test_a_cancelled_leader_hands_over_at_once(fleet):
    leader, member = fleet.member("tasks", lease_seconds=FOREVER), fleet.member(lease_seconds=FOREVER)
    led = leader.ask("k", hold=True).wait_for_call()
    waits = member.ask("k", value="value")
    fleet.wait_for_waiting(1)
    leader.loop.do(led.tasks[0].cancel)
    assert isinstance(led.results()[0], asyncio.CancelledError)
    assert waits.result() == "value"


def test_a_waiter_that_was_cancelled_is_no_longer_told(fleet):
    leader, member = fleet.member(lease_seconds=FOREVER), fleet.member("tasks", lease_seconds=FOREVER)
    led = leader.ask("k", value="value", hold=True).wait_for_call()
    waits = member.ask("k")
    fleet.wait_for_waiting(1)
    member.loop.do(waits.tasks[0].cancel)
    assert isinstance(waits.results()[0], asyncio.CancelledError)
    fleet.wait_for_waiting(0)
    led.release()
    assert led.result() == member.get("k") == "value"


def test_callers_that_are_cancelled_at_any_time_leave_nothing_behind(fleet):
    leader, other = fleet.member(lease_seconds=FOREVER), fleet.member(lease_seconds=FOREVER)
    member = fleet.member("tasks", lease_seconds=FOREVER)
    member.get("first contact")
    led = leader.ask("k", value="value", hold=True).wait_for_call()
    for number in range(40):
        for asked in [member.ask("k"), member.ask(number, hold=True)]:
            for _ in range(number % 8):
                member.loop.do(len, "")  # the loop goes on by as many rounds
            member.loop.do(asked.tasks[0].cancel)
            asked.results()
    wait_until(lambda: member.do("flights") == [] and fleet.waiting() == [0])
    assert [other.get(number, number) for number in range(40)] == list(range(40))
    led.release()
    assert led.result() == "value"


def test_a_call_whose_callers_have_left_may_finish_for_the_fleet(fleet):
    leader, member = fleet.member("tasks", on_abandoned="finish"), fleet.member()
    led = leader.ask("k", value="value", hold=True).wait_for_call()
    waits = member.ask("k", value="its own")
    fleet.wait_for_waiting(1)
    leader.loop.do(led.tasks[0].cancel)
    assert isinstance(led.results()[0], asyncio.CancelledError)
    led.release()
    assert (waits.result(), waits.calls) == ("value", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_leaves_those_alone_who_wait_for_the_next_flight(fleet, kind):
    first, second = (fleet.member(lease_seconds=FOREVER) for _ in range(2))
    member = fleet.member(kind, lease_seconds=FOREVER)
    old = first.ask("k", value="old", hold=True).wait_for_call()
    hasty = member.ask("k", timeout=2.0)
    fleet.wait_for_waiting(1)
    first.do("forget", "k")
    wait_until(lambda: "k" not in member.coalescer)
    new = second.ask("k", value="new", hold=True).wait_for_call()
    patient = member.ask("k")
    flight = member.coalescer._fleet.names.flight(member.coalescer._key("k").digest)
    inboxes = [b"inbox:" + member.coalescer._fleet.inbox.encode()]
    wait_until(lambda: [field for field in fleet.client.hkeys(flight) if field.startswith(b"inbox:")] == inboxes)
    with pytest.raises(TimeoutError):
        hasty.result()
    assert [field for field in fleet.client.hkeys(flight) if field.startswith(b"inbox:")] == inboxes
    new.release()
    assert patient.result() == "new"
    old.release()


@pytest.mark.parametrize("kind", KINDS)
def test_a_timeout_counts_from_when_its_caller_came(fleet, kind):
    leader, member = fleet.member(), fleet.member(kind)
    led = leader.ask("k", hold=True).wait_for_call()
    first = member.ask("k", timeout=4.0)
    fleet.wait_for_waiting(1)
    second = member.ask("k", timeout=4.1)
    ended = []
    for asked in [first, second]:
        with pytest.raises(TimeoutError, match=r"4\.[01] seconds"):
            asked.result()
        ended.append(time.monotonic())
    # Who takes over from the first has waited for as long.
    assert ended[1] - ended[0] < 3.0
    led.release()

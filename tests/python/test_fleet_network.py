"""A fleet on a network that loses, delays and cuts: nobody hangs, every value is right, one call a process."""

import asyncio
import itertools
import socket
import threading
import time

import pytest
from fleet_proxy import DOWN, UP
from fleets import KINDS, wait_until_shared
from loops import PATIENCE, wait_until

from llm_batch_coalesce import _redis_common


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only", [None, "inbox", "commands"])
def test_cut_connections_are_made_anew_and_what_waits_is_served(fleet, proxy, behind, kind, only):
    first, second = behind(kind, lease_seconds=3.0), behind(kind, lease_seconds=3.0)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    proxy.cut(only)
    proxy.wait_for_inboxes(2)
    leads.release()
    assert (leads.result(), leads.calls) == (1, 1)
    assert (waits.result(), waits.calls) == (1, 0)
    assert (first.coalescer.stats().backend_errors, second.coalescer.stats().backend_errors) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_connection_of_the_inbox_alone_cannot_be_made(fleet, proxy, behind, kind):
    first, second = behind(kind), fleet.member(kind)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    proxy.refuse()
    proxy.cut("inbox")
    wait_until(lambda: proxy.count("inbox") == 0)
    # Its commands still pass: what it leads is shared; but it does not begin to wait for anybody without its inbox.
    leads.release()
    assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)
    others = itertools.count()
    # As soon as it has noticed.
    wait_until(lambda: first.get(next(others), 3) == 3 and first.coalescer.stats().backend_errors >= 1)
    proxy.heal()
    wait_until_shared(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_that_are_lost_are_made_up_for_when_the_lease_has_run_out(fleet, proxy, behind, kind):
    first, second = fleet.member(kind, lease_seconds=1.0), behind(kind, lease_seconds=1.0)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", callers=4, value=2)
    fleet.wait_for_waiting()
    proxy.blackhole(DOWN, only="inbox")
    leads.release()
    assert leads.result() == 1
    assert (waits.results(), waits.calls) == ([1] * 4, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_that_are_lost_of_a_call_that_retains_nothing(fleet, proxy, behind, kind):
    first, second = fleet.member(kind, lease_seconds=1.0), behind(kind, lease_seconds=1.0)
    leads = first.ask("k", value=1, hold=True, retain_seconds=0.0).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    proxy.blackhole(DOWN, only="inbox")
    leads.release()
    # The outcome is there for one lease, which is when it looks; if it comes too late, it calls.
    assert leads.result() == 1
    assert (waits.result(), waits.calls) in [(1, 0), (2, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_inbox_that_died_silently_is_found_and_what_was_retained_is_dropped(fleet, proxy, behind, kind, monkeypatch):
    monkeypatch.setattr(_redis_common, "PING_EVERY", 0.2)
    first, second = behind(kind, ttl_seconds=600), fleet.member(kind, ttl_seconds=600)
    assert first.get("k", 1) == 1
    assert first.get("kept", 1) == 1
    waits_for = second.ask("waited", value="w", hold=True).wait_for_call()
    waits = first.ask("waited", value="w of its own")
    fleet.wait_for_waiting()
    # Half open: no end is told.
    proxy.blackhole(only="inbox")
    assert second.do("forget", "k") is True
    waits_for.release()
    assert waits_for.result() == "w"
    proxy.wait_for_inboxes(1)
    # It looks when it is connected again, not only when the lease has run out.
    assert (waits.result(), waits.calls) == ("w", 0)
    wait_until(lambda: "k" not in first.coalescer)
    assert first.get("k", 2) == 2
    assert first.get("kept", 2) == 1, "it is on the server still"


@pytest.mark.parametrize("kind", KINDS)
def test_connections_that_are_dead_from_their_beginning_are_made_anew(fleet, proxy, behind, kind):
    first, second = behind(kind), fleet.member(kind)
    # Of one that has no connection yet every byte gets lost, both of commands and of the inbox.
    proxy.blackhole(later=True)
    assert (first.get("k", 1), second.get("k", 2)) == (1, 2)
    proxy.heal()
    # The old connections stay dead.
    wait_until_shared(first, second)
    assert first.coalescer.stats().backend_errors >= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [(UP, DOWN), (DOWN,)], ids=["unheard", "heard"])
def test_a_subscription_that_is_never_confirmed_is_made_anew(fleet, proxy, behind, kind, lost):
    first, second = behind(kind), fleet.member(kind)
    # It has a connection for commands then, and no inbox yet.
    assert first.do("peek", "k") is None
    proxy.blackhole(*lost, only="inbox", later=True)
    assert (first.get("k", 1), second.get("k", 2)) == (1, 2)
    assert first.coalescer.stats().backend_errors == 1
    # The connection itself was made: it is the SUBSCRIBE, or what is said of it, that gets lost.
    wait_until(lambda: proxy.count("inbox") >= 1)
    # Commands pass: what others retain is found without an inbox.
    assert second.get("other", 3) == 3
    assert first.do("peek", "other") == 3
    proxy.heal()
    # The subscriber gives the dead one up by itself, even if nobody asks.
    proxy.wait_for_inboxes(1)
    wait_until_shared(first, second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_connections_that_are_half_closed(fleet, proxy, behind, kind, direction):
    first, second = behind(kind), fleet.member(kind)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    proxy.half_close(direction)
    assert first.get("other", 3) == 3
    leads.release()
    assert leads.result() == 1
    if direction == DOWN:
        # It was told on the next connection.
        assert (waits.result(), waits.calls) == (1, 0)
    wait_until_shared(first, fleet.member(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_bytes_that_get_lost_in_one_direction(fleet, proxy, behind, kind, direction):
    first, second = behind(kind), behind(kind)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    proxy.blackhole(direction, later=True)
    began = time.monotonic()
    asked = [member.ask("other", callers=3, value=number) for number, member in enumerate([first, second])]
    assert [one.results() for one in asked] == [[0] * 3, [1] * 3]
    assert [one.calls for one in asked] == [1, 1]
    leads.release()
    assert leads.result() == 1
    assert time.monotonic() - began < PATIENCE
    proxy.heal()
    wait_until_shared(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_network_is_waited_for_and_a_too_slow_one_is_not(fleet, proxy, behind, kind):
    first, second = behind(kind, backend_timeout_seconds=10.0), fleet.member(kind)
    proxy.delay(0.03)
    leads = first.ask("k", value=1, hold=True).wait_for_call()
    waits = second.ask("k", value=2)
    fleet.wait_for_waiting()
    leads.release()
    assert (leads.result(), waits.result(), waits.calls) == (1, 1, 0)
    assert first.coalescer.stats().backend_errors == 0
    hasty = behind(kind, backend_timeout_seconds=0.1)
    proxy.delay(1.0, DOWN)
    assert hasty.get("k", 3) == 3
    assert hasty.coalescer.stats().backend_errors == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_flaky_network_never_mixes_answers_up(fleet, proxy, behind, kind):
    members = [behind(kind, lease_seconds=1.0, ttl_seconds=0.0) for _ in range(2)]
    stop = threading.Event()

    def shake():
        for step in range(1000):
            if stop.wait(0.03):
                return
            [proxy.cut, lambda: proxy.delay(0.02), lambda: proxy.cut("inbox"), proxy.heal][step % 4]()

    shaking = threading.Thread(target=shake)
    shaking.start()
    try:
        for turn in range(15):
            asked = [
                (key, member.ask((turn, key), callers=2, value=[turn, key])) for key in range(4) for member in members
            ]
            for key, one in asked:
                assert [list(result) for result in one.results()] == [[turn, key]] * 2
                assert one.calls <= 2
    finally:
        stop.set()
        shaking.join()


def test_tasks_that_are_cancelled_in_the_middle_of_commands_leave_no_answers_behind(fleet, proxy, behind):
    member = behind("tasks", backend_timeout_seconds=5.0, ttl_seconds=600)
    assert member.get("first", "first") == "first"
    proxy.delay(0.02)

    async def storm():
        coalescer = member.coalescer

        async def call():
            await asyncio.sleep(0.01)
            return "wrong"

        for turn in range(20):
            tasks = [asyncio.create_task(coalescer.get_or_call(("storm", turn, key), call)) for key in range(10)]
            await asyncio.sleep(0.004 * (turn % 10))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        async def right(key):
            await asyncio.sleep(0)
            return ["right", key]

        async def check(key):
            assert list(await coalescer.get_or_call(("right", key), lambda: right(key))) == ["right", key]

        await asyncio.gather(*(check(key) for key in range(100)))

    member.loop.start(storm()).result()
    assert proxy.count() <= 70, "connections are reused"
    other = fleet.member()
    assert [list(other.get(("right", key))) for key in range(100)] == [["right", key] for key in range(100)]


def test_a_resolver_that_hangs_holds_no_thread_up(fleet, monkeypatch):
    answers, resolve = threading.Event(), socket.getaddrinfo

    def hang(*args, **options):
        assert answers.wait(PATIENCE)
        return resolve(*args, **options)

    first, second = fleet.member(backend_timeout_seconds=0.5), fleet.member()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", hang)
        assert first.get("k", 1) == 1
        assert not answers.is_set()
        assert first.coalescer.stats().backend_errors == 1
        answers.set()
    wait_until_shared(first, second)

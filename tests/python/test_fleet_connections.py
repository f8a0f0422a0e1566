"""Connections of a process: as many as the client may have, in turn, and never with an answer of another's."""

import threading

import pytest
import redis
import redis.asyncio
from fleets import KEPT, KINDS
from loops import wait_until

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce import _redis_connections
from llm_batch_coalesce._redis_common import sha_of
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer


class Interrupted(redis.connection.Connection):
    """It is interrupted once, after a command was sent and before its answer is read."""

    armed = False

    def read_response(self, *args, **options):
        if Interrupted.armed and threading.current_thread() is threading.main_thread():
            Interrupted.armed = False
            raise KeyboardInterrupt
        return super().read_response(*args, **options)


@pytest.mark.parametrize("how", ["peek", "get_or_call"])
def test_the_answer_of_a_command_that_was_interrupted_is_nobody_elses(fleet, how, monkeypatch):
    # Not even one that comes at once.
    monkeypatch.setattr(_redis_connections, "_FRESH", 60.0)
    other = fleet.member(ttl_seconds=600)
    for key in ["a", "b", "c"]:
        assert other.get(key, f"of {key}") == f"of {key}"
    pool = redis.ConnectionPool(connection_class=Interrupted, **fleet.server.address)
    # It retains one outcome, and so asks the server each time.
    member = fleet.member(client=redis.Redis.from_pool(pool), max_retained=1)
    member.get("before", 1)
    args = [] if how == "peek" else [lambda: "its own"]
    Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        getattr(member.coalescer, how)("a", *args)
    assert [getattr(member.coalescer, how)(key, *args) for key in ["b", "c"] * 3] == ["of b", "of c"] * 3


def test_threads_have_the_only_connection_in_the_order_in_which_they_come(fleet):
    client = redis.Redis(**fleet.server.address, max_connections=1)
    member = fleet.member(client=client, backend_timeout_seconds=0.5, on_backend_error="raise")
    start, errors = threading.Barrier(8), []

    def look():
        start.wait()
        try:
            for _ in range(300):
                assert member.coalescer.peek("k", "nothing") == "nothing"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("refused", ["coalesce-inbox", "coalesce-leases"])
def test_calls_are_made_though_no_thread_can_be_started_and_leases_are_renewed_later(fleet, monkeypatch, refused):
    member = fleet.member(lease_seconds=KEPT)
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert member.get("refused", 1) == 1
    assert member.coalescer.stats().backend_errors == (1 if refused == "coalesce-inbox" else 0)
    held = member.ask("held", value=2, hold=True).wait_for_call()
    flight = member.coalescer._fleet.names.flight(member.coalescer._key("held").digest)
    lefts = [fleet.client.pttl(flight)]

    def is_renewed():
        lefts.append(fleet.client.pttl(flight))
        return lefts[-1] > lefts[-2]

    with fleet.commands() as seen:
        wait_until(is_renewed)
    held.release()
    assert held.result() == 2
    # EVALSHA, the script, two keys, of which the first is the flight.
    renewed = [words[3].strip('"') for words in seen if words[:2] == ["evalsha", sha_of(scripts.RENEW)]]
    assert set(renewed) == {flight}


class OwnPool(redis.ConnectionPool):
    """A user's own class, so the client is used as it is."""


class OwnAsyncPool(redis.asyncio.ConnectionPool):
    """The same for tasks."""


def own_client(kind, fleet, most):
    if kind == "threads":
        return redis.Redis.from_pool(OwnPool(**fleet.server.address, max_connections=most, socket_timeout=5.0))
    return redis.asyncio.Redis.from_pool(OwnAsyncPool(**fleet.server.address, max_connections=most))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_of_the_users_own_has_a_connection_for_messages_and_the_others_in_turn(fleet, kind):
    member = fleet.member(kind, client=own_client(kind, fleet, 3))
    asked = [member.ask(key, value=key, hold=True) for key in range(30)]
    for each in asked:
        each.wait_for_call().release()
    assert [each.result() for each in asked] == list(range(30))
    assert (member.do("stats").calls, member.do("stats").backend_errors) == (30, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_of_the_users_own_has_two_connections_or_more(fleet, kind):
    made = DistributedBatchCoalescer if kind == "threads" else AsyncDistributedBatchCoalescer
    with pytest.raises(ValueError, match="2 connections or more"):
        made(own_client(kind, fleet, 1))

"""Beginnings and ends: what a coalescer needs, and what is left of it when it is closed, abandoned or forked."""

import asyncio
import gc
import os
import subprocess
import sys
import threading

import pytest
import redis
import redis.asyncio
from fleets import KEPT, KINDS
from loops import LoopThread, let_run, wait_until
from test_fork import Child
from watching import Freed

from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, BackendError, DistributedBatchCoalescer

both_kinds = pytest.mark.parametrize("kind", KINDS)


def connections(fleet, kind="normal"):
    return len(fleet.client.client_list(_type=kind))


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("coalesce-")]


@both_kinds
def test_close_ends_threads_and_connections(fleet, kind):
    before = connections(fleet)
    member = fleet.member(kind)
    held = member.ask("k", value="v", hold=True).wait_for_call()
    assert connections(fleet, "pubsub") == 1
    held.release()
    held.result()
    member.do("close")
    wait_until(lambda: threads() == [])
    wait_until(lambda: connections(fleet) == before and connections(fleet, "pubsub") == 0)
    member.do("close")
    member.do("stats")
    for ask in [
        lambda: member.get("k"),
        lambda: member.get("new"),
        lambda: member.ask("k", how="outcome").result(),
        lambda: member.do("peek", "k"),
        lambda: member.do("forget", "k"),
    ]:
        with pytest.raises(RuntimeError, match="closed"):
            ask()
    wait_until(lambda: threads() == [])


@both_kinds
def test_a_process_leads_more_flights_than_its_client_may_have_connections(fleet, kind):
    library = redis if kind == "threads" else redis.asyncio
    before = connections(fleet)
    member = fleet.member(kind, client=library.Redis(**fleet.server.address, max_connections=2))
    asked = [member.ask(key, value=key, hold=True) for key in range(200)]
    for each in asked:
        each.wait_for_call().release()
    assert [each.result() for each in asked] == list(range(200))
    assert (member.do("stats").calls, member.do("stats").backend_errors) == (200, 0)
    assert connections(fleet) <= before + 2


@both_kinds
def test_close_ends_waits_and_leaves_calls_their_results(fleet, kind):
    leader, member = fleet.member(kind, lease_seconds=1), fleet.member(kind)
    led = leader.ask("k", value="v", hold=True, callers=2).wait_for_call()
    waits = member.ask("k", callers=2)
    fleet.wait_for_waiting(1)
    member.do("close")
    for error in waits.results():
        assert isinstance(error, RuntimeError)
        assert "closed" in str(error)
    if kind == "threads":
        closing = threading.Thread(target=leader.do, args=("close",))
        closing.start()
    else:
        closing = leader.loop.start(leader.coalescer.close())
    wait_until(lambda: leader.coalescer._closed)
    led.release()
    assert led.results() == ["v"] * 2
    _ = closing.join() if kind == "threads" else closing.result()


def test_a_with_block_closes(fleet):
    with DistributedBatchCoalescer(fleet.client, namespace=fleet.namespace) as coalescer:
        assert coalescer.get_or_call("k", lambda: 1) == 1
        # The thread that has made connections ends by itself.
        wait_until(lambda: threads() == ["coalesce-inbox", "coalesce-leases"])
    wait_until(lambda: threads() == [])
    assert fleet.client.ping(), "the client stays open"
    with pytest.raises(ZeroDivisionError), coalescer:
        1 / 0


async def test_an_async_with_block_closes(fleet):
    async def call():
        return 1

    async with redis.asyncio.Redis(**fleet.server.address) as client:
        async with AsyncDistributedBatchCoalescer(client, namespace=fleet.namespace) as coalescer:
            assert await coalescer.get_or_call("k", call) == 1
            assert {task.get_name() for task in asyncio.all_tasks()} > {"coalesce-inbox", "coalesce-leases"}
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await client.ping()


def test_an_abandoned_coalescer_leaves_no_thread_and_no_connection(fleet):
    before = connections(fleet)
    coalescer = DistributedBatchCoalescer(fleet.client, namespace=fleet.namespace)
    assert coalescer.get_or_call("k", lambda: 1) == 1
    freed = Freed(coalescer)
    del coalescer
    gc.collect()
    assert freed.wait()
    wait_until(lambda: threads() == [])
    gc.collect()
    wait_until(lambda: connections(fleet) <= before and connections(fleet, "pubsub") == 0)


async def test_an_abandoned_coalescer_of_tasks_leaves_no_task(fleet):
    async def call():
        return 1

    async with redis.asyncio.Redis(**fleet.server.address) as client:
        coalescer = AsyncDistributedBatchCoalescer(client, namespace=fleet.namespace)
        assert await coalescer.get_or_call("k", call) == 1
        freed = Freed(coalescer)
        del coalescer
        gc.collect()
        assert freed.is_set()
        _, pending = await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=30)
        assert pending == set()
        await let_run()
        assert len(asyncio.all_tasks()) == 1
    wait_until(lambda: connections(fleet, "pubsub") == 0)


def test_a_program_that_abandons_its_coalescers_ends(fleet):
    program = f"""
import asyncio, threading, redis, redis.asyncio
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer
address = dict(host="127.0.0.1", port={fleet.server.port})
one = DistributedBatchCoalescer(redis.Redis(**address), namespace="{fleet.namespace}")
print(one.get_or_call("k", lambda: "one"))
async def main():
    other = AsyncDistributedBatchCoalescer(redis.asyncio.Redis(**address), namespace="{fleet.namespace}")
    async def call():
        return "other"
    print(await other.get_or_call("k", call))
asyncio.run(main())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert ran.stdout == "one\none\n"
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_an_inbox_and_connections_of_its_own(fleet):
    parent = DistributedBatchCoalescer(fleet.client, namespace=fleet.namespace, lease_seconds=KEPT, ttl_seconds=60)
    other = fleet.member(lease_seconds=KEPT, ttl_seconds=60)
    assert parent.get_or_call("retained", lambda: "old") == "old"
    held = other.ask("held", value="v", hold=True).wait_for_call()
    waits = [fleet.member().ask("held"), threading.Thread(target=parent.get_or_call, args=("held", lambda: "x"))]
    waits[1].start()
    fleet.wait_for_waiting(2)
    child_is_here, may_go = (fleet.namespace + name for name in ["here", "go"])
    with Child() as child:
        if child.fork():
            assert parent.get_or_call("retained", lambda: "new") == "old"
            got, barrier = [], threading.Barrier(4)

            def ask():
                barrier.wait()
                got.append(parent.get_or_call("held", lambda: "of the child"))

            crew = [threading.Thread(target=ask) for _ in range(3)]
            for thread in crew:
                thread.start()
            barrier.wait()
            # A lead of its own, renewed while the child waits for the parent's.
            client = redis.Redis(**fleet.server.address)

            def lead():
                client.lpush(child_is_here, 1)
                return client.brpop(may_go, 20)[1].decode()

            assert parent.get_or_call("led", lead) == "go"
            for thread in crew:
                thread.join()
            assert got == ["v"] * 3
            assert parent.stats().backend_errors == 0
            parent.close()
        else:
            assert fleet.client.brpop(child_is_here, 20)
            wait_until(lambda: fleet.waiting() == [0, 3])
            mine = fleet.member(lease_seconds=KEPT).ask("led", value="of the parent")
            wait_until(lambda: fleet.waiting() == [1, 3])
            held.release()
            assert [held.result(), waits[0].result()] == ["v"] * 2
            waits[1].join()
            fleet.client.lpush(may_go, "go")
            assert mine.result() == "go"
            assert mine.calls == 0
    if not child.here:
        assert parent.get_or_call("after", lambda: 1) == 1
        parent.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_call_that_forks_tells_its_outcome_once_and_its_child_keeps_its_own(fleet):
    coalescer = DistributedBatchCoalescer(fleet.client, namespace=fleet.namespace, ttl_seconds=60)
    other = fleet.member(ttl_seconds=60)
    assert coalescer.get_or_call("before", lambda: "v") == "v"
    child_is_done = fleet.namespace + "done"
    with Child() as child:

        def call():
            if child.fork():
                return "of the child"
            assert fleet.client.brpop(child_is_done, 20)
            return "of the parent"

        got = coalescer.get_or_call("k", call)
        if child.here:
            assert got == "of the child"
            assert (coalescer.stats().calls, coalescer.stats().hits) == (0, 0)
            assert coalescer.get_or_call("before", lambda: "x") == "v"
            redis.Redis(**fleet.server.address).lpush(child_is_done, 1)
        else:
            assert got == "of the parent"
            # No answer of the child's is left on a connection.
            keys = [("after", number) for number in range(20)]
            assert [coalescer.get_or_call(key, lambda key=key: list(key)) for key in keys] == [
                list(key) for key in keys
            ]
            assert other.get("k", "x") == "of the parent"
            assert (coalescer.stats().leases_lost, coalescer.stats().backend_errors) == (0, 0)
    if not child.here:
        coalescer.close()


def test_an_asyncio_coalescer_is_bound_to_one_loop(fleet):
    member, second = fleet.member("tasks"), LoopThread()
    assert member.get("k", "v") == "v"
    calls = []

    async def call():
        calls.append(1)

    try:
        for ask in [
            lambda: member.coalescer.get_or_call("k", call),
            lambda: member.coalescer.get_or_call("new", call),
            lambda: member.coalescer.outcome("k", call),
            lambda: member.coalescer.peek("k"),
            lambda: member.coalescer.forget("k"),
        ]:
            with pytest.raises(RuntimeError, match="bound to another event loop"):
                second.start(ask()).result()
        assert member.get("new", "v") == "v", "the error of the other loop is not shared"
        held = member.ask("held", value="v", hold=True).wait_for_call()
        with pytest.raises(RuntimeError, match="bound to another event loop"):
            second.start(member.coalescer.get_or_call("held", call)).result()
        held.release()
        assert held.result() == "v"
        assert calls == []
    finally:
        second.end()


INF, NAN = float("inf"), float("nan")
WRONG = [
    ({"ttl_seconds": INF}, ValueError, "ttl_seconds must be finite"),
    ({"ttl_seconds": -1}, ValueError, "ttl_seconds"),
    ({"ttl_seconds": NAN}, ValueError, "ttl_seconds"),
    ({"ttl_seconds": "1"}, TypeError, "ttl_seconds"),
    ({"ttl_seconds": True}, TypeError, "ttl_seconds"),
    ({"error_ttl_seconds": INF}, ValueError, "error_ttl_seconds must be finite"),
    ({"error_ttl_seconds": -1}, ValueError, "error_ttl_seconds"),
    ({"lease_seconds": 0}, ValueError, "lease_seconds must be 0.1 or more"),
    ({"lease_seconds": INF}, ValueError, "lease_seconds must be finite"),
    ({"lease_seconds": None}, TypeError, "lease_seconds"),
    ({"backend_timeout_seconds": 0}, ValueError, "backend_timeout_seconds must be more than 0"),
    ({"backend_timeout_seconds": INF}, ValueError, "backend_timeout_seconds"),
    ({"namespace": ""}, ValueError, "namespace"),
    ({"namespace": "a{b}"}, ValueError, "namespace"),
    ({"namespace": "a b"}, ValueError, "namespace"),
    ({"namespace": None}, ValueError, "namespace"),
    ({"serializer": 3}, TypeError, "serializer must have dumps"),
    ({"key_encoder": "utf-8"}, TypeError, "key_encoder must be callable"),
    ({"on_backend_error": "ignore"}, ValueError, "on_backend_error"),
    ({"private_errors": 3}, TypeError, "private_errors"),
    ({"private_errors": "KeyError"}, TypeError, "private_errors"),
    ({"private_errors": [int]}, TypeError, "private_errors"),
    ({"max_retained": 0}, ValueError, "max_retained"),
]


@both_kinds
@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=[repr(options) for options, *_ in WRONG])
def test_wrong_options_are_refused_at_once(kind, options, error, words):
    made = redis.Redis() if kind == "threads" else redis.asyncio.Redis()
    cls = DistributedBatchCoalescer if kind == "threads" else AsyncDistributedBatchCoalescer
    with pytest.raises(error, match=words):
        cls(made, **options)


def test_wrong_clients_are_refused_at_once():
    for client in [None, "redis://localhost", redis.asyncio.Redis(), redis.ConnectionPool(), object()]:
        with pytest.raises(TypeError, match=r"client must be a redis\.Redis or redis\.RedisCluster"):
            DistributedBatchCoalescer(client)
    for client in [None, "redis://localhost", redis.Redis(), redis.ConnectionPool()]:
        with pytest.raises(TypeError, match=r"client must be a redis\.asyncio\.Redis or"):
            AsyncDistributedBatchCoalescer(client)


@both_kinds
def test_wrong_arguments_are_refused_before_anything_happens(fleet, kind):
    member = fleet.member(kind)
    for arguments in [("k", None), ("k", "fn"), ([], lambda: 1)]:
        for method in ["get_or_call", "outcome"]:
            with pytest.raises(TypeError):
                member.do(method, *arguments)
    for timeout in [-1, NAN]:
        with pytest.raises(ValueError, match="timeout"):
            member.get("k", timeout=timeout)
    assert fleet.names() == []
    assert member.do("stats").calls == 0


@both_kinds
def test_what_a_call_must_not_return_is_an_error_that_is_not_retained(fleet, kind):
    one, other = fleet.member(kind), fleet.member(kind)

    async def coroutine():
        return 1

    fn = coroutine if kind == "threads" else (lambda: 1)
    with pytest.raises(TypeError, match=r"fn (returned|must return)"):
        one.do("get_or_call", "k", fn)
    assert fleet.names() == []
    assert [one.get("k", "v"), other.get("k")] == ["v", "v"]


def test_a_server_that_is_not_there_is_no_reason_to_hang(fleet):
    client = redis.Redis(port=1)
    with DistributedBatchCoalescer(client, namespace=fleet.namespace) as coalescer:
        assert coalescer.get_or_call("k", lambda: 1) == 1
    with DistributedBatchCoalescer(client, on_backend_error="raise") as coalescer, pytest.raises(BackendError):
        coalescer.get_or_call("k", lambda: 1)


def test_nothing_of_redis_is_imported_unless_asked_for():
    program = (
        "import sys, llm_batch_coalesce\n"
        "import llm_batch_coalesce.__main__\n"
        "print([name for name in sys.modules if name.partition('.')[0] in {'redis', 'valkey', 'hiredis'}"
        " or '_redis' in name or '_fleet' in name])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"

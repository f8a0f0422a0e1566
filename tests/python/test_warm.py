"""`warm()`: fills keys ahead of their callers, through ordinary flights."""

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
from faces import FACES, AskedInThread, Threads, outcomes, refused
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters, wait_until
from stores import TtlStore

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, RecursiveCallError, Retain, _core

INF = float("inf")


class Stop(BaseException):
    """No `Exception`."""


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


def start_warm(face, coalescer, items, **options):
    """Start a caller of `warm`."""
    if isinstance(face, Threads):
        return AskedInThread(lambda: coalescer.warm(items, **options), None)
    return next(face._next).start(coalescer.warm(items, **options))


def warm(face, coalescer, items, **options):
    return start_warm(face, coalescer, items, **options).result()


def noting(face, called, keys):
    """For each key a call that notes it and gives its name."""
    return {key: face.callable(lambda key=key: called.append(key) or f"of {key}") for key in keys}


def fail(error):
    raise error


# What is filled.


@pytest.mark.parametrize("concurrency", [1, 2, 4, 100])
def test_all_keys_are_filled_and_progress_is_told(face, concurrency):
    coalescer, called, told = face.coalescer(INF), [], []

    def progress(done, of):
        told.append((done, of))

    assert warm(face, coalescer, noting(face, called, range(10)), concurrency=concurrency, progress=progress) == {}
    assert sorted(called) == list(range(10))
    assert [coalescer.peek(key) for key in range(10)] == [f"of {key}" for key in range(10)]
    assert told == [(done, 10) for done in range(1, 11)]
    assert (coalescer.stats().calls, coalescer.stats().retained) == (10, 10)


def test_one_at_a_time_goes_in_order(face):
    called = []
    warm(face, face.coalescer(), noting(face, called, "hgfedcba"), concurrency=1)
    assert called == list("hgfedcba")


def test_nothing_to_fill_is_no_error(face):
    told = []
    assert warm(face, face.coalescer(), {}, progress=lambda *args: told.append(args)) == {}
    assert told == []


def test_what_fails_is_returned_in_order_and_the_others_are_filled(face):
    coalescer, called, told = face.coalescer(INF, error_ttl_seconds=0), [], []
    first, second = face.held(error=LookupError("of b")), ValueError("of d")
    items = noting(face, called, "abcde") | {"b": first, "d": face.callable(lambda: fail(second))}
    warming = start_warm(face, coalescer, items, progress=lambda *args: told.append(args))
    wait_until(lambda: len(told) == 4)
    first.release()
    # In the order of the items, not in that of their failures.
    assert list(warming.result().items()) == [("b", first.error), ("d", second)]
    assert sorted(called) == ["a", "c", "e"]
    assert [key in coalescer for key in "abcde"] == [True, False, True, False, True]
    assert told[-1] == (5, 5)


def test_what_is_retained_or_in_the_store_is_not_called(face):
    called, store = [], TtlStore(b="stored")
    coalescer = face.coalescer(INF, store=store)
    coalescer.put("a", "retained")
    assert warm(face, coalescer, noting(face, called, "abc")) == {}
    assert called == ["c"]
    assert [coalescer.peek(key) for key in "abc"] == ["retained", "stored", "of c"]
    assert store.told == [("c", "of c", INF)]


def test_it_has_a_ttl_of_its_own(face):
    coalescer = face.coalescer(INF)
    warm(face, coalescer, noting(face, [], "ab"), ttl_seconds=5)
    warm(face, coalescer, noting(face, [], "cd"), ttl_seconds=0)
    warm(face, coalescer, {"e": face.callable(lambda: Retain("E", 100))}, ttl_seconds=5)
    assert [key in coalescer for key in "abcde"] == [True, True, False, False, True]
    _core._advance_clock(6)
    assert [key in coalescer for key in "abcde"] == [False, False, False, False, True]


# Live callers.


def test_live_callers_join_what_is_being_filled(face):
    coalescer, held = face.coalescer(INF), face.held("value")
    warming = start_warm(face, coalescer, {"k": held})
    assert held.started.wait(PATIENCE)
    waiters = face.join(coalescer, 3)
    held.release()
    assert warming.result() == {}
    assert outcomes(waiters) == ["value"] * 3
    assert (coalescer.stats().calls, coalescer.stats().joined) == (1, 3)


def test_it_joins_what_live_callers_lead(face):
    coalescer, held, failing = face.coalescer(INF), face.held("value"), face.held(error=LookupError("no such model"))
    leaders = [face.lead(coalescer, held, "a"), face.lead(coalescer, failing, "b")]
    warming = start_warm(face, coalescer, {"a": refused, "b": refused})
    wait_for_waiters(coalescer, "a", 1)
    wait_for_waiters(coalescer, "b", 1)
    held.release()
    failing.release()
    failed = warming.result()
    assert list(failed) == ["b"]
    assert str(failed["b"]) == "no such model"
    assert failed["b"] is not failing.error
    assert outcomes(leaders) == ["value", failing.error]
    assert (coalescer.stats().calls, coalescer.stats().joined) == (2, 2)


def test_a_key_that_is_cancelled_is_a_failure_and_no_end_of_the_others(face):
    coalescer, held, called = face.coalescer(INF), face.held("value"), []
    leader = face.lead(coalescer, held, "x")
    warming = start_warm(face, coalescer, {"x": refused} | noting(face, called, "yz"), concurrency=1)
    wait_for_waiters(coalescer, "x", 1)
    assert coalescer.cancel("x")
    failed = warming.result()
    assert list(failed) == ["x"]
    assert isinstance(failed["x"], Exception)
    assert called == ["y", "z"]
    held.release()
    assert leader.result() == "value"


def test_threads_and_tasks_share_what_either_fills():
    threads, loop, held = BatchCoalescer(INF), LoopThread(), HeldCall("value")
    try:
        warming = loop.start(threads.as_async().warm({"k": held}))
        assert held.started.wait(PATIENCE)
        other = AskedInThread(lambda: threads.warm({"k": refused, "j": lambda: "own"}), None)
        wait_for_waiters(threads, "k", 1)
        held.release()
        assert outcomes([warming, other]) == [{}, {}]
        assert (threads.peek("k"), threads.peek("j")) == ("value", "own")
    finally:
        loop.end()


# How many at once.


@pytest.mark.parametrize("concurrency", [1, 3, None])
def test_no_more_calls_run_at_once_than_are_allowed_and_no_fewer(face, concurrency):
    coalescer, lock, allowed = face.coalescer(INF), threading.Lock(), concurrency or 4
    running, most, total = [0], [0], 4 * allowed
    held = {key: face.held(key) for key in range(total)}

    @contextmanager
    def counted():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        yield
        with lock:
            running[0] -= 1

    def call(key):
        with counted():
            return held[key]()

    async def call_in_task(key):
        with counted():
            return await held[key]()

    items = {key: partial(call if isinstance(face, Threads) else call_in_task, key) for key in held}
    options = {} if concurrency is None else {"concurrency": concurrency}
    warming = start_warm(face, coalescer, items, **options)
    for key, call in held.items():
        # As many as are allowed run before any of them ends; the next begins when one has ended.
        wait_until(lambda key=key: sum(each.started.is_set() for each in held.values()) >= min(key + allowed, total))
        call.release()
    assert warming.result() == {}
    assert most == [allowed]


# Wrong arguments.


@pytest.mark.parametrize(
    ("items", "options", "error", "said"),
    [
        (["a"], {}, TypeError, "items must be a mapping of keys to callables, not "),
        (None, {}, TypeError, "items must be a mapping"),
        ({"a": refused, "b": 5}, {}, TypeError, r"items\['b'\] must be callable, not 5"),
        ({"a": refused}, {"concurrency": 0}, ValueError, "concurrency must be 1 or more, not 0"),
        ({"a": refused}, {"concurrency": -1}, ValueError, "concurrency must be 1 or more"),
        ({"a": refused}, {"concurrency": True}, TypeError, "concurrency must be an int, not True"),
        ({"a": refused}, {"concurrency": 2.0}, TypeError, "concurrency must be an int"),
        ({"a": refused}, {"concurrency": None}, TypeError, "concurrency must be an int"),
        ({"a": refused}, {"progress": 5}, TypeError, "progress must be callable, not 5"),
        ({"a": refused}, {"ttl_seconds": -1}, ValueError, "ttl_seconds"),
        ({"a": refused}, {"ttl_seconds": True}, TypeError, "ttl_seconds"),
        ({}, {"ttl_seconds": float("nan")}, ValueError, "ttl_seconds"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_called(face, items, options, error, said):
    coalescer = face.coalescer()
    with pytest.raises(error, match=said):
        warm(face, coalescer, items, **options)
    assert (len(coalescer), coalescer.stats().calls) == (0, 0)


# What ends it.


@pytest.fixture
def given_up(monkeypatch):
    """Set when the pool of `warm` has been told to begin nothing more, and before its threads are waited for."""
    given_up, shutdown = threading.Event(), ThreadPoolExecutor.shutdown

    def shutdown_in_two_steps(pool, wait=True, *, cancel_futures=False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        given_up.set()
        shutdown(pool, wait=wait)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown_in_two_steps)
    return given_up


def items_after(first, second, given_up, called):
    """Two calls, of which the second, if it begins, goes on until the others are given up; those must not begin."""

    def call(key):
        called.append(key)
        if key < 2:
            (first, second)[key]()
        if key == 1:
            assert given_up.wait(PATIENCE)

    return {key: lambda key=key: call(key) for key in range(5)}


def nothing(*_):
    pass


@pytest.mark.parametrize("error", [Stop, ZeroDivisionError])
def test_a_progress_that_fails_ends_it(given_up, error):
    coalescer, called = BatchCoalescer(INF), []
    with pytest.raises(error):
        coalescer.warm(items_after(nothing, nothing, given_up, called), concurrency=1, progress=lambda *_: fail(error))
    assert called in ([0], [0, 1])
    assert coalescer.stats().in_flight == 0


def test_what_is_no_exception_ends_it(given_up):
    coalescer, called, error = BatchCoalescer(INF), [], Stop()
    with pytest.raises(Stop) as info:
        coalescer.warm(items_after(lambda: fail(error), nothing, given_up, called), concurrency=1)
    assert info.value is error
    assert called in ([0], [0, 1])
    assert 0 not in coalescer
    assert 2 not in coalescer


def test_a_signal_ends_it(given_up):
    coalescer, called, waits, handled = BatchCoalescer(INF), [], threading.Event(), threading.Event()

    def interrupt():
        assert waits.wait(PATIENCE)
        # One that comes just before the thread blocks is answered when it wakes: again and again, as people do.
        while not handled.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def handle(*_):
        if not handled.is_set():
            handled.set()
            raise Stop

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(Stop):
            coalescer.warm(
                items_after(nothing, interrupt, given_up, called), concurrency=1, progress=lambda *_: waits.set()
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert called == [0, 1]
    assert coalescer.stats().in_flight == 0


@pytest.mark.parametrize("where", ["call", "progress"])
async def test_what_fails_in_a_task_ends_it_too(where):
    coalescer, called, error = AsyncBatchCoalescer(INF), [], Stop()

    async def call(key):
        called.append(key)
        if where == "call":
            raise error

    items = {key: lambda key=key: call(key) for key in range(5)}
    with pytest.raises(Stop) as info:
        await coalescer.warm(items, concurrency=1, progress=lambda *_: fail(error))
    assert info.value is error
    assert called == [0]
    await let_run()
    assert len(asyncio.all_tasks()) == 1


async def test_what_ends_it_cancels_the_calls_that_are_under_way():
    coalescer, held = AsyncBatchCoalescer(INF), HeldCall("value")

    async def stop():
        await let_run()
        raise Stop

    with pytest.raises(Stop):
        await coalescer.warm({"k": held, "stop": stop})
    await let_run()
    assert held.cancelled.is_set()
    assert (coalescer.stats().in_flight, len(asyncio.all_tasks())) == (0, 1)


def test_progress_is_told_in_the_callers_thread():
    told = []
    items = dict.fromkeys(range(8), threading.current_thread)
    coalescer = BatchCoalescer(INF)
    coalescer.warm(items, concurrency=2, progress=lambda *_: told.append(threading.current_thread()))
    assert told == [threading.current_thread()] * 8
    threads = {coalescer.peek(key) for key in items}
    assert threading.current_thread() not in threads
    assert len(threads) <= 2
    # They are gone with it.
    assert not any(thread.is_alive() for thread in threads)


async def test_who_cancels_it_cancels_its_calls_but_those_that_others_wait_for():
    coalescer, held = AsyncBatchCoalescer(INF), {key: HeldCall(key) for key in "abc"}
    warming = asyncio.create_task(coalescer.warm(held, concurrency=2))
    await let_run()
    waiter = asyncio.create_task(coalescer.get_or_call("a", refused))
    await let_run()
    warming.cancel()
    await asyncio.wait([warming])
    await let_run()
    assert warming.cancelled()
    assert [each.cancelled.is_set() for each in held.values()] == [False, True, False]
    assert not held["c"].started.is_set()
    held["a"].release()
    assert await waiter == "a"
    assert coalescer.stats().in_flight == 0
    assert len(asyncio.all_tasks()) == 1


# From inside of a call.


def test_a_call_that_fills_its_own_key_is_told(face):
    coalescer, called = face.coalescer(INF), []

    def call():
        return coalescer.warm({"k": refused} | noting(face, called, "a"), concurrency=1)

    async def call_in_task():
        return await call()

    asked = face.start(coalescer, call if isinstance(face, Threads) else call_in_task)
    try:
        wait_until(lambda: asked.done() or coalescer._waiters("k"))
        assert coalescer._waiters("k") == 0, "it waits for itself"
    finally:
        coalescer.cancel("k")
    failed = asked.result()
    assert {key: type(error) for key, error in failed.items()} == {"k": RecursiveCallError}
    assert called == ["a"]

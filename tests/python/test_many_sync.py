"""`get_or_call_many` of threads."""

import asyncio
import concurrent.futures
import random
import signal
import sys
import threading
from functools import partial

import pytest
from batches import HeldBatchInThread, named, nobody
from faces import AskedInThread, HeldInThread, outcomes, refused
from loops import PATIENCE, LoopThread, wait_for_waiters, wait_until

from llm_batch_coalesce import (
    BatchCoalescer,
    CallResultError,
    DeadlockError,
    RecursiveCallError,
    Retain,
    _core,
)

INF = float("inf")
THREADS = 16


class LimitError(Exception):
    """Is private."""


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=INF, private_errors=LimitError)


@pytest.fixture
def held():
    batch = HeldBatchInThread(named)
    yield batch
    batch.release()


def start(work):
    return AskedInThread(work, None)


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def single(work, wanted):
    return work(wanted)[wanted[0]]


# 16 threads.


@pytest.mark.parametrize("seed", range(5))
def test_of_16_threads_with_overlapping_keys_each_key_is_computed_once(coalescer, crew, quick_switches, seed):
    computed, rounds, keys = [], 20, range(200)

    def work(missing):
        computed.extend(missing)
        return {key: (key, object()) for key in missing}

    def ask(number):
        choice = random.Random(1_000 * seed + number)
        got = {}
        for _ in range(rounds):
            wanted = choice.sample(keys, choice.randint(1, 60))
            values = coalescer.get_or_call_many(wanted, work)
            assert list(values) == wanted
            for key, value in values.items():
                assert value[0] == key
                # Whoever asks and whenever, it is the one object that was computed.
                assert got.setdefault(key, value) is value
        return got

    results = crew.start(THREADS, ask).join()
    assert sorted(computed) == sorted(set(computed)) == sorted(set().union(*results))
    for key in keys:
        assert len({id(got[key]) for got in results if key in got}) <= 1
    stats = coalescer.stats()
    assert stats.calls == len(computed)
    assert (stats.errors, stats.timeouts, stats.cancelled, stats.handed_over, stats.in_flight) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_16_threads_come_to_an_end_though_nothing_is_retained_and_calls_fail(crew, quick_switches, seed):
    """Calls fail for all, fail for one, or lack a key; every request of batches and single callers is counted once."""
    coalescer, keys = BatchCoalescer(0, private_errors=LimitError), range(30)

    def ask(number):
        choice, requests, led = random.Random(100 * seed + number), 0, []

        def work(missing):
            led.extend(missing)
            fate = choice.randrange(6)
            if fate == 0:
                raise LimitError
            if fate == 1:
                raise LookupError
            return {key: key for key in (missing[1:] if fate == 2 else missing)}

        for _ in range(40):
            wanted = choice.sample(keys, choice.randint(1, 12))
            requests += len(wanted)
            try:
                if len(wanted) == 1:
                    values = {wanted[0]: coalescer.get_or_call(wanted[0], partial(single, work, wanted))}
                else:
                    values = coalescer.get_or_call_many(wanted, work)
            except (LimitError, LookupError) as error:
                lost = getattr(error, "missing", wanted)
            else:
                lost = []
                assert values == {key: key for key in wanted}
            assert set(lost) <= set(wanted)
        return requests, len(led)

    results = crew.start(THREADS, ask).join()
    stats = coalescer.stats()
    assert stats.calls == sum(led for _, led in results)
    served = stats.calls + stats.joined + stats.hits + stats.timeouts + stats.cancelled
    assert served == sum(requests for requests, _ in results)
    assert (stats.timeouts, stats.in_flight, stats.retained, len(coalescer)) == (0, 0, 0, 0)


# What threads cannot share.


def test_a_coroutine_is_refused_and_closed(coalescer):
    async def answer(missing):
        return named(missing)

    with pytest.raises(CallResultError, match="use AsyncBatchCoalescer for"):
        coalescer.get_or_call_many(["a", "b"], answer)
    assert len(coalescer) == 0
    # A waiter that takes over is told, too.
    leader = HeldInThread(error=LimitError())
    first = start(lambda: coalescer.get_or_call("x", leader))
    assert leader.started.wait(PATIENCE)
    second = start(lambda: coalescer.get_or_call_many(["x"], answer))
    wait_for_waiters(coalescer, "x", 1)
    leader.release()
    assert [type(error) for error in outcomes([first, second])] == [LimitError, CallResultError]


# Threads that are inside of calls.


def test_a_call_that_asks_for_a_key_of_its_own_batch_is_told(coalescer):
    def work(missing):
        with pytest.raises(RecursiveCallError, match="'b'"):
            coalescer.get_or_call("b", refused)
        with pytest.raises(RecursiveCallError, match="'a'"):
            coalescer.get_or_call_many(["other", "a"], nobody)
        assert "other" not in coalescer
        assert coalescer.get_or_call_many(["c"], named) == {"c": "of c"}
        return missing

    assert coalescer.get_or_call_many(["a", "b"], work) == {"a": "a", "b": "b"}
    with pytest.raises(RecursiveCallError, match="'single'"):
        coalescer.get_or_call("single", lambda: coalescer.get_or_call_many(["x", "single"], named))
    assert coalescer.stats().in_flight == 0
    # A call of one key, taken over, is a call like any other.
    with pytest.raises(RecursiveCallError, match="'d'"):
        coalescer.get_or_call_many(["d"], lambda missing: coalescer.get_or_call_many(["d"], nobody))
    assert "d" not in coalescer


def test_a_recursive_batch_leaves_the_waiters_to_the_next(coalescer):
    """Nobody shares the error, and the next of each key leads."""
    started, go = threading.Event(), threading.Event()

    def recursive(missing):
        started.set()
        assert go.wait(PATIENCE)
        return coalescer.get_or_call_many(missing, nobody)

    leader = start(lambda: coalescer.get_or_call_many(["a", "b"], recursive))
    assert started.wait(PATIENCE)
    waiters = [start(lambda key=key: coalescer.get_or_call(key, lambda: "own")) for key in "ab"]
    for key in "ab":
        wait_for_waiters(coalescer, key, 1)
    go.set()
    assert [type(outcomes([leader])[0]), *outcomes(waiters)] == [RecursiveCallError, "own", "own"]


@pytest.mark.parametrize("batch", ["first", "second", "both"])
def test_calls_that_wait_for_each_other_through_batches_are_told(coalescer, batch):
    """The one leads "a" and "b" and asks for "y"; the other leads "x" and "y" and asks for "b"."""
    started, go = threading.Event(), threading.Event()

    def ask(keys, work, together):
        if together:
            return coalescer.get_or_call_many(keys, work)
        return {keys[-1]: coalescer.get_or_call(keys[-1], lambda: work([keys[-1]])[-1])}

    def first_call(missing):
        started.set()
        assert go.wait(PATIENCE)
        ask(["c", "y"], lambda keys: ["own"] * len(keys), batch != "second")
        return ["first"] * len(missing)

    def second_call(missing):
        wait_for_waiters(coalescer, "y", 1)
        with pytest.raises(DeadlockError, match="'b'"):
            ask(["z", "b"], lambda keys: ["own"] * len(keys), batch != "first")
        return ["second"] * len(missing)

    first = start(lambda: ask(["a", "b"], first_call, batch != "second"))
    assert started.wait(PATIENCE)
    go_on = threading.Thread(target=lambda: (wait_until(lambda: "y" in coalescer), go.set()))
    go_on.start()
    second = ask(["x", "y"], second_call, batch != "first")
    go_on.join()
    assert second["y"] == "second"
    assert first.result()["b"] == "first"
    assert coalescer.stats().cancelled == 0


def test_a_batch_that_joined_who_waits_for_it_is_in_no_circle(coalescer, held):
    """It does its own first, and only then waits."""
    other = HeldInThread("value")
    leader = start(lambda: coalescer.get_or_call("x", lambda: (other(), coalescer.get_or_call("a", refused))[1]))
    assert other.started.wait(PATIENCE)
    batch = start(lambda: coalescer.get_or_call_many(["x", "a"], held))
    assert held.started.wait(PATIENCE)
    other.release()
    wait_for_waiters(coalescer, "a", 1)
    held.release()
    assert batch.result() == {"x": "of a", "a": "of a"}
    assert leader.result() == "of a"


def test_a_batch_that_would_block_the_loop_which_computes_a_key_leads_its_own_and_is_told(held):
    threads = BatchCoalescer(INF)
    tasks, loop = threads.as_async(), LoopThread()
    try:
        leading, release = threading.Event(), asyncio.Event()

        async def computed():
            leading.set()
            await release.wait()
            return "on the loop"

        leader = loop.start(tasks.get_or_call("x", computed))
        assert leading.wait(PATIENCE)
        with pytest.raises(DeadlockError, match="'x'"):
            loop.do(threads.get_or_call_many, ["x", "a"], named)
        assert threads.peek("a") == "of a"
        loop.do(release.set)
        assert leader.result() == "on the loop"
        assert threads.stats().cancelled == 0
    finally:
        loop.end()


# Interrupts.


class Interrupt(BaseException):
    """What the signal's handler raises."""


@pytest.fixture
def interrupted():
    def handle(*_):
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handle)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_ends_a_batch_that_waits(coalescer, interrupted):
    others = [HeldInThread(key) for key in "xy"]
    leaders = [start(lambda other=other: coalescer.get_or_call(other.value, other)) for other in others]
    for other in others:
        assert other.started.wait(PATIENCE)

    def interrupt():
        # Its own call is done, and its thread waits or is about to.
        wait_until(lambda: "a" in coalescer and coalescer.stats().retained == 1)
        interrupted()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupt):
        coalescer.get_or_call_many(["x", "a", "y"], named)
    thread.join()
    assert [coalescer._waiters(key) for key in "xy"] == [0, 0]
    for other in others:
        other.release()
    assert outcomes(leaders) == ["x", "y"]
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.cancelled) == (3, 0, 2)


def test_a_signal_that_ends_the_call_of_a_batch_leaves_its_keys_to_the_next(coalescer, interrupted):
    def call(missing):
        waiters.extend(start(lambda key=key: coalescer.get_or_call(key, lambda: "own")) for key in missing)
        for key in missing:
            wait_for_waiters(coalescer, key, 1)
        interrupted()
        threading.Event().wait(PATIENCE)

    waiters = []
    with pytest.raises(Interrupt):
        coalescer.get_or_call_many(["a", "b"], call)
    assert outcomes(waiters) == ["own", "own"]
    assert coalescer.stats().handed_over == 2


# The error of a cancelled key, and values of all kinds.


def test_a_cancelled_key_of_a_waiting_batch_is_an_error_among_others(coalescer):
    """What threads get is an `Exception`, so that the other keys are waited for."""
    others = [HeldInThread(key) for key in "xy"]
    leaders = [start(lambda other=other: coalescer.get_or_call(other.value, other)) for other in others]
    for other in others:
        assert other.started.wait(PATIENCE)
    batch = start(lambda: coalescer.get_or_call_many(["x", "y"], nobody))
    wait_for_waiters(coalescer, "y", 1)
    coalescer.cancel("x")
    wait_for_waiters(coalescer, "x", 0)
    assert not batch.done()
    for other in others:
        other.release()
    assert type(outcomes([batch])[0]) is concurrent.futures.CancelledError
    assert outcomes(leaders) == ["x", "y"]


def test_retained_values_expire_one_by_one(coalescer):
    asked = []

    def work(missing):
        asked.append(missing)
        return [Retain(key, key) for key in missing]

    for _ in range(4):
        assert coalescer.get_or_call_many([1, 2, 3], work) == {1: 1, 2: 2, 3: 3}
        _core._advance_clock(1.1)
    assert asked == [[1, 2, 3], [1], [1, 2], [1, 3]]

"""What is no longer needed is freed: by the sweeper, by the garbage collector, with the coalescer."""

import asyncio
import gc
import threading
import weakref

import pytest
from watching import Flag, Freed

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _core


class Thing:
    """Something that can be watched and can refer to anything."""


def retain(coalescer, key="k"):
    """Retain a new thing; its event."""
    thing = Thing()
    coalescer.get_or_call(key, lambda: thing)
    return Freed(thing)


def all_freed(events):
    return all(event.wait() for event in events)


@pytest.fixture(autouse=True)
def no_collections():
    """What is freed here is freed by counting, or by a collection that the test asks for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_expired_keys_and_values_are_freed_with_nobody_calling():
    coalescer = BatchCoalescer(ttl_seconds=100.0)
    key = Thing()
    events = [Freed(key), retain(coalescer, key)]
    del key
    assert not any(event.is_set() for event in events)
    _core._advance_clock(101.0)
    assert all_freed(events)


def test_ten_thousand_values_are_freed_by_the_sweeper():
    coalescer = BatchCoalescer(ttl_seconds=100.0)
    alive = weakref.WeakSet()

    def make():
        thing = Thing()
        alive.add(thing)
        return thing

    for number in range(10_000):
        coalescer.get_or_call(number, make)
    assert len(alive) == 10_000
    last = Freed(coalescer.get_or_call("last", make))
    _core._advance_clock(101.0)
    assert all_freed([last])
    pause = threading.Event()
    for _ in range(1_000):
        if not len(alive):
            break
        pause.wait(0.01)
    assert len(alive) == 0
    assert len(coalescer) == 0


def test_expired_values_are_freed_while_readers_are_busy(crews):
    coalescer = BatchCoalescer(ttl_seconds=1_000.0)
    short = BatchCoalescer(ttl_seconds=10.0)
    stop = threading.Event()
    for number in range(64):
        coalescer.get_or_call(number, Thing)

    def read(_):
        while not stop.is_set():
            for number in range(64):
                coalescer.get_or_call(number, Thing)
                short.get_or_call(number, lambda: None)

    readers = crews().start(4, read)
    events = [retain(short, ("thing", number)) for number in range(100)]
    _core._advance_clock(11.0)
    try:
        assert all_freed(events)
    finally:
        stop.set()
        readers.join()


def test_an_outcome_that_is_not_retained_is_freed_with_its_last_caller(crews):
    coalescer = BatchCoalescer(ttl_seconds=0)
    entered, released = threading.Event(), threading.Event()
    events = []

    def call():
        entered.set()
        assert released.wait(30)
        thing = Thing()
        events.append(Freed(thing))
        return thing

    def ask(_):
        coalescer.get_or_call("k", call)

    leader = crews().start(1, ask)
    assert entered.wait(30)
    waiters = crews().start(5, ask)
    pause = threading.Event()
    while coalescer._waiters("k") < 5:
        pause.wait(0.01)
    released.set()
    leader.join()
    waiters.join()
    assert len(events) == 1
    assert all_freed(events)


def test_a_dropped_coalescer_frees_its_keys_and_values():
    coalescer = BatchCoalescer(ttl_seconds=float("inf"))
    key = Thing()
    events = [Freed(key), retain(coalescer, key)]
    del key, coalescer
    assert all(event.is_set() for event in events)


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize("place", ["key", "value"])
def test_keys_and_values_that_refer_to_the_coalescer_are_collected(kind, place):
    def make():
        coalescer = kind(ttl_seconds=float("inf"))
        thing = Thing()
        thing.coalescer = coalescer
        key, value = (thing, 1) if place == "key" else ("k", thing)
        if kind is BatchCoalescer:
            coalescer.get_or_call(key, lambda: value)
        else:

            async def call():
                return value

            asyncio.run(coalescer.get_or_call(key, call))
        return [Freed(coalescer), Freed(thing)]

    events = make()
    assert not any(event.is_set() for event in events)
    gc.collect()
    assert all(event.is_set() for event in events)


def test_retained_errors_keep_no_frames_alive():
    coalescer = BatchCoalescer(ttl_seconds=1_000.0)
    events = []

    def fail():
        local = Thing()
        events.append(Freed(local))
        try:
            raise KeyError("cause")
        except KeyError as cause:
            raise ValueError("broken") from cause

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            coalescer.get_or_call("k", fail)
    gc.collect()
    assert len(events) == 1
    assert events[0].is_set()


def test_clear_frees_what_was_retained():
    coalescer = BatchCoalescer(ttl_seconds=float("inf"))
    event = retain(coalescer)
    coalescer.clear()
    assert all_freed([event])


def test_a_finalizer_may_use_the_coalescer():
    coalescer = BatchCoalescer(ttl_seconds=100.0)
    done = Flag()

    class Last:
        def __del__(self):
            coalescer.clear()
            coalescer.get_or_call("from __del__", lambda: 1)
            done.set()

    coalescer.get_or_call("k", Last)
    _core._advance_clock(101.0)
    assert all_freed([done])
    assert "from __del__" in coalescer


def test_a_collection_while_threads_insert_finds_the_map_whole(crews):
    coalescer = BatchCoalescer(ttl_seconds=0.01)
    stop = threading.Event()

    def insert(number):
        count = 0
        while not stop.is_set():
            coalescer.get_or_call((number, count % 5_000), Thing)
            count += 1

    inserting = crews().start(4, insert)
    for _ in range(10):
        gc.collect()
    stop.set()
    inserting.join()

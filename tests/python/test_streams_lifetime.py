"""What a stream no longer needs is freed: items, upstreams, readers, and cycles of all these."""

import asyncio
import gc
import logging
import subprocess
import sys

import pytest
from faces import refused
from loops import let_run
from watching import Flag, Freed

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _core


class Thing:
    """Something that can be watched and can refer to anything."""

    closed = 0


@pytest.fixture(autouse=True)
def no_collections():
    """What is freed here is freed by counting, or by a collection that the test asks for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Things:
    """An upstream of new things, and which of them are freed."""

    def __init__(self, count):
        self.freed = []
        self._count = count

    def __call__(self):
        for _ in range(self._count):
            yield self._make()

    async def for_tasks(self):
        for _ in range(self._count):
            yield self._make()

    def _make(self):
        thing = Thing()
        self.freed.append(Freed(thing))
        return thing

    def kept(self):
        """The numbers of those that are there."""
        return [number for number, freed in enumerate(self.freed) if not freed.is_set()]


# Items.


def test_an_item_is_kept_as_long_as_somebody_may_join():
    coalescer, things = BatchCoalescer(ttl_seconds=100), Things(10)
    stream = coalescer.stream("k", things)
    for _ in range(10):
        next(stream)
    assert things.kept() == list(range(10))
    assert list(stream) == []
    del stream
    assert things.kept() == list(range(10))
    _core._advance_clock(101)
    assert all(freed.wait() for freed in things.freed)


def test_what_all_readers_have_passed_is_dropped_when_nobody_can_join():
    coalescer, things = BatchCoalescer(), Things(20)
    slow, fast = (coalescer.stream("k", things, max_buffered=5) for _ in range(2))
    for _ in range(5):
        next(slow)
        next(fast)
    assert things.kept() == list(range(5))
    next(fast)
    # It is closed now, and both have passed the first five.
    assert things.kept() == [5]
    next(fast)
    next(fast)
    assert things.kept() == [5, 6, 7]
    next(slow)
    # It has taken what was there.
    assert things.kept()[-1] == 7
    slow.close()
    assert things.kept() == []
    next(fast)
    assert things.kept() == []


def test_a_reader_that_lags_keeps_no_more_than_the_bound():
    coalescer, things = BatchCoalescer(), Things(1_000)
    slow, fast = (coalescer.stream("k", things, max_buffered=5) for _ in range(2))
    next(slow)
    most = 0
    for _ in fast:
        most = max(most, len(things.kept()))
    # Those of the log, and the one at hand.
    assert 5 <= most <= 6


async def test_the_log_of_a_pump_is_bounded_too():
    coalescer, things = AsyncBatchCoalescer(), Things(1_000)
    most = 0
    async for _ in coalescer.stream("k", things.for_tasks, max_buffered=4):
        del _
        most = max(most, len(things.kept()))
    assert 1 <= most <= 5
    await let_run()
    assert things.kept() == []


@pytest.mark.parametrize("ttl_seconds", [0, 100])
def test_what_is_not_retained_is_freed_with_its_last_reader(ttl_seconds):
    coalescer, things = BatchCoalescer(ttl_seconds=ttl_seconds), Things(5)
    readers = [coalescer.stream("k", things) for _ in range(2)]
    for reader in readers:
        next(reader)
    if ttl_seconds:
        coalescer.forget("k")
    assert len(list(readers[0])) == 4
    assert things.kept() == list(range(5))
    del reader
    del readers[1]
    assert things.kept() == []


@pytest.mark.parametrize("drop", [BatchCoalescer.clear, lambda coalescer: coalescer.forget("k")])
def test_what_is_forgotten_is_freed(drop):
    coalescer, things = BatchCoalescer(ttl_seconds=float("inf")), Things(5)
    list(coalescer.stream("k", things))
    drop(coalescer)
    assert all(freed.wait() for freed in things.freed)


def test_an_upstream_is_freed_when_it_has_ended():
    coalescer, freed = BatchCoalescer(ttl_seconds=100), []

    def generate(thing):
        freed.append(Freed(thing))
        yield 1

    assert list(coalescer.stream("k", lambda: generate(Thing()))) == [1]
    assert freed[0].is_set()
    assert "k" in coalescer


def test_a_retained_error_keeps_no_frames_alive():
    coalescer, freed = BatchCoalescer(ttl_seconds=100), []

    def generate():
        thing = Thing()
        freed.append(Freed(thing))
        yield 1
        raise LookupError

    for fn in (generate, refused):
        with pytest.raises(LookupError):
            list(coalescer.stream("k", fn))
    gc.collect()
    assert freed[0].is_set()


def test_a_finalizer_of_an_item_may_read_streams():
    coalescer, done = BatchCoalescer(ttl_seconds=100), Flag()

    class Last:
        def __del__(self):
            list(coalescer.stream("k", lambda: "ab"))
            list(coalescer.stream("k2", lambda: "ab"))
            done.set()

    list(coalescer.stream("k", lambda: [Last()]))
    _core._advance_clock(101)
    assert done.wait()
    assert list(coalescer.stream("k2", refused)) == ["a", "b"]


# Cycles.


def through_the_key(coalescer, thing):
    list(coalescer.stream(thing, lambda: "ab"))


def through_an_item(coalescer, thing):
    list(coalescer.stream("k", lambda: ["a", thing]))


def through_an_item_under_way(coalescer, thing):
    thing.stream = coalescer.stream("k", lambda: [thing, "b"])
    next(thing.stream)


def through_an_item_that_was_taken(coalescer, thing):
    leader = coalescer.stream("k", lambda: ["a", thing, "c"])
    for _ in range(3):
        next(leader)
    thing.stream = coalescer.stream("k", refused)
    next(thing.stream)


def through_fn(coalescer, thing):
    thing.stream = coalescer.stream("k", lambda: thing)


def through_upstream(coalescer, thing):
    def generate():
        try:
            yield "a"
            yield thing
        finally:
            closed.append(True)

    closed = thing.closed = []
    thing.stream = coalescer.stream("k", generate)
    next(thing.stream)


def through_an_error(coalescer, thing):
    with pytest.raises(LookupError):
        list(coalescer.stream("k", lambda: (raising(thing) for _ in "a")))


def raising(thing):
    raise LookupError(thing)


@pytest.mark.parametrize(
    "make",
    [
        through_the_key,
        through_an_item,
        through_an_item_under_way,
        through_an_item_that_was_taken,
        through_fn,
        through_upstream,
        through_an_error,
    ],
)
def test_a_cycle_is_collected(make):
    def begin():
        thing = Thing()
        thing.coalescer = BatchCoalescer(ttl_seconds=float("inf"))
        make(thing.coalescer, thing)
        return [Freed(thing), Freed(thing.coalescer)]

    freed = begin()
    assert not any(each.is_set() for each in freed)
    for _ in range(2):
        gc.collect()
    assert all(each.is_set() for each in freed)


def test_upstream_is_closed_with_a_cycle_that_is_collected():
    """As a generator is that its own frame refers to."""
    closed = []

    class Client:
        def __init__(self):
            self.coalescer = BatchCoalescer()
            self.stream = self.coalescer.stream("k", self.fetch)

        def fetch(self):
            try:
                while True:
                    yield 1
            finally:
                closed.append(self.stream is not None)

    assert next(Client().stream) == 1
    gc.collect()
    assert closed == [True]


def test_an_upstream_that_is_closed_by_the_collector_may_close_its_iterator():
    # In a program of its own, since it would not only fail.
    program = """
import gc
from llm_batch_coalesce import BatchCoalescer

class Upstream:
    def __init__(self, stream):
        self.stream = stream
    def __iter__(self):
        return self
    def __next__(self):
        return [1]
    def close(self):
        if hasattr(self, "stream"):
            self.stream.close()
        print("closed")

def begin():
    box = []
    stream = BatchCoalescer().stream("k", lambda: box[0])
    box.append(Upstream(stream))
    next(stream)

begin()
gc.collect()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed\n", "")


def test_a_loop_that_is_closed_with_readers_waiting_is_freed(caplog):
    caplog.set_level(logging.CRITICAL, "asyncio")
    freed = []

    async def generate():
        await asyncio.Event().wait()
        yield 1

    async def read(coalescer):
        thing = Thing()
        freed.append(Freed(thing))
        async for item in coalescer.stream("k", generate):
            assert item is thing

    async def main():
        coalescer = AsyncBatchCoalescer()
        tasks = [asyncio.ensure_future(read(coalescer)) for _ in range(3)]
        await let_run()
        assert coalescer._readers("k") == (3, len(tasks))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    del loop
    for _ in range(3):
        gc.collect()
    assert len(freed) == 3
    assert all(each.is_set() for each in freed)

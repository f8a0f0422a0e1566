"""Streams that threads and tasks of several loops share; circles of them; loops that close in the middle."""

import asyncio
import threading
import types

import pytest
from faces import AskedInThread, refused
from loops import PATIENCE, LoopThread, wait_until
from upstreams import HeldAsyncStream, HeldStream, Reader, wait_for_readers

from llm_batch_coalesce import (
    BatchCoalescer,
    CallResultError,
    DeadlockError,
    RecursiveCallError,
    SharedCallError,
    _streams,
)


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=60)


@pytest.fixture
def tasks(coalescer):
    return coalescer.as_async()


@pytest.fixture
def loops():
    made = []

    def make(count):
        made.extend(LoopThread() for _ in range(count))
        return made[-count:]

    yield make
    for loop in made:
        loop.end()


def yields(*items):
    async def generate():
        for item in items:
            yield item

    return generate


def results(readers):
    return [reader.result() for reader in readers]


# Threads and tasks together.


@pytest.mark.parametrize("led_by", ["thread", "task"])
def test_threads_and_tasks_of_several_loops_read_one_stream(coalescer, tasks, loops, led_by):
    items = [object() for _ in range(100)]
    one, *others = loops(4)
    if led_by == "thread":
        held = HeldStream(items)
        readers = [Reader().start(coalescer, held)]
    else:
        held = HeldAsyncStream(items)
        readers = [Reader().start(tasks, held, loop=one)]
    held.wait_for_pull()
    for number in range(12):
        loop = others[number % 3]
        readers += [Reader().start(coalescer, refused), Reader().start(tasks, refused, loop=loop)]
    wait_for_readers(coalescer, 25, 24 if led_by == "thread" else 25)
    held.let(40)
    readers[-1].wait_for(40)
    readers += [Reader().start(coalescer, refused), Reader().start(tasks, refused, loop=others[0])]
    held.let(61)
    assert results(readers) == [(items, None)] * 27
    assert (held.calls, held.closed) == (1, 0)
    # What is retained is for both, too.
    assert Reader().start(tasks, refused, loop=one).result() == (items, None)
    assert list(coalescer.stream("k", refused)) == items


def test_tasks_go_on_pulling_when_the_threads_have_left(coalescer, tasks, loops):
    held = HeldStream("abcd")
    thread = Reader(leave_after=1).start(coalescer, held, name="the thread")
    held.wait_for_pull()
    readers = [Reader().start(tasks, refused, loop=loop) for loop in loops(2) for _ in range(2)]
    wait_for_readers(coalescer, 5, 4)
    held.let()
    assert thread.result() == (["a"], None)
    held.wait_for_pull(2)
    wait_until(lambda: coalescer._readers("k")[0] == 4)
    held.let(4)
    assert results(readers) == [([*"abcd"], None)] * 4
    assert "the thread" not in held.pulled_by[1:]
    assert len(held.pulled_by) == 5


def test_a_thread_goes_on_when_the_task_that_pulls_is_cancelled(coalescer, tasks, loops):
    """The pull that it has begun is for all."""
    (loop,) = loops(1)
    held = HeldStream("abc")
    thread = Reader(pause_after=1).start(coalescer, held)
    held.wait_for_pull()
    task = Reader().start(tasks, refused, loop=loop)
    wait_for_readers(coalescer, 2, 1)
    held.let()
    held.wait_for_pull(2)
    thread.go_on()
    wait_for_readers(coalescer, 2, 1)
    task.cancel()
    items, error = task.result()
    assert (items, type(error)) == (["a"], asyncio.CancelledError)
    held.let(3)
    assert thread.result() == (["a", "b", "c"], None)
    assert held.closed == 0


def test_upstream_is_closed_when_the_last_reader_is_cancelled_while_it_pulls(coalescer, tasks, loops):
    (loop,) = loops(1)
    held = HeldStream("abc")
    thread = Reader(leave_after=1).start(coalescer, held)
    held.wait_for_pull()
    task = Reader().start(tasks, refused, loop=loop)
    wait_for_readers(coalescer, 2, 1)
    held.let()
    thread.result()
    held.wait_for_pull(2)
    task.cancel()
    task.result()
    assert "k" not in coalescer
    held.let()
    wait_until(lambda: held.closed == 1)
    assert list(coalescer.stream("k", lambda: "new")) == ["n", "e", "w"]


@pytest.mark.parametrize("left_in", ["another thread", "the pump's own step"])
@pytest.mark.parametrize("ends", ["with an item", "with an error"])
def test_a_pump_that_has_noticed_that_all_have_left_is_not_disturbed_in_closing_upstream(
    coalescer, tasks, loops, ends, left_in
):
    busy, go_on, closed = threading.Event(), threading.Event(), []

    class Upstream(HeldAsyncStream):
        async def __anext__(self):
            if self.pulls == 1:
                await self._gate.acquire()
                if left_in == "another thread":
                    busy.set()
                    assert go_on.wait(PATIENCE)
                else:
                    follower.close()
                if ends == "with an error":
                    raise OSError
            return await super().__anext__()

        async def aclose(self):
            try:
                for _ in range(5):
                    await asyncio.sleep(0)
                closed.append("whole")
            except asyncio.CancelledError:
                closed.append("cut")

    (loop,) = loops(1)
    held = Upstream("ab")
    leader = Reader(leave_after=1).start(tasks, held, loop=loop)
    held.wait_for_pull()
    follower = coalescer.stream("k", refused)
    first = AskedInThread(lambda: next(follower), None)
    wait_for_readers(coalescer, 2, 2)
    held.let()
    assert first.result() == "a"
    leader.result()
    held.let(2)
    if left_in == "another thread":
        assert busy.wait(PATIENCE)
        follower.close()
        go_on.set()
    wait_until(lambda: closed)
    assert closed == ["whole"]


def test_a_pull_that_cannot_begin_is_left_to_another(coalescer, tasks, monkeypatch):
    """The system has no more threads."""

    class Refused(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    stream = coalescer.stream("k", lambda: range(5))
    assert next(stream) == 0
    with monkeypatch.context() as patch:
        patch.setattr(_streams, "threading", types.SimpleNamespace(Thread=Refused))
        items, error = asyncio.run(Reader().read_in_task(tasks.stream("k", refused)))
    assert (items, type(error)) == ([0], RuntimeError)
    other = Reader().start(coalescer, refused)
    assert (list(stream), other.result()) == ([1, 2, 3, 4], ([0, 1, 2, 3, 4], None))


def test_an_upstream_of_the_wrong_kind_is_refused_in_both(coalescer, tasks, loops):
    (loop,) = loops(1)
    with pytest.raises(CallResultError):
        next(coalescer.stream("k", yields(1)))
    items, error = Reader().start(tasks, lambda: [1], loop=loop).result()
    assert (items, type(error)) == ([], CallResultError)


def test_a_stream_that_a_task_leads_goes_on_without_readers_if_it_is_to_finish(coalescer, loops):
    (loop,) = loops(1)
    held = HeldAsyncStream("ab")
    leader = Reader().start(coalescer.as_async(on_abandoned="finish"), held, loop=loop)
    held.wait_for_pull()
    leader.cancel()
    leader.result()
    assert coalescer._readers("k")[0] == 0
    thread = Reader().start(coalescer, refused)
    wait_until(lambda: coalescer._readers("k") == (1, 1))
    held.let(3)
    assert thread.result() == (["a", "b"], None)
    # A thread that pulls cannot: nobody would.
    with coalescer.as_async(on_abandoned="finish").as_sync().stream("t", lambda: "ab") as stream:
        next(stream)
    assert "t" not in coalescer


# A loop that is closed with its pump.


@pytest.mark.parametrize("before", [0, 1])
def test_readers_elsewhere_do_not_wait_for_the_pump_of_a_closed_loop(coalescer, tasks, loops, before):
    one, other = loops(2)
    held = HeldAsyncStream("ab")
    Reader().start(tasks, held, loop=one)
    held.wait_for_pull()
    thread = Reader().start(coalescer, lambda: ["own"])
    task = Reader().start(tasks, yields("own"), loop=other)
    wait_for_readers(coalescer, 3, 3)
    held.let(before)
    for reader in (thread, task):
        reader.wait_for(before)
    wait_for_readers(coalescer, 3, 3)
    one.close()
    got = results([thread, task])
    if before:
        assert [items for items, _ in got] == [["a"]] * 2
        assert all(type(error) is SharedCallError and "is gone" in str(error) for _, error in got)
    else:
        assert got == [(["own"], None)] * 2
        assert list(coalescer.stream("k", refused)) == ["own"]
    assert Reader().start(coalescer, lambda: ["new"], key="new").result() == (["new"], None)


def test_a_reader_that_comes_when_the_loop_is_closed_starts_over(coalescer, tasks, loops):
    (one,) = loops(1)
    held = HeldAsyncStream("ab")
    Reader().start(tasks, held, loop=one)
    held.wait_for_pull()
    one.close()
    assert list(coalescer.stream("k", lambda: ["own"])) == ["own"]


def test_a_reader_that_pauses_while_the_loop_is_closed_gets_what_was_there(coalescer, tasks, loops):
    (one,) = loops(1)
    held = HeldAsyncStream("abc")
    leader = Reader().start(tasks, held, loop=one)
    held.wait_for_pull()
    thread = Reader(pause_after=1).start(coalescer, refused)
    wait_for_readers(coalescer, 2, 2)
    held.let(2)
    for reader, count in ((leader, 2), (thread, 1)):
        reader.wait_for(count)
    one.close()
    thread.go_on()
    items, error = thread.result()
    assert (items, type(error)) == (["a", "b"], SharedCallError)


# Circles.


def test_an_upstream_that_reads_its_own_stream_is_told(coalescer, tasks):
    with pytest.raises(RecursiveCallError, match="'k'"):
        next(coalescer.stream("k", lambda: coalescer.stream("k", refused)))

    async def generate():
        async for item in tasks.stream("k", refused):
            yield item

    async def read():
        return [item async for item in tasks.stream("k", generate)]

    with pytest.raises(RecursiveCallError, match="'k'"):
        asyncio.run(read())
    assert coalescer.stats().in_flight == 0


def test_an_upstream_that_waits_for_a_reader_of_its_own_stream_is_told(coalescer):
    def generate():
        yield 1
        with pytest.raises(DeadlockError):
            next(other)
        yield 2

    stream, other = coalescer.stream("k", generate), coalescer.stream("k", refused)
    assert (next(stream), next(other)) == (1, 1)
    assert list(stream) == [2]
    assert list(other) == []


def test_a_thread_that_would_block_the_loop_of_the_pump_is_told(coalescer, tasks, loops):
    (loop,) = loops(1)
    held = HeldAsyncStream("a")
    leader = Reader().start(tasks, held, loop=loop)
    held.wait_for_pull()
    stream = coalescer.stream("k", refused)
    with pytest.raises(DeadlockError, match="'k'"):
        loop.do(next, stream)
    held.let(2)
    assert leader.result() == (["a"], None)
    # What is there already needs no wait.
    assert loop.do(list, coalescer.stream("k", refused)) == ["a"]


def one_is_told(coalescer, got):
    assert len([error for _, error in got if isinstance(error, DeadlockError)]) == 1
    assert coalescer.stats().in_flight == 0


def test_of_two_upstreams_of_threads_that_read_each_other_one_is_told(coalescer):
    barrier = threading.Barrier(2)

    def generate(own, other):
        yield own
        barrier.wait(PATIENCE)
        yield from coalescer.stream(other, lambda: "t")

    readers = [Reader().start(coalescer, lambda pair=pair: generate(*pair), pair[0]) for pair in ("ab", "ba")]
    one_is_told(coalescer, results(readers))


def test_of_two_upstreams_of_tasks_that_read_each_other_one_is_told(coalescer, tasks, loops):
    barrier = threading.Barrier(2)

    async def generate(own, other):
        yield own
        await asyncio.to_thread(barrier.wait, PATIENCE)
        async for item in tasks.stream(other, yields("t")):
            yield item

    readers = [
        Reader().start(tasks, lambda pair=pair: generate(*pair), pair[0], loop=loop)
        for pair, loop in zip(("ab", "ba"), loops(2), strict=True)
    ]
    one_is_told(coalescer, results(readers))


def test_of_an_upstream_and_a_call_that_wait_for_each_other_one_is_told(coalescer):
    barrier = threading.Barrier(2)

    def generate():
        yield 1
        barrier.wait(PATIENCE)
        yield coalescer.get_or_call("call", lambda: "t")

    def call():
        barrier.wait(PATIENCE)
        return list(coalescer.stream("k", lambda: "t"))

    def ask():
        try:
            return coalescer.get_or_call("call", call), None
        except DeadlockError as error:
            return None, error

    asked = AskedInThread(ask, None)
    wait_until(lambda: coalescer.stats().in_flight == 1)
    one_is_told(coalescer, [Reader().start(coalescer, generate).result(), asked.result()])

"""Streams that threads share: one upstream a key, read by whichever reader is at the front."""

import signal
import subprocess
import sys
import threading

import pytest
from faces import refused
from loops import PATIENCE
from upstreams import HeldStream, Reader, wait_for_readers

from llm_batch_coalesce import BatchCoalescer, CallResultError, _core


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=60)


def start(coalescer, count, fn=refused, **options):
    """Start so many readers."""
    return [Reader().start(coalescer, fn, **options) for _ in range(count)]


# Reading.


def test_the_first_item_comes_when_upstream_yields_it(coalescer):
    held = HeldStream("ab")
    held.let()
    stream = coalescer.stream("k", held)
    assert held.calls == 0
    assert next(stream) == "a"
    assert (held.calls, held.pulls) == (1, 1)


def test_all_readers_get_every_item_in_order_as_it_comes(coalescer):
    items = [object() for _ in range(5)]
    held = HeldStream(items)
    readers = start(coalescer, 4, held)
    for number in range(5):
        held.wait_for_pull(number + 1)
        wait_for_readers(coalescer, 4, 3)
        held.let()
        for reader in readers:
            reader.wait_for(number + 1)
    held.let()
    assert [reader.result() for reader in readers] == [(items, None)] * 4
    assert all(mine is item for reader in readers for mine, item in zip(reader.items, items, strict=True))
    assert (held.calls, held.closed) == (1, 0)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_a_reader_that_joins_late_gets_everything_from_the_first_item(coalescer, count):
    held = HeldStream(range(count))
    held.let(1_000)
    early = coalescer.stream("k", held)
    before = [next(early) for _ in range(count // 2)]
    late = list(coalescer.stream("k", held))
    assert late == before + list(early) == list(range(count))
    assert held.calls == 1


def test_a_reader_inside_the_ttl_gets_everything_and_one_after_it_leads(coalescer):
    assert list(coalescer.stream("k", lambda: "abc")) == ["a", "b", "c"]
    assert list(coalescer.stream("k", refused)) == ["a", "b", "c"]
    _core._advance_clock(61)
    assert "k" not in coalescer
    assert list(coalescer.stream("k", lambda: "d")) == ["d"]


@pytest.mark.parametrize(("of_coalescer", "of_stream"), [(0, None), (60, 0)])
def test_a_stream_that_is_not_retained_serves_the_readers_that_it_had(of_coalescer, of_stream):
    coalescer = BatchCoalescer(ttl_seconds=of_coalescer)
    early = coalescer.stream("k", lambda: "abc", ttl_seconds=of_stream)
    assert next(early) == "a"
    assert list(coalescer.stream("k", refused)) == ["a", "b", "c"]
    assert "k" not in coalescer
    assert list(coalescer.stream("k", lambda: "new")) == ["n", "e", "w"]
    assert list(early) == ["b", "c"]


def test_a_streams_own_ttl_is_that_of_the_reader_that_leads():
    coalescer = BatchCoalescer(ttl_seconds=0)
    early = coalescer.stream("k", lambda: "ab", ttl_seconds=100)
    next(early)
    list(coalescer.stream("k", refused, ttl_seconds=0))
    _core._advance_clock(99)
    assert list(coalescer.stream("k", refused)) == ["a", "b"]
    _core._advance_clock(2)
    assert "k" not in coalescer


def test_nothing_happens_before_the_first_item_is_asked_for(coalescer):
    stream = coalescer.stream("k", refused)
    assert iter(stream) is stream
    assert len(coalescer) == coalescer.stats().calls == 0
    stream.close()
    assert list(stream) == []
    assert coalescer.stats().calls == 0


# Who pulls.


def test_a_slow_reader_delays_nobody(coalescer):
    held = HeldStream("abc")
    slow = Reader(pause_after=1).start(coalescer, held)
    held.let()
    slow.wait_for(1)
    held.let(3)
    assert list(coalescer.stream("k", refused)) == ["a", "b", "c"]
    slow.go_on()
    assert slow.result() == (["a", "b", "c"], None)


def test_another_reader_at_the_front_goes_on_when_the_one_that_pulled_stops(coalescer):
    held = HeldStream("abcd")
    leader = Reader(pause_after=2).start(coalescer, held, name="leader")
    held.wait_for_pull()
    waiters = start(coalescer, 3, name="waiter")
    wait_for_readers(coalescer, 4, 3)
    held.let(5)
    assert [waiter.result() for waiter in waiters] == [([*"abcd"], None)] * 3
    leader.go_on()
    assert leader.result() == ([*"abcd"], None)
    assert held.pulled_by[2:] == ["waiter"] * 3


def test_readers_go_on_when_the_one_that_pulled_leaves(coalescer):
    held = HeldStream("abc")
    leader = Reader(leave_after=1).start(coalescer, held, name="leader")
    held.wait_for_pull()
    waiter = Reader().start(coalescer, refused, name="waiter")
    wait_for_readers(coalescer, 2, 1)
    held.let()
    assert leader.result() == (["a"], None)
    held.let(3)
    assert waiter.result() == (["a", "b", "c"], None)
    assert held.closed == 0


@pytest.mark.parametrize("closing", [lambda upstream: upstream.close(), None], ids=["closed", "dropped"])
def test_the_last_reader_to_leave_closes_upstream(coalescer, closing):
    held = HeldStream("abc")
    held.let(10)
    readers = [coalescer.stream("k", held) for _ in range(3)]
    assert [next(reader) for reader in readers] == ["a"] * 3
    while readers:
        assert held.closed == 0
        reader = readers.pop(0)
        if closing is not None:
            closing(reader)
            assert list(reader) == []
        del reader
    assert held.closed == 1
    assert "k" not in coalescer
    assert list(coalescer.stream("k", lambda: "new")) == ["n", "e", "w"]


def test_a_generator_is_closed_where_it_stands(coalescer):
    steps = []

    def generate():
        try:
            yield 1
        finally:
            steps.append("closed")

    with coalescer.stream("k", generate) as stream:
        assert next(stream) == 1
        assert steps == []
    assert steps == ["closed"]
    stream.close()
    assert (list(stream), steps) == ([], ["closed"])


def test_leaving_a_stream_that_has_ended_closes_nothing(coalescer):
    held = HeldStream("a")
    held.let(2)
    with coalescer.stream("k", held) as stream:
        assert list(stream) == ["a"]
    assert held.closed == 0
    with coalescer.stream("k", refused) as stream:
        assert next(stream) == "a"
    assert list(coalescer.stream("k", refused)) == ["a"]


def test_an_iterable_that_is_not_its_own_iterator_is_closed_itself(coalescer):
    """As the streams of the SDKs are, whose `close` ends the response."""
    steps = []

    class Upstream:
        def __iter__(self):
            yield from "ab"

        def close(self):
            steps.append("closed")

    upstream = Upstream()
    with coalescer.stream("k", lambda: upstream) as stream:
        assert next(stream) == "a"
    assert steps == ["closed"]


def test_an_upstream_without_close_is_only_dropped(coalescer):
    with coalescer.stream("k", lambda: [1, 2]) as stream:
        assert next(stream) == 1
    assert "k" not in coalescer


def test_an_error_of_close_reaches_the_one_that_closes(coalescer, monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable.exc_value))

    def generate():
        try:
            yield 1
        finally:
            raise LookupError("of close")

    stream = coalescer.stream("k", generate)
    next(stream)
    with pytest.raises(LookupError, match="of close"):
        stream.close()
    assert (list(stream), heard) == ([], [])
    stream = coalescer.stream("k", generate)
    next(stream)
    del stream
    assert [str(error) for error in heard] == ["of close"]
    assert coalescer.stats().in_flight == 0


def test_an_iterator_is_for_one_thread_at_a_time(coalescer):
    held = HeldStream("a")
    reader = Reader()
    stream = coalescer.stream("k", held)
    thread = threading.Thread(target=reader.read, args=(stream,))
    thread.start()
    held.wait_for_pull()
    for use in (next, type(stream).close, list):
        with pytest.raises(ValueError, match="already executing"):
            use(stream)
    held.let(2)
    thread.join(PATIENCE)
    assert reader.items == ["a"]


# What upstreams may be.


@pytest.mark.parametrize("items", [[], [None, None], [ValueError("an item"), StopIteration()], [[], (), {}]])
def test_any_object_is_an_item(coalescer, items):
    for fn in (lambda: items, refused):
        assert all(mine is item for mine, item in zip(coalescer.stream("k", fn), items, strict=True))


@pytest.mark.parametrize("result", [5, None, object()])
def test_what_is_no_iterable_is_refused_for_all_and_not_retained(coalescer, result):
    with pytest.raises(CallResultError, match="must return an iterator, not"):
        next(coalescer.stream("k", lambda: result))
    assert "k" not in coalescer


def test_what_is_for_tasks_is_refused(coalescer):
    async def coroutine():
        raise AssertionError

    async def generate():
        yield 1

    for fn in (coroutine, generate):
        with pytest.raises(CallResultError, match="AsyncBatchCoalescer"):
            next(coalescer.stream("k", fn))


def test_a_stop_iteration_out_of_fn_is_no_end(coalescer):
    with pytest.raises(RuntimeError):
        list(coalescer.stream("k", lambda: next(iter([]))))


# In any moment.


def test_a_reader_that_comes_while_the_stream_is_ending_waits_and_hinders_nobody():
    """What leaves for want of room may take its time to go, and needs the interpreter for it."""
    program = """
import threading
from llm_batch_coalesce import BatchCoalescer

coalescer, keys, got = BatchCoalescer(max_retained=1), [], []
going, go = threading.Event(), threading.Event()

class Slow:
    def __del__(self):
        going.set()
        go.wait()

def lead():
    list(coalescer.stream("old", lambda: [Slow()]))
    while not going.is_set():
        keys.append(len(keys))
        list(coalescer.stream(keys[-1], lambda: "ab"))

leader = threading.Thread(target=lead)
leader.start()
going.wait()
other = threading.Thread(target=lambda: got.extend(coalescer.stream(keys[-1], lambda: "own")))
other.start()
while len(got) < 2:
    pass
go.set()
leader.join()
other.join()
print(*got)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a b\n", "")


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system cannot signal a thread")
def test_control_c_reaches_a_main_thread_that_waits_and_nobody_else(coalescer):
    held = HeldStream("ab")
    leader = Reader().start(coalescer, held)
    held.wait_for_pull()

    def interrupt():
        wait_for_readers(coalescer, 2, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    stream = coalescer.stream("k", refused)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    interrupting.join(PATIENCE)
    assert list(stream) == []
    assert coalescer._readers("k") == (1, 0)
    held.let(3)
    assert leader.result() == (["a", "b"], None)

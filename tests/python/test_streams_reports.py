"""What is said of streams: counters, flights, keys; what forgets them; what is refused. In threads and in tasks."""

import asyncio
import dataclasses
import threading

import pytest
from faces import refused
from loops import PATIENCE, let_run, wait_until
from upstreams import HeldAsyncStream, HeldStream, Reader, Readers, wait_for_readers

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, RecursiveCallError, Stats, _core


@pytest.fixture(params=[0, 1, 2], ids=["threads", "tasks", "loops"])
def readers(request):
    with Readers(request.param) as readers:
        yield readers


def stats(calls=0, joined=0, hits=0, **others):
    return Stats(
        **{field.name: 0 for field in dataclasses.fields(Stats)}
        | others
        | {"calls": calls, "joined": joined, "hits": hits}
    )


def retain(readers, coalescer, value, key="k"):
    """Retain a value, which is no stream."""
    if readers.in_threads:
        coalescer.get_or_call(key, lambda: value)
    else:

        async def call():
            return value

        readers.loops[0].start(coalescer.get_or_call(key, call)).result()


# Counters.


def test_every_reader_is_counted_once(readers):
    coalescer = readers.coalescer(ttl_seconds=60)
    held = readers.held("ab")
    leader = readers.lead(coalescer, held)
    assert coalescer.stats() == stats(1, in_flight=1)
    joined = readers.join(coalescer, 3)
    # They are counted when they have been served.
    assert coalescer.stats() == stats(1, in_flight=1)
    held.let()
    for reader in joined:
        reader.wait_for(1)
    assert coalescer.stats() == stats(1, 3, in_flight=1)
    held.let(2)
    for reader in [leader, *joined]:
        reader.result()
    assert coalescer.stats() == stats(1, 3, retained=1)
    for _ in range(2):
        readers.read(coalescer)
    assert coalescer.stats() == stats(1, 3, 2, retained=1)
    retain(readers, coalescer, "value")
    assert coalescer.stats() == stats(2, 3, 2, retained=2)
    assert f"{coalescer.stats().saved}" == "5"
    assert " in_flight=0 retained=2 calls=2 joined=3 hits=2 errors=0>" in repr(coalescer)
    coalescer.reset_stats()
    assert coalescer.stats() == stats(retained=2)
    _core._advance_clock(61)
    assert coalescer.stats() == stats()


def test_an_abandoned_stream_is_a_call_that_is_over(readers):
    coalescer = readers.coalescer()
    assert readers.read(coalescer, readers.yields(1, 2), leave_after=1) == ([1], None)
    wait_until(lambda: coalescer.stats() == stats(1))


def test_a_reader_that_starts_over_is_counted_once(readers):
    coalescer = readers.coalescer(private_errors=LookupError)
    held = readers.held(error=LookupError())
    leader = readers.lead(coalescer, held)
    (waiter,) = readers.join(coalescer, 1, readers.yields("own"))
    held.let()
    leader.result()
    assert waiter.result() == (["own"], None)
    assert coalescer.stats() == stats(2, errors=1, retained=1)


async def test_a_task_that_is_cancelled_with_nothing_is_counted_as_that():
    coalescer = AsyncBatchCoalescer()
    held = HeldAsyncStream("a")
    tasks = [asyncio.create_task(Reader().read_in_task(coalescer.stream("k", held))) for _ in range(3)]
    await let_run()
    tasks[1].cancel()
    await let_run()
    assert coalescer.stats() == stats(1, cancelled=1, in_flight=1)
    held.let(2)
    await asyncio.wait(tasks)
    assert coalescer.stats() == stats(1, 1, cancelled=1, retained=1)


def test_a_refused_reader_is_no_request():
    coalescer = BatchCoalescer()
    with pytest.raises(RecursiveCallError):
        next(coalescer.stream("k", lambda: coalescer.stream("k", refused)))
    assert coalescer.stats() == stats(1, errors=1)


# Flights.


def test_flights_show_streams(readers):
    coalescer = readers.coalescer()
    assert coalescer.flights() == []
    held = readers.held("a")
    leader = readers.lead(coalescer, held, name="the leader")
    joined = readers.join(coalescer, 3)
    (flight,) = coalescer.flights()
    assert (flight.key, flight.waiters, flight.leader, flight.is_stream) == ("k", 3, "the leader", True)
    _core._advance_clock(10)
    (flight,) = coalescer.flights()
    assert 10 <= flight.age_seconds < 10 + PATIENCE
    assert coalescer.forget("k")
    assert [flight.key for flight in coalescer.flights()] == ["k"]
    assert (len(coalescer), coalescer.stats().in_flight) == (0, 1)
    held.let(2)
    for reader in [leader, *joined]:
        assert reader.result() == (["a"], None)
    assert coalescer.flights() == []


def test_flights_show_calls_and_streams_together():
    coalescer, go, started = BatchCoalescer(), threading.Event(), threading.Event()

    def call():
        started.set()
        assert go.wait(PATIENCE)

    held = HeldStream("a")
    reader = Reader().start(coalescer, held)
    held.wait_for_pull()
    thread = threading.Thread(target=coalescer.get_or_call, args=("k", call))
    thread.start()
    assert started.wait(PATIENCE)
    assert [(flight.key, flight.is_stream) for flight in coalescer.flights()] == [("k", True), ("k", False)]
    assert (len(coalescer), coalescer.stats().in_flight) == (2, 2)
    go.set()
    held.let(2)
    thread.join(PATIENCE)
    reader.result()


# Keys.


def test_a_key_may_be_that_of_a_value_and_of_a_stream(readers):
    coalescer = readers.coalescer()
    assert readers.read(coalescer, readers.yields("a")) == (["a"], None)
    assert ("k" in coalescer, len(coalescer), coalescer.peek("k", "none")) == (True, 1, "none")
    retain(readers, coalescer, "value")
    assert ("k" in coalescer, len(coalescer), coalescer.peek("k")) == (True, 2, "value")
    assert readers.read(coalescer) == (["a"], None)
    coalescer.put("k", "another")
    assert readers.read(coalescer) == (["a"], None)
    assert coalescer.forget("k")
    assert ("k" in coalescer, len(coalescer), coalescer.peek("k")) == (False, 0, None)
    assert not coalescer.forget("k")


@pytest.mark.parametrize("forget", [lambda coalescer: coalescer.forget("k"), BatchCoalescer.clear])
def test_a_forgotten_stream_under_way_goes_on_for_its_readers_only(readers, forget):
    coalescer = readers.coalescer()
    held = readers.held("ab")
    old = [readers.lead(coalescer, held), *readers.join(coalescer, 2)]
    held.let()
    for reader in old:
        reader.wait_for(1)
    assert "k" in coalescer
    forget(coalescer)
    assert ("k" in coalescer, len(coalescer)) == (False, 0)
    assert readers.read(coalescer, readers.yields("new")) == (["new"], None)
    held.let(2)
    assert [reader.result() for reader in old] == [(["a", "b"], None)] * 3
    assert readers.read(coalescer) == (["new"], None)


@pytest.mark.parametrize("forget", [lambda coalescer: coalescer.forget("k"), BatchCoalescer.clear])
def test_a_forgotten_retained_stream_is_led_anew(readers, forget):
    coalescer = readers.coalescer()
    readers.read(coalescer, readers.yields("old"))
    forget(coalescer)
    assert readers.read(coalescer, readers.yields("new")) == (["new"], None)


def test_a_stream_that_is_over_age_is_not_joined(readers):
    coalescer = readers.coalescer(max_flight_seconds=30, ttl_seconds=1_000)
    held, new = readers.held("ab"), readers.held("new")
    old = [readers.lead(coalescer, held), *readers.join(coalescer, 1)]
    _core._advance_clock(29)
    old += readers.join(coalescer, 1)
    _core._advance_clock(2)
    newcomer = readers.start(coalescer, new)
    new.wait_for_pull()
    assert coalescer.stats().calls == 2
    held.let(3)
    assert [reader.result() for reader in old] == [(["a", "b"], None)] * 3
    new.let(4)
    assert newcomer.result() == (["n", "e", "w"], None)
    assert readers.read(coalescer) == (["n", "e", "w"], None)


def test_at_most_so_many_streams_are_retained(readers):
    coalescer = readers.coalescer(max_retained=8)
    for key in range(200):
        readers.read(coalescer, readers.yields(key), key)
    counted = coalescer.stats()
    # Give or take one for each shard.
    assert 8 <= counted.retained <= 8 + 64
    assert counted.retained + counted.evicted == 200
    assert len(coalescer) == counted.retained
    assert readers.read(coalescer, refused, 199) == ([199], None)


def test_streams_are_shared_among_keys_that_are_equal(readers):
    coalescer = readers.coalescer()
    assert readers.read(coalescer, readers.yields("a"), 1) == readers.read(coalescer, refused, 1.0) == (["a"], None)
    assert readers.read(coalescer, readers.yields("b"), ("k", 1)) == (["b"], None)


# What is refused.


INF = float("inf")


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ttl_seconds": -1}, ValueError, "ttl_seconds must be zero or more seconds, not -1"),
        ({"ttl_seconds": float("nan")}, ValueError, "ttl_seconds must be .* not nan"),
        ({"ttl_seconds": True}, TypeError, "ttl_seconds must be a number of seconds, not True"),
        ({"ttl_seconds": "5"}, TypeError, "ttl_seconds must be a number of seconds, not '5'"),
        ({"max_buffered": 0}, ValueError, "max_buffered must be 1 or more, not 0"),
        ({"max_buffered": -3}, ValueError, "max_buffered must be 1 or more, not -3"),
        ({"max_buffered": 2.0}, TypeError, r"max_buffered must be an int, not 2\.0"),
        ({"max_buffered": True}, TypeError, "max_buffered must be an int, not True"),
        ({"max_buffered": "all"}, TypeError, "max_buffered must be an int, not 'all'"),
        ({"fn": 5}, TypeError, "fn must be callable, not 5"),
        ({"fn": None}, TypeError, "fn must be callable, not None"),
        ({"fn": [1, 2]}, TypeError, r"fn must be callable, not \[1, 2\]"),
        ({"key": []}, TypeError, "unhashable type: 'list'"),
        ({"timeout": 5}, TypeError, "timeout"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_once(kind, options, error, message):
    coalescer = kind()
    with pytest.raises(error, match=message):
        coalescer.stream(**{"key": "k", "fn": refused, **options})
    assert coalescer.stats() == stats()
    assert (len(coalescer), coalescer.flights()) == (0, [])


@pytest.mark.parametrize("options", [{"ttl_seconds": INF}, {"ttl_seconds": 10**400}, {"max_buffered": 10**30}])
def test_numbers_past_all_bounds_are_no_bounds(readers, options):
    coalescer = readers.coalescer()
    assert readers.read(coalescer, readers.yields("a"), **options) == (["a"], None)
    assert readers.read(coalescer, **options) == (["a"], None)


class Key:
    """Compares as it is told."""

    broken = False

    def __hash__(self):
        return 1

    def __eq__(self, other):
        if self.broken or other.broken:
            raise LookupError("of the key")
        return True


def test_an_error_of_the_key_is_its_readers(readers):
    coalescer = readers.coalescer()
    assert readers.read(coalescer, readers.yields("a"), Key()) == (["a"], None)
    before, broken = coalescer.stats(), Key()
    broken.broken = True
    items, error = readers.read(coalescer, refused, broken)
    assert (items, type(error)) == ([], LookupError)
    assert (coalescer.stats(), coalescer.flights()) == (before, [])
    assert readers.read(coalescer, refused, Key()) == (["a"], None)


def test_a_key_is_hashed_no_more_once_its_reader_has_joined():
    """What it does then must hinder nobody from leaving."""

    class Fickle:
        asked = 0

        def __hash__(self):
            self.asked += 1
            return 1

    coalescer, key = BatchCoalescer(), Fickle()
    leader, reader = (coalescer._open(key, None, None, False) for _ in range(2))
    asked = key.asked
    leader.leave()
    reader.leave()
    assert key.asked == asked
    assert coalescer.stats() == stats(1, cancelled=1)


def test_tasks_read_in_a_loop_only():
    async def generate():
        yield 1

    async def read():
        return [item async for item in stream]

    stream = AsyncBatchCoalescer().stream("k", generate)
    assert asyncio.run(read()) == [1]


def test_a_waiter_of_a_stream_is_none_of_a_call():
    coalescer = BatchCoalescer()
    with Readers() as readers:
        held = readers.held("a")
        asked = [readers.lead(coalescer, held), *readers.join(coalescer, 1)]
        assert coalescer._waiters("k") == 0
        wait_for_readers(coalescer, 2, 1)
        assert not coalescer.cancel("k")
        held.let(2)
        assert [reader.result() for reader in asked] == [(["a"], None)] * 2

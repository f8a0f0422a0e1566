"""Streams that tasks share: one task pumps upstream, each reader goes at its own pace."""

import asyncio
import contextvars
import logging

import pytest
from faces import refused
from loops import let_run
from upstreams import HeldAsyncStream, Reader, Stop

from llm_batch_coalesce import AsyncBatchCoalescer, CallResultError, SharedCallError, _core


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


async def read(stream):
    return [item async for item in stream]


async def outcome(stream):
    """The items of a stream, and its error."""
    return await Reader().read_in_task(stream)


async def start(coalescer, count, fn=refused, **options):
    """Start so many readers, one after the other. Returns when all wait."""
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(read(coalescer.stream("k", fn, **options))))
        await let_run()
    return tasks


def yields(*items):
    async def generate():
        for item in items:
            yield item

    return generate


# Reading.


async def test_the_first_item_comes_when_upstream_yields_it(coalescer):
    held = HeldAsyncStream("ab")
    stream = coalescer.stream("k", held)
    assert held.calls == 0
    first = asyncio.create_task(anext(stream))
    await let_run()
    assert not first.done()
    held.let()
    assert await first == "a"
    await let_run()
    assert (held.calls, held.pulls) == (1, 2)
    await stream.aclose()


async def test_a_thousand_tasks_read_one_stream(coalescer):
    items = [object() for _ in range(30)]
    held = HeldAsyncStream(items)
    tasks = await start(coalescer, 2, held)
    tasks += [asyncio.create_task(read(coalescer.stream("k", refused))) for _ in range(998)]
    await let_run()
    assert coalescer._readers("k") == (1_000, 1_000)
    held.let(10)
    await let_run()
    tasks += await start(coalescer, 1)
    held.let(21)
    got = await asyncio.gather(*tasks)
    assert all(mine is item for each in got for mine, item in zip(each, items, strict=True))
    assert (held.calls, held.closed) == (1, 0)
    assert coalescer.stats().joined == 1_000


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
async def test_a_reader_that_joins_late_or_inside_the_ttl_gets_everything(coalescer, count):
    held = HeldAsyncStream(range(count))
    (leader,) = await start(coalescer, 1, held)
    held.let(count // 2)
    await let_run()
    (late,) = await start(coalescer, 1)
    held.let(count + 1)
    assert await leader == await late == await read(coalescer.stream("k", refused)) == list(range(count))
    _core._advance_clock(61)
    assert await read(coalescer.stream("k", yields("new"))) == ["new"]


async def test_a_stream_that_is_not_retained_is_led_anew(coalescer):
    held = HeldAsyncStream("a")
    leader, waiter = await start(coalescer, 2, held, ttl_seconds=0)
    held.let(2)
    assert await leader == await waiter == ["a"]
    assert "k" not in coalescer
    assert await read(coalescer.stream("k", yields("new"))) == ["new"]


async def test_a_slow_reader_delays_nobody(coalescer):
    slow = coalescer.stream("k", yields(*range(100)))
    assert await anext(slow) == 0
    assert await read(coalescer.stream("k", refused)) == list(range(100))
    assert await read(slow) == list(range(1, 100))


@pytest.mark.parametrize("most", [1, 2, 3, 100])
async def test_readers_keep_up_with_an_upstream_that_never_suspends(coalescer, most):
    async def generate():
        number = 0
        while True:
            yield number
            number += 1

    async def read_some(stream):
        got = [await anext(stream) for _ in range(500)]
        await stream.aclose()
        return got

    streams = [coalescer.stream("k", generate, max_buffered=most) for _ in range(5)]
    assert await asyncio.gather(*map(read_some, streams)) == [list(range(500))] * 5
    await let_run()
    assert coalescer.stats().in_flight == 0


async def test_upstream_runs_in_a_copy_of_the_leaders_context(coalescer):
    variable = contextvars.ContextVar("variable")

    async def generate():
        yield variable.get()
        variable.set("upstream's")
        yield variable.get()

    variable.set("leader's")
    assert await read(coalescer.stream("k", generate)) == ["leader's", "upstream's"]
    assert variable.get() == "leader's"


# What upstreams may be.


async def test_fn_may_return_an_awaitable_of_an_async_iterator(coalescer):
    """As the SDKs of providers do."""

    async def create():
        await asyncio.sleep(0)
        return yields(1, 2)()

    async def create_another_way():
        return Iterable()

    class Iterable:
        def __aiter__(self):
            return yields(3)()

    assert await read(coalescer.stream("k", create)) == await read(coalescer.stream("k", refused)) == [1, 2]
    assert await read(coalescer.stream("i", create_another_way)) == [3]
    assert await read(coalescer.stream("j", Iterable)) == [3]


@pytest.mark.parametrize("items", [[], [None], [ValueError("an item"), StopAsyncIteration()]])
async def test_any_object_is_an_item(coalescer, items):
    for fn in (yields(*items), refused):
        assert all(mine is item for mine, item in zip(await read(coalescer.stream("k", fn)), items, strict=True))


async def number():
    return 5


@pytest.mark.parametrize(
    "fn", [lambda: 5, lambda: None, lambda: [1, 2], number], ids=["an int", "None", "a list", "a coroutine"]
)
async def test_what_is_no_async_iterator_is_refused_for_all_and_not_retained(coalescer, fn):
    outcomes = await asyncio.gather(outcome(coalescer.stream("k", fn)), outcome(coalescer.stream("k", fn)))
    for items, error in outcomes:
        assert (items, type(error)) == ([], CallResultError)
        assert "must return an async iterator, not" in str(error)
    assert "k" not in coalescer


# Readers that leave.


async def test_a_reader_that_is_cancelled_waits_no_more(coalescer):
    held = HeldAsyncStream("a")
    tasks = await start(coalescer, 4, held)
    assert coalescer._readers("k") == (4, 4)
    for task in tasks[1:]:
        task.cancel()
    await let_run()
    assert coalescer._readers("k") == (1, 1)
    held.let(2)
    assert await tasks[0] == ["a"]


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize("before", [0, 1])
async def test_the_last_reader_to_be_cancelled_closes_upstream(coalescer, order, before):
    held = HeldAsyncStream("abc")
    tasks = await start(coalescer, len(order), held)
    held.let(before)
    await let_run()
    for number in order:
        assert not held.task.done()
        tasks[number].cancel()
        await let_run()
    assert all(task.cancelled() for task in tasks)
    assert (held.task.cancelled(), held.closed) == (True, 1)
    assert "k" not in coalescer
    assert coalescer.flights() == []
    assert await read(coalescer.stream("k", yields("new"))) == ["new"]


@pytest.mark.parametrize("way", ["aclose", "drop"])
async def test_the_last_reader_to_leave_closes_upstream(coalescer, way):
    closed = []

    async def generate():
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    streams = [coalescer.stream("k", generate) for _ in range(2)]
    for stream in streams:
        assert await anext(stream) == 1
    for left in (1, 0):
        assert not closed
        stream = streams.pop()
        if way == "aclose":
            await stream.aclose()
        del stream
        await let_run()
        assert coalescer._readers("k")[0] == left
    assert (closed, coalescer.flights()) == ([True], [])


async def test_an_iterable_that_is_not_its_own_iterator_is_closed_itself(coalescer):
    class Upstream:
        closed = 0

        def __aiter__(self):
            return yields(1, 2)()

        async def close(self):
            self.closed += 1

    upstream = Upstream()
    stream = coalescer.stream("k", lambda: upstream)
    await anext(stream)
    await stream.aclose()
    await let_run()
    assert upstream.closed == 1


async def test_an_error_of_closing_is_logged(coalescer, caplog):
    async def generate():
        try:
            while True:
                yield 1
        finally:
            raise LookupError("of close")

    stream = coalescer.stream("k", generate)
    await anext(stream)
    with caplog.at_level(logging.ERROR, "llm_batch_coalesce"):
        await stream.aclose()
        await let_run()
    assert "closing the upstream of a stream failed" in caplog.text
    assert "of close" in caplog.text
    assert coalescer.flights() == []


@pytest.mark.parametrize("before", [0, 1])
async def test_a_stream_that_is_to_finish_serves_later_readers(before):
    coalescer = AsyncBatchCoalescer(ttl_seconds=60, on_abandoned="finish")
    held = HeldAsyncStream("abc")
    (leader,) = await start(coalescer, 1, held)
    held.let(before)
    await let_run()
    leader.cancel()
    await let_run()
    assert coalescer._readers("k")[0] == 0
    (later,) = await start(coalescer, 1)
    held.let(3)
    await let_run()
    later.cancel()
    held.let()
    await let_run()
    assert await read(coalescer.stream("k", refused)) == ["a", "b", "c"]
    assert (held.calls, held.closed) == (1, 0)


async def test_a_reader_that_is_cancelled_before_it_has_begun_leads_nothing(coalescer):
    task = asyncio.create_task(read(coalescer.stream("k", refused)))
    task.cancel()
    await let_run()
    assert (task.cancelled(), coalescer.stats().calls) == (True, 0)


@pytest.mark.parametrize("rounds", range(8))
async def test_a_leader_may_be_cancelled_at_any_moment(coalescer, rounds):
    leader = asyncio.create_task(read(coalescer.stream("k", yields(*range(40)))))
    await let_run(rounds)
    leader.cancel()
    await let_run()
    assert leader.done()
    assert len(await read(coalescer.stream("k", yields("own")))) in {1, 40}
    assert coalescer.stats().in_flight == 0


# A pump that is cancelled.


@pytest.mark.parametrize("before", [0, 1])
async def test_a_pump_cancelled_from_outside(coalescer, before):
    """The leader is cancelled with it; who has no item yet starts over, others get an error of their own."""
    held = HeldAsyncStream("ab")
    leader, waiter, other = (
        asyncio.create_task(outcome(coalescer.stream("k", fn))) for fn in (held, yields("own"), refused)
    )
    await let_run()
    held.let(before)
    await let_run()
    held.task.cancel()
    (items, error), *others = await asyncio.gather(leader, waiter, other)
    assert items == ["a"][:before]
    assert isinstance(error, asyncio.CancelledError)
    if before:
        assert [each[0] for each in others] == [["a"]] * 2
        assert [type(each[1]) for each in others] == [SharedCallError] * 2
        assert others[0][1] is not others[1][1]
    else:
        assert others == [(["own"], None)] * 2
    assert (held.closed, coalescer.stats().in_flight) == (1, 0)


async def test_an_error_that_is_no_exception_is_the_pumps_when_its_leader_has_left(coalescer):
    held = HeldAsyncStream(error=Stop())
    leader, waiter = await start(coalescer, 2, held)
    leader.cancel()
    await let_run()
    waiter.cancel()
    await let_run()
    assert held.task.cancelled()
    held = HeldAsyncStream("a", error=Stop())
    leader = asyncio.create_task(read(coalescer.stream("k", held)))
    await let_run()
    waiter = asyncio.create_task(outcome(coalescer.stream("k", refused)))
    held.let()
    await let_run()
    leader.cancel()
    held.let()
    assert type((await waiter)[1]) is SharedCallError
    await let_run()
    assert isinstance(held.task.exception(), Stop)

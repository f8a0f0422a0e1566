"""`max_buffered`: how much a stream keeps, for whom, and what becomes of a reader that is too far behind."""

import asyncio

import pytest
from faces import refused
from loops import let_run
from upstreams import Reader

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, StreamLagError


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=60)


@pytest.fixture
def tasks():
    return AsyncBatchCoalescer(ttl_seconds=60)


def yields(*items):
    async def generate():
        for item in items:
            yield item

    return generate


# Threads.


def test_beyond_its_bound_a_stream_is_not_joined_any_more(coalescer):
    readers = [coalescer.stream("k", lambda: range(5), max_buffered=2) for _ in range(2)]
    assert [next(readers[0]), next(readers[0]), next(readers[1])] == [0, 1, 0]
    assert coalescer.stats().calls == 1
    assert next(readers[0]) == 2
    assert "k" not in coalescer
    newcomer = coalescer.stream("k", lambda: "new")
    assert next(newcomer) == "n"
    assert coalescer.stats().calls == 2
    assert [next(readers[1]), next(readers[1])] == [1, 2]
    assert [[next(reader), next(reader)] for reader in readers] == [[3, 4]] * 2
    assert [list(reader) for reader in readers] == [[], []]
    assert list(newcomer) == ["e", "w"]
    assert list(coalescer.stream("k", refused)) == ["n", "e", "w"]


def test_a_reader_that_is_too_far_behind_is_told_how_much_it_misses(coalescer):
    lagging, joined = (coalescer.stream("k", lambda: range(200), max_buffered=10) for _ in range(2))
    assert [next(lagging), next(joined)] == [0, 0]
    assert list(joined) == list(range(1, 200))
    with pytest.raises(StreamLagError, match=r"stream of 'k' is too far behind: 199 items") as caught:
        next(lagging)
    assert caught.value.missed == 199
    assert list(lagging) == []
    assert coalescer.stats().errors == 0


def test_a_reader_that_is_as_far_behind_as_the_log_is_long_gets_everything(coalescer):
    slow, fast = (coalescer.stream("k", lambda: range(50), max_buffered=10) for _ in range(2))
    assert next(fast) == next(slow) == 0
    for number in range(1, 11):
        assert next(fast) == number
    for number in range(1, 40):
        assert (next(slow), next(fast)) == (number, number + 10)


# Tasks.


async def test_a_leader_that_lags_is_told_so_though_upstream_has_failed(tasks):
    async def generate():
        for item in range(10):
            yield item
        raise LookupError

    stream = tasks.stream("k", generate, max_buffered=2)
    assert await anext(stream) == 0
    await let_run(60)
    with pytest.raises(StreamLagError) as caught:
        await anext(stream)
    assert caught.value.missed > 0


async def test_the_pump_is_never_blocked_by_a_reader(tasks):
    slow = tasks.stream("k", yields(*range(100)), max_buffered=4)
    assert await anext(slow) == 0
    fast = asyncio.create_task(Reader().read_in_task(tasks.stream("k", refused)))
    assert await fast == (list(range(100)), None)
    assert "k" not in tasks
    with pytest.raises(StreamLagError, match="too far behind"):
        await anext(slow)
    assert [item async for item in slow] == []


async def test_a_stream_that_is_to_finish_ends_when_nobody_can_ever_read_it():
    coalescer, steps = AsyncBatchCoalescer(on_abandoned="finish"), []

    async def generate():
        try:
            while True:
                yield 1
                await asyncio.sleep(0)
        finally:
            steps.append("closed")

    stream = coalescer.stream("k", generate, max_buffered=10)
    await anext(stream)
    await stream.aclose()
    assert "k" in coalescer
    await let_run(100)
    assert ("k" in coalescer, steps, coalescer.flights()) == (False, ["closed"], [])

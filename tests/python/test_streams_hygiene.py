"""Nothing is left behind by streams of tasks: no complaint of asyncio's, no task, no error that nobody has read."""

import asyncio
import gc
import weakref

import pytest
from faces import refused
from loops import let_run
from upstreams import HeldAsyncStream, Reader, Stop

from llm_batch_coalesce import AsyncBatchCoalescer


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def yields(*items, error=None):
    async def generate():
        for item in items:
            yield item
        if error is not None:
            raise error

    return generate


def start(coalescer, count, fn=refused):
    return [asyncio.create_task(Reader().read_in_task(coalescer.stream("k", fn))) for _ in range(count)]


def no_task_is_left():
    return asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("error", [None, LookupError, Stop])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_streams_that_end(complaints, coalescer, count, error):
    async def main():
        readers = start(coalescer, 5, yields(*range(count), error=error and error()))
        await asyncio.gather(*readers)
        await let_run()
        assert no_task_is_left()

    complaints.run(main)
    assert complaints.all == []


@pytest.mark.parametrize("way", ["cancel", "aclose", "drop", "loop ends"])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_streams_that_are_left(complaints, coalescer, way, count):
    async def main():
        held = HeldAsyncStream(range(200))
        readers = start(coalescer, 3, held)
        stream = coalescer.stream("k", refused)
        await let_run()
        if count:
            held.let(count)
            await anext(stream)
        await let_run()
        if way == "loop ends":
            return
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        if way == "aclose":
            await stream.aclose()
        elif way == "drop":
            del stream
        elif count:
            reading = asyncio.create_task(Reader(leave_after=1_000).read_in_task(stream))
            await let_run()
            reading.cancel()
            await reading
        await let_run()
        assert held.task.cancelled()
        assert held.closed == 1
        assert no_task_is_left()

    complaints.run(main)
    assert complaints.all == []
    assert coalescer.stats().in_flight == 0


@pytest.mark.parametrize("error", [None, LookupError])
def test_a_stream_that_ends_when_its_leader_has_left(complaints, coalescer, error):
    async def main():
        held = HeldAsyncStream("ab", error and error())
        leader, waiter = start(coalescer, 2, held)
        await let_run()
        leader.cancel()
        await leader
        held.let(3)
        assert (await waiter)[0] == ["a", "b"]
        await let_run()
        assert no_task_is_left()

    complaints.run(main)
    assert complaints.all == []


@pytest.mark.parametrize("error", [None, LookupError])
def test_a_stream_that_finishes_without_readers(complaints, error):
    async def main():
        coalescer = AsyncBatchCoalescer(on_abandoned="finish")
        held = HeldAsyncStream("ab", error and error())
        (leader,) = start(coalescer, 1, held)
        await let_run()
        leader.cancel()
        await leader
        held.let(3)
        await let_run()
        assert "k" in coalescer
        items, failure = await Reader().read_in_task(coalescer.stream("k", refused))
        assert (items, type(failure)) == (["a", "b"], error or type(None))
        assert no_task_is_left()

    complaints.run(main)
    assert complaints.all == []


def test_a_stream_that_was_never_read(complaints, coalescer):
    async def main():
        coalescer.stream("k", refused)
        await coalescer.stream("k", refused).aclose()
        await let_run()

    complaints.run(main)
    assert complaints.all == []


async def test_a_pump_that_nobody_else_holds_is_not_collected_in_the_middle(coalescer):
    futures = []

    async def generate():
        future = asyncio.get_running_loop().create_future()
        futures.append(weakref.ref(future))
        await future
        yield 1

    readers = start(coalescer, 2, generate)
    await let_run()
    gc.collect()
    futures[0]().set_result(None)
    assert await asyncio.gather(*readers) == [([1], None)] * 2


def test_a_pump_that_is_cancelled(complaints, coalescer):
    async def main():
        held = HeldAsyncStream("ab")
        readers = start(coalescer, 3, held)
        await let_run()
        held.let()
        await let_run()
        held.task.cancel()
        await asyncio.gather(*readers)
        assert no_task_is_left()

    complaints.run(main)
    assert complaints.all == []

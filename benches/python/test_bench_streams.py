"""What a shared stream costs for each reader."""

import asyncio
import time

import pytest

from llm_batch_coalesce import AsyncBatchCoalescer

READERS = 1_000
ITEMS = 1_000


async def tokens(burst):
    """Yields items as a provider sends them: so many at once, then nothing until the loop has looked at its sockets."""
    for number in range(ITEMS):
        yield number
        if number % burst == 0:
            await asyncio.sleep(0)


async def share(burst):
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)

    async def read():
        count = 0
        async for _ in coalescer.stream("k", lambda: tokens(burst)):
            count += 1
        return count

    start = time.perf_counter()
    counts = await asyncio.gather(*[read() for _ in range(READERS)])
    seconds = time.perf_counter() - start
    assert counts == [ITEMS] * READERS
    return seconds


async def queue(burst):
    queues = [asyncio.Queue() for _ in range(READERS)]

    async def read(items):
        count = 0
        while await items.get() is not None:
            count += 1
        return count

    async def feed():
        async for item in tokens(burst):
            for items in queues:
                items.put_nowait(item)
        for items in queues:
            items.put_nowait(None)

    start = time.perf_counter()
    counts, _ = await asyncio.gather(asyncio.gather(*[read(items) for items in queues]), feed())
    seconds = time.perf_counter() - start
    assert counts == [ITEMS] * READERS
    return seconds


@pytest.mark.parametrize("burst", [1, 10])
def test_readers_against_queues(compare, burst):
    """1,000 readers of one stream of 1,000 items / 1,000 asyncio.Queue consumers"""
    compare(lambda: asyncio.run(share(burst)), lambda: asyncio.run(queue(burst)), target=0.5, rounds=3)

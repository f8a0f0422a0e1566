"""What a caller pays that finds its outcome retained."""

import asyncio
import functools
import itertools
import sys
import threading
import time

import pytest

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

LOOPS = 200_000


def times(function, key, fn, count=LOOPS):
    """Calls as often as asked with as little as possible around each."""

    def run():
        for _ in itertools.repeat(None, count):
            function(key, fn)

    return run


def value():
    return "value"


def test_hit_against_lru_cache(compare):
    """hit, one thread / functools.lru_cache hit with the same two arguments"""
    cached = functools.lru_cache(lambda key, fn: fn())
    coalescer = BatchCoalescer(ttl_seconds=3_600.0)
    compare(
        times(coalescer.get_or_call, "define:alpha", value),
        times(cached, "define:alpha", value),
        target=0.9,
        unit_count=LOOPS,
    )


def test_hit_against_the_pure_version(compare, pure):
    """hit, one thread / hit of the pure-Python version"""
    coalescer, model = BatchCoalescer(ttl_seconds=3_600.0), pure(ttl_seconds=3_600.0)
    compare(
        times(coalescer.get_or_call, "define:alpha", value, 50_000),
        times(model.get_or_call, "define:alpha", value, 50_000),
        target=0.1,
        unit_count=50_000,
    )


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="hits run in parallel without a GIL only")
def test_two_threads_on_one_key_against_lru_cache(compare):
    """hits of 2 threads on one key (equal key objects, one value), time / lru_cache"""
    shared = "".join(["shared ", "value"])
    cached = functools.lru_cache(lambda key, fn: shared)
    coalescer = BatchCoalescer(ttl_seconds=3_600.0)
    compare(
        lambda: both(lambda: coalescer.get_or_call),
        lambda: both(lambda: cached),
        target=1.0,
        rounds=11,
        unit_count=2_000_000,
    )


def both(get):
    """Seconds that two threads take for a million calls each, both running."""
    barrier = threading.Barrier(3)

    def work():
        function, key, fn = get(), "".join(["define", ":alpha"]), value
        function(key, fn)
        barrier.wait()
        for _ in itertools.repeat(None, 1_000_000):
            function(key, fn)
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return seconds


def test_async_hit_against_an_empty_coroutine(compare):
    """async hit / awaiting an empty coroutine"""
    coalescer = AsyncBatchCoalescer(ttl_seconds=3_600.0)

    async def empty(key, fn):
        return "value"

    async def fill():
        return "value"

    async def many(function):
        start = time.perf_counter()
        for _ in itertools.repeat(None, LOOPS):
            await function("define:alpha", fill)
        return time.perf_counter() - start

    compare(
        lambda: asyncio.run(many(coalescer.get_or_call)),
        lambda: asyncio.run(many(empty)),
        target=2.5,
        unit_count=LOOPS,
    )

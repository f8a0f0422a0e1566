"""What a call costs beside itself: to lead, and to wake those that wait."""

import asyncio
import sys
import threading
import time

import pytest

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

WAKE_TARGET = {True: 0.35, False: 0.25}


def test_miss_against_a_call_and_a_dict(compare):
    """miss with a callable that returns at once / calling it and storing in a dict"""
    count = 20_000
    keys = [f"define:{number}" for number in range(count)]

    def fn():
        return "value"

    def ours():
        coalescer = BatchCoalescer(ttl_seconds=3_600.0)
        get_or_call = coalescer.get_or_call
        start = time.perf_counter()
        for key in keys:
            get_or_call(key, fn)
        return time.perf_counter() - start

    def plain():
        store = {}
        start = time.perf_counter()
        for key in keys:
            store[key] = fn()
        return time.perf_counter() - start

    compare(ours, plain, target=4.0, rounds=21, unit_count=count)


@pytest.fixture
def wake_target():
    return WAKE_TARGET[getattr(sys, "_is_gil_enabled", lambda: True)()]


def wake(wait, release, waiting, count=1_000):
    """Seconds from `release` until the last of the waiting threads is back in Python."""
    back = []
    # They stay until all are back: the end of a thread costs more than its waking.
    hold = threading.Lock()
    hold.acquire()

    def work():
        wait()
        back.append(time.perf_counter())
        with hold:
            pass

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    while waiting() < count:
        time.sleep(0.001)
    # All of them are to sleep in the kernel, not only to be on their way there.
    time.sleep(0.02)
    start = time.perf_counter()
    release()
    while len(back) < count:
        time.sleep(0.001)
    hold.release()
    for thread in threads:
        thread.join()
    return max(back) - start


def test_waking_threads_against_an_event(compare, wake_target):
    """1,000 waiting threads, until the last is back in Python / threading.Event"""

    def ours():
        coalescer = BatchCoalescer(ttl_seconds=0)
        entered, go = threading.Event(), threading.Event()

        def fn():
            entered.set()
            go.wait()

        leader = threading.Thread(target=coalescer.get_or_call, args=("k", fn))
        leader.start()
        entered.wait()
        seconds = wake(lambda: coalescer.get_or_call("k", fn), go.set, lambda: coalescer._waiters("k"))
        leader.join()
        return seconds

    def event():
        go = threading.Event()
        return wake(go.wait, go.set, lambda: len(go._cond._waiters))

    compare(ours, event, target=wake_target, rounds=9)


def test_ten_thousand_tasks_against_one_future(compare):
    """10,000 tasks on one key / tasks that await one shared Future"""
    count = 10_000

    async def ours():
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        go = asyncio.get_running_loop().create_future()

        async def fn():
            return await go

        start = time.perf_counter()
        tasks = [asyncio.create_task(coalescer.get_or_call("k", fn)) for _ in range(count)]
        await asyncio.sleep(0)
        go.set_result(None)
        for task in tasks:
            await task
        return time.perf_counter() - start

    async def future():
        go = asyncio.get_running_loop().create_future()

        async def wait():
            return await go

        start = time.perf_counter()
        tasks = [asyncio.create_task(wait()) for _ in range(count)]
        await asyncio.sleep(0)
        go.set_result(None)
        for task in tasks:
            await task
        return time.perf_counter() - start

    compare(lambda: asyncio.run(ours()), lambda: asyncio.run(future()), target=1.25, unit_count=count)

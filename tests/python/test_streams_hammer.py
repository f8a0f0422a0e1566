"""Streams under readers of all kinds that come and go as they like."""

import asyncio
import concurrent.futures
import random

from loops import wait_until
from upstreams import Reader, Readers

from llm_batch_coalesce import BatchCoalescer, SharedCallError


def test_thirty_two_threads_that_come_and_go_as_they_like(crew):
    coalescer = BatchCoalescer(ttl_seconds=0.001)
    made, closed = [], []

    def generate():
        number = len(made)
        made.append(number)
        try:
            yield from range(100)
        finally:
            closed.append(number)

    def work(seed):
        numbers = random.Random(seed)
        for _ in range(30):
            stream = coalescer.stream(numbers.randrange(3), generate, max_buffered=numbers.choice([None, 200]))
            if numbers.random() < 0.1:
                coalescer.forget(numbers.randrange(3))
            most = numbers.choice([1, 5, 99, 1_000])
            with stream:
                got = [item for item, _ in zip(stream, range(most), strict=False)]
            assert got == list(range(min(most, 100)))

    crew.start(32, work).join()
    wait_until(lambda: len(closed) == len(made))
    stats = coalescer.stats()
    assert (stats.calls, stats.in_flight, stats.errors) == (len(made), 0, 0)
    assert stats.calls + stats.joined + stats.hits == 32 * 30


class Yields:
    """Makes upstreams of sixty items, a few of which fail, for threads and tasks."""

    def __init__(self):
        self.made, self.closed = [], []

    def __call__(self):
        self.made.append(None)
        fails = len(self.made) % 4 == 0
        try:
            for item in range(60):
                if item == 50 and fails:
                    raise LookupError
                yield item
        finally:
            self.closed.append(None)

    async def for_tasks(self):
        for item in (items := self()):
            if item % 10 == 0:
                await asyncio.sleep(0)
            try:
                yield item
            except GeneratorExit:
                items.close()
                raise


def check(items, error, most):
    assert items == list(range(len(items)))
    assert error is None or isinstance(error, (LookupError, SharedCallError, asyncio.CancelledError)), error
    assert error is not None or len(items) == min(60, most)


def test_threads_and_tasks_that_come_and_go_as_they_like():
    coalescer = BatchCoalescer(ttl_seconds=0.001, private_errors=LookupError)
    tasks, yields = coalescer.as_async(), Yields()

    async def work_in_task(seed):
        numbers = random.Random(seed)
        for _ in range(30):
            most = numbers.choice([1, 5, 59, 100])
            stream = tasks.stream(numbers.randrange(3), yields.for_tasks)
            reading = asyncio.create_task(Reader(leave_after=most).read_in_task(stream))
            await asyncio.sleep(0)
            if numbers.random() < 0.2:
                reading.cancel()
            check(*await reading, most)

    def work(seed):
        numbers = random.Random(seed)
        for _ in range(30):
            most = numbers.choice([1, 5, 59, 100])
            check(*Reader(leave_after=most).read(coalescer.stream(numbers.randrange(3), yields)), most)

    with Readers(3) as readers:
        asked = [readers.loops[number % 3].start(work_in_task(number)) for number in range(9)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
        for each in asked:
            each.result()
        wait_until(lambda: coalescer.stats().in_flight == 0 and len(yields.closed) == len(yields.made))

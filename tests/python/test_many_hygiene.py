"""`get_or_call_many` of tasks: what a signal or a cancellation at a bad moment does, and what is left behind."""

import asyncio
import gc
import signal
import weakref

import pytest
from batches import named
from faces import outcomes
from loops import PATIENCE, LoopThread, let_run, wait_for_waiters
from stores import AsyncStore

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, MissingKeysError

INF = float("inf")


class WatchedError(Exception):
    """Is watched."""


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=INF)


async def own():
    return "own"


async def ended(*tasks):
    """The results of tasks, or their errors."""
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def started(coroutine):
    """A task that has run as far as it gets."""
    task = asyncio.create_task(coroutine)
    await let_run()
    return task


# Interrupts.


class Interrupt(KeyboardInterrupt):
    """What the signal's handler raises."""


class Interrupting(asyncio.SelectorEventLoop):
    """A loop that is hit by a signal when it is told of something, counted from `hit` on."""

    hits, told = 0, 0

    def _tell(self):
        self.told += 1
        if self.told == self.hits:
            signal.raise_signal(signal.SIGUSR1)

    def call_soon(self, *args, **options):
        handle = super().call_soon(*args, **options)
        self._tell()
        return handle

    def call_soon_threadsafe(self, *args, **options):
        handle = super().call_soon_threadsafe(*args, **options)
        self._tell()
        return handle

    def hit(self, number):
        self.hits, self.told = number, 0


@pytest.fixture
def interrupting():
    def handle(*_):
        raise Interrupt

    before, loop = signal.signal(signal.SIGUSR1, handle), Interrupting()
    yield loop
    loop.close()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("error", [None, LookupError()])
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupt_while_the_loops_of_waiters_are_told_is_for_the_thread_that_leads(interrupting, number, error):
    threads, place, asked = BatchCoalescer(0), LoopThread(interrupting), []

    def call(missing):
        asked.extend(place.start(threads.as_async().get_or_call(key, own)) for key in missing)
        for key in missing:
            wait_for_waiters(threads, key, 1)
        interrupting.hit(number)
        if error is not None:
            raise error
        return named(missing)

    try:
        with pytest.raises(Interrupt):
            threads.get_or_call_many(["a", "b"], call)
        interrupting.hit(0)
        results = outcomes(asked)
        assert results == ["of a", "of b"] if error is None else [type(each) for each in results] == [LookupError] * 2
        assert threads.stats().in_flight == 0
    finally:
        interrupting.hit(0)
        place.end()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("stored", [(), "a", "ab"])
def test_an_interrupt_while_the_waiters_of_a_key_are_woken_is_not_swallowed(interrupting, number, stored):
    """The leader gets it, and nobody else."""
    go = asyncio.Event()

    class Store(AsyncStore):
        async def get(self, key):
            if stored and not go.is_set():
                await go.wait()
                interrupting.hit(number)
            return await super().get(key)

    async def call(missing):
        if not stored:
            await go.wait()
            interrupting.hit(number)
        return named(missing)

    async def begin():
        asked = [await started(coalescer.get_or_call_many(["a", "b"], call))]
        return asked + [await started(coalescer.get_or_call(key, own)) for key in "ab"]

    coalescer = AsyncBatchCoalescer(0, store=Store(**{key: f"of {key}" for key in stored}))
    asked = interrupting.run_until_complete(begin())
    go.set()
    with pytest.raises(Interrupt):
        interrupting.run_until_complete(asyncio.wait(asked))
    interrupting.hit(0)
    interrupting.run_until_complete(ended(*asked))
    assert type(asked[0].exception()) is Interrupt
    assert asked[1].result() == "of a"
    # What was called for is shared; what was not is called for by the next.
    assert asked[2].result() == ("own" if number == 1 and stored == "a" else "of b")
    assert coalescer.stats().in_flight == 0


def test_an_interrupt_in_a_call_whose_leader_has_gone_is_raised_in_its_task(interrupting):
    go, coalescer = asyncio.Event(), AsyncBatchCoalescer(0)

    async def call(missing):
        await go.wait()
        raise Interrupt

    async def begin():
        leader = await started(coalescer.get_or_call_many(["a", "b"], call))
        waiter = await started(coalescer.get_or_call("a", own))
        leader.cancel()
        await asyncio.wait([leader])
        return waiter

    waiter = interrupting.run_until_complete(begin())
    go.set()
    with pytest.raises(Interrupt):
        interrupting.run_until_complete(asyncio.wait([waiter]))
    interrupting.run_until_complete(ended(waiter))
    assert waiter.result() == "own"


async def test_a_call_that_is_cancelled_before_it_has_begun_takes_the_callers_of_its_loop_with_it():
    coalescer, loop = AsyncBatchCoalescer(INF), asyncio.get_running_loop()

    def cancel_call():
        (call,) = coalescer._tasks
        call.cancel()

    tasks = [asyncio.create_task(coalescer.get_or_call_many(["a", "b"], lambda missing: asyncio.Event().wait()))]
    tasks.append(asyncio.create_task(coalescer.get_or_call("a", own)))
    # Before 3.12 the call has a task that has not begun by then.
    loop.call_soon(cancel_call)
    assert [type(result) for result in await ended(*tasks)] == [asyncio.CancelledError] * 2
    assert (len(coalescer), coalescer.stats().in_flight) == (0, 0)
    assert await coalescer.get_or_call("a", own) == "own"


# What is left behind.


@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("error", [WatchedError, MissingKeysError])
async def test_an_error_of_a_batch_leaves_no_cycle(error, rounds):
    coalescer, watched = AsyncBatchCoalescer(0), []

    class Thing:
        pass

    async def call(missing):
        for _ in range(rounds):
            await asyncio.sleep(0)
        if error is WatchedError:
            raise WatchedError
        return {}

    async def ask():
        # Alive as long as this frame is, which the error's traceback holds.
        thing = Thing()
        watched.append(weakref.ref(thing))
        await coalescer.get_or_call_many(["a", "b"], call)

    gc.disable()
    try:
        task = asyncio.create_task(ask())
        await asyncio.wait([task])
        assert type(task.exception()) is error
        del task
        with pytest.raises(error):
            await ask()
        await let_run()
        assert [each() for each in watched] == [None, None]
    finally:
        gc.enable()


async def test_a_call_that_nobody_waits_for_is_not_collected_before_it_has_ended():
    coalescer, watched = AsyncBatchCoalescer(INF, on_abandoned="finish"), []

    async def call(missing):
        # Held by this frame alone, which is held by the task.
        future = asyncio.get_running_loop().create_future()
        watched.append(weakref.ref(future))
        return await future

    leader = await started(coalescer.get_or_call_many(["a", "b"], call))
    leader.cancel()
    await asyncio.wait([leader])
    del leader
    for _ in range(3):
        gc.collect()
        await let_run()
    watched[0]().set_result(["A", "B"])
    await let_run()
    assert (coalescer.peek("a"), coalescer.peek("b")) == ("A", "B")
    assert not coalescer._tasks


async def test_a_batch_that_ends_at_once_suspends_no_more_than_it_must(coalescer):
    async def at_once(missing):
        return missing

    async def ask():
        return await coalescer.get_or_call_many(["a", "b"], at_once)

    assert await ended(*(ask() for _ in range(3))) == [{"a": "a", "b": "b"}] * 3
    # Retained, it does not suspend at all.
    with pytest.raises(StopIteration) as info:
        ask().send(None)
    assert info.value.value == {"a": "a", "b": "b"}

"""`get_or_call_many` of tasks: cancellation, contexts, event loops."""

import asyncio
import contextvars

import pytest
from batches import HeldBatchInTask, named, nobody
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters

from llm_batch_coalesce import (
    AsyncBatchCoalescer,
    CallResultError,
    DeadlockError,
    RecursiveCallError,
)

INF = float("inf")


class LimitError(Exception):
    """Is private."""


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=INF, private_errors=LimitError)


@pytest.fixture
def held():
    batch = HeldBatchInTask()
    yield batch
    batch.release()


@pytest.fixture
def loops():
    made = []

    def make(count):
        made.extend(LoopThread() for _ in range(count))
        return made[-count:]

    yield make
    for loop in made:
        loop.end()


def refused():
    raise AssertionError("nobody may call this")


async def own():
    return "own"


async def answer(missing):
    return named(missing)


async def ended(*tasks):
    """The results of tasks, or their errors."""
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def started(coroutine):
    """A task that has run as far as it gets."""
    task = asyncio.create_task(coroutine)
    await let_run()
    return task


async def cancelled(task):
    task.cancel()
    await asyncio.wait([task])
    await let_run()
    assert task.cancelled()


# Cancelled callers.


async def test_whoever_is_cancelled_leaves_alone(coalescer, held):
    leader = await started(coalescer.get_or_call_many(["a", "b"], held))
    waiters = [await started(coalescer.get_or_call(key, refused)) for key in "ab"]
    other = await started(coalescer.get_or_call_many(["b", "a"], nobody))
    for task in (leader, waiters[0]):
        await cancelled(task)
    assert not held.cancelled.is_set()
    held.release()
    assert await ended(waiters[1], other) == ["of b", {"b": "of b", "a": "of a"}]
    assert coalescer.peek("a") == "of a"
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.cancelled) == (2, 3, 1)


@pytest.mark.parametrize("last", ["a", "b"])
async def test_a_call_goes_on_while_any_key_has_a_caller_and_is_cancelled_with_the_last(coalescer, held, last):
    leader = await started(coalescer.get_or_call_many(["a", "b", "c"], held))
    waiters = {key: await started(coalescer.get_or_call(key, refused)) for key in "ab"}
    await cancelled(leader)
    await cancelled(waiters.pop("b" if last == "a" else "a"))
    assert not held.cancelled.is_set()
    # What nobody waits for cannot be joined any more, but what somebody waits for can.
    assert [key in coalescer for key in "abc"] == [last == "a", last == "b", False]
    second = await started(coalescer.get_or_call(last, refused))
    await cancelled(waiters[last])
    assert not held.cancelled.is_set()
    await cancelled(second)
    assert held.cancelled.is_set()
    assert coalescer.stats().in_flight == 0
    assert await coalescer.get_or_call_many(["a", "b"], answer) == {"a": "of a", "b": "of b"}


async def test_an_abandoned_key_that_is_led_anew_keeps_the_newer_value(coalescer, held):
    leader = await started(coalescer.get_or_call_many(["a", "b"], held))
    waiter = await started(coalescer.get_or_call("b", refused))
    await cancelled(leader)
    assert await coalescer.get_or_call("a", own) == "own"
    held.release()
    assert await waiter == "of b"
    assert coalescer.peek("a") == "own"


async def test_a_call_that_finishes_fills_the_keys_though_all_have_left(held):
    coalescer = AsyncBatchCoalescer(INF, on_abandoned="finish")
    await cancelled(await started(coalescer.get_or_call_many(["a", "b"], held)))
    assert not held.cancelled.is_set()
    joined = await started(coalescer.get_or_call("a", refused))
    held.release()
    assert await joined == "of a"
    assert coalescer.peek("b") == "of b"


@pytest.mark.parametrize("served", [["a"], ["b"], ["a", "c"]], ids=repr)
async def test_a_call_of_which_the_store_has_served_some_is_cancelled_when_all_have_left(held, served):
    coalescer = AsyncBatchCoalescer(INF, store=dict.fromkeys(served, "stored"))
    leader = await started(coalescer.get_or_call_many(["a", "b", "c"], held))
    assert [key for key in "abc" if coalescer.peek(key)] == served
    await cancelled(leader)
    assert held.cancelled.is_set()
    assert coalescer.stats().in_flight == 0


async def test_a_caller_that_is_cancelled_while_it_waits_leaves_its_own_values(coalescer):
    other = HeldCall("other")
    leader = await started(coalescer.get_or_call("x", other))
    caller = await started(coalescer.get_or_call_many(["a", "x"], answer))
    assert coalescer.peek("a") == "of a"
    await cancelled(caller)
    assert coalescer._waiters("x") == 0
    other.release()
    assert await leader == "other"
    assert coalescer.stats().cancelled == 1


async def test_a_joined_call_lives_on_a_batch_that_is_busy(coalescer, held):
    other = HeldCall("other")
    leader = await started(coalescer.get_or_call("x", other))
    caller = await started(coalescer.get_or_call_many(["x", "a"], held))
    await cancelled(leader)
    assert not other.cancelled.is_set()
    await cancelled(caller)
    assert other.cancelled.is_set()
    assert held.cancelled.is_set()


async def test_a_batch_whose_call_is_cancelled_from_outside_is_cancelled_with_it(coalescer, held, loops):
    (elsewhere,) = loops(1)
    leader = await started(coalescer.get_or_call_many(["a", "b"], held))
    near = await started(coalescer.get_or_call("a", refused))
    far = elsewhere.start(coalescer.get_or_call_many(["b"], answer))
    wait_for_waiters(coalescer, "b", 1)
    held.task.cancel()
    results = await ended(leader, near, asyncio.to_thread(far.result))
    assert [type(result) for result in results[:2]] == [asyncio.CancelledError] * 2
    assert results[2] == {"b": "of b"}
    assert "a" not in coalescer


def test_waiters_elsewhere_take_over_when_the_loop_of_a_batch_is_closed(coalescer, held, loops):
    first, second = loops(2)
    first.start(coalescer.get_or_call_many(["a", "b"], held))
    assert held.started.wait(PATIENCE)
    waiting = second.start(coalescer.get_or_call_many(["b", "a"], answer))
    wait_for_waiters(coalescer, "b", 1)
    first.close()
    assert waiting.result() == {"b": "of b", "a": "of a"}
    # Who comes later finds it out itself.
    first, second = loops(2)
    again = HeldBatchInTask()
    first.start(coalescer.get_or_call_many(["c", "d"], again))
    assert again.started.wait(PATIENCE)
    first.close()
    assert second.start(coalescer.get_or_call_many(["d", "c"], answer)).result() == {"d": "of d", "c": "of c"}


# What tasks cannot share, and what calls are told.


@pytest.mark.parametrize("result", [{"a": 1, "b": 2}, [1, 2], None])
async def test_a_callable_that_returns_no_awaitable_is_refused(coalescer, result):
    with pytest.raises(CallResultError, match=r"must return an awaitable.* use BatchCoalescer for plain functions"):
        await coalescer.get_or_call_many(["a", "b"], lambda missing: result)
    assert len(coalescer) == 0


async def test_an_awaitable_of_any_kind_will_do(coalescer):
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, ["A", "B"])
    assert await coalescer.get_or_call_many(["a", "b"], lambda missing: future) == {"a": "A", "b": "B"}


async def test_a_call_that_asks_for_a_key_of_its_own_batch_is_told(coalescer):
    async def call(missing):
        for ask in (coalescer.get_or_call("b", refused), coalescer.get_or_call_many(["other", "a"], nobody)):
            with pytest.raises(RecursiveCallError):
                await asyncio.create_task(ask)
        assert "other" not in coalescer
        assert await coalescer.get_or_call_many(["c"], answer) == {"c": "of c"}
        return missing

    async with asyncio.timeout(PATIENCE):
        assert await coalescer.get_or_call_many(["a", "b"], call) == {"a": "a", "b": "b"}
    # Who is refused is no request, nor are the keys before the one that it is refused for.
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.cancelled, stats.in_flight) == (3, 0, 0, 0)


@pytest.mark.parametrize("many", [True, False])
async def test_a_batch_that_would_close_a_circle_is_told(coalescer, many):
    """Each does its own first; then the one that asks last is told."""
    b_is_led = asyncio.Event()

    async def wait_for_b(missing):
        await b_is_led.wait()
        return [await coalescer.get_or_call("b", refused)]

    async def wait_for_a(missing):
        b_is_led.set()
        await let_run()
        assert coalescer._waiters("b") == 1
        ask = coalescer.get_or_call_many(["c", "a"], answer) if many else coalescer.get_or_call("a", refused)
        with pytest.raises(DeadlockError, match="'a'"):
            await ask
        return ["B"]

    first = await started(coalescer.get_or_call_many(["a"], wait_for_b))
    second = await started(coalescer.get_or_call_many(["b"], wait_for_a))
    assert await ended(first, second) == [{"a": "B"}, {"b": "B"}]
    assert coalescer.peek("c") == ("of c" if many else None)
    # Who is refused a wait is no request.
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.hits, stats.cancelled) == (3 if many else 2, 1, 0, 0)


async def test_a_call_runs_in_a_copy_of_its_leaders_context(coalescer):
    variable = contextvars.ContextVar("variable")
    variable.set("leader's")

    async def call(missing):
        await asyncio.sleep(0)
        seen = variable.get()
        variable.set("call's")
        return [seen] * len(missing)

    assert await coalescer.get_or_call_many(["a"], call) == {"a": "leader's"}
    assert variable.get() == "leader's"

"""Nothing is complained about, by asyncio or the interpreter, however calls end and whatever they return."""

import asyncio
import threading
import types
import weakref

import pytest
from complaints import collect
from loops import PATIENCE, HeldCall, LoopThread, ask, let_run, wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, CallResultError, CoalesceError


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


async def own():
    return "own"


# That the rest of this file could fail.


def test_a_future_whose_error_nobody_reads_is_heard(complaints):
    async def main():
        asyncio.get_running_loop().create_future().set_exception(LookupError())

    complaints.run(main)
    assert complaints.all == ["loop: Future exception was never retrieved"]


def test_a_task_whose_error_nobody_reads_is_heard(complaints):
    async def main():
        task = asyncio.create_task(asyncio.wait_for(refuse(), PATIENCE))
        await let_run()
        assert task.done()

    async def refuse():
        raise LookupError

    complaints.run(main)
    assert complaints.all == ["loop: Task exception was never retrieved"]


def test_a_coroutine_that_nobody_awaits_is_heard(complaints):
    async def main():
        own()

    complaints.run(main)
    assert complaints.all == [f"warning: coroutine '{own.__qualname__}' was never awaited"]


def test_a_task_that_is_destroyed_is_heard(complaints):
    async def wait_for_nothing():
        await asyncio.get_running_loop().create_future()

    async def main():
        asyncio.create_task(wait_for_nothing())  # noqa: RUF006 - on purpose
        await let_run()
        collect()

    complaints.run(main)
    assert complaints.all == ["loop: Task was destroyed but it is pending!"]


# Calls that end in any way.


async def succeed():
    await let_run(2)
    return "value"


async def succeed_at_once():
    return "value"


async def fail():
    await let_run(2)
    raise LookupError


async def fail_at_once():
    raise LookupError


def fail_before():
    raise LookupError


async def leave():
    await let_run(2)
    raise GeneratorExit


async def leave_at_once():
    raise GeneratorExit


async def be_cancelled():
    await let_run(2)
    raise asyncio.CancelledError


async def be_cancelled_at_once():
    raise asyncio.CancelledError


async def be_slow_to_stop():
    try:
        await let_run(100)
    finally:
        await let_run(2)


async def fail_when_stopped():
    try:
        await let_run(100)
    except asyncio.CancelledError:
        raise LookupError from None


def give_nothing_to_await():
    return "value"


ENDINGS = [
    succeed,
    succeed_at_once,
    fail,
    fail_at_once,
    fail_before,
    leave,
    leave_at_once,
    be_cancelled,
    be_cancelled_at_once,
    be_slow_to_stop,
    fail_when_stopped,
    give_nothing_to_await,
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_nothing_is_complained_about_however_a_call_ends(complaints, ending):
    async def main():
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        await asyncio.gather(*(coalescer.get_or_call("k", ending) for _ in range(4)), return_exceptions=True)
        await let_run()
        assert len(coalescer) == 0

    complaints.run(main)
    assert complaints.all == []


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
@pytest.mark.parametrize("who", ["leader", "waiter", "callers", "everybody", "call"])
def test_nothing_is_complained_about_whoever_is_cancelled_at_whatever_moment(complaints, ending, who):
    async def cancel_after(rounds):
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        known = asyncio.all_tasks()
        callers = [asyncio.create_task(coalescer.get_or_call("k", ending)) for _ in range(3)]
        await let_run(rounds)
        calls = asyncio.all_tasks() - known - set(callers)
        cancelled = {
            "leader": callers[:1],
            "waiter": callers[1:2],
            "callers": callers,
            "everybody": [*callers, *calls],
            "call": calls,
        }[who]
        for task in cancelled:
            task.cancel()
        # Longer than the slowest ending takes.
        await let_run(150)
        assert [task for task in callers if not task.done()] == []
        await asyncio.gather(*callers, return_exceptions=True)
        assert len(coalescer) == 0
        # A GeneratorExit of a call that has lost its leader is the call's own, and somebody has to look at it.
        for call in calls:
            if call.done() and not call.cancelled():
                call.exception()

    async def main():
        for rounds in range(9):
            await cancel_after(rounds)

    complaints.run(main)
    assert complaints.all == []


# What is no Exception is rightly heard when its leader has just been cancelled: the call's task raises it on.
@pytest.mark.parametrize(
    "ending", [ending for ending in ENDINGS if ending is not leave_at_once], ids=lambda ending: ending.__name__
)
def test_nothing_is_complained_about_when_asyncio_run_returns_with_calls_pending(complaints, ending):
    async def main():
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        callers.extend(asyncio.create_task(coalescer.get_or_call("k", ending)) for _ in range(3))
        await asyncio.sleep(0)

    callers = []
    complaints.run(main)
    assert len(callers) == 3
    assert all(caller.done() for caller in callers)
    for caller in callers:
        if not caller.cancelled():
            # An error from before the end is the caller's own to read.
            caller.exception()
    del caller
    callers.clear()
    collect()
    assert complaints.all == []


def test_nothing_is_complained_about_when_loops_share_an_error_and_end(complaints):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall(error=LookupError())
    threads = [LoopThread() for _ in range(3)]
    for thread in threads:
        thread.loop.set_exception_handler(complaints.in_loop)
    asked = [ask(coalescer, thread, call) for thread in threads]
    asked[1].cancel()
    wait_for_waiters(coalescer, "k", 1)
    call.release()
    for task in (asked[0], asked[2]):
        with pytest.raises(LookupError):
            task.result()
    for thread in threads:
        thread.end()
    del asked, thread, threads, task
    collect()
    assert complaints.all == []


async def test_a_call_that_only_the_coalescer_holds_is_not_collected(coalescer):
    """Its leader has gone, and what it waits for is known to nobody else."""
    gates = []

    async def call():
        gate = asyncio.get_running_loop().create_future()
        gates.append(weakref.ref(gate))
        return await gate

    leader = asyncio.create_task(coalescer.get_or_call("k", call))
    await let_run()
    waiter = asyncio.create_task(coalescer.get_or_call("k", refused))
    await let_run()
    leader.cancel()
    await let_run()
    del leader
    collect()
    gates[0]().set_result("value")
    assert await waiter == "value"


# What fn may return.


def make_coroutine():
    return own()


def make_future():
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, "own")
    return future


def make_done_future():
    future = asyncio.get_running_loop().create_future()
    future.set_result("own")
    return future


def make_task():
    return asyncio.create_task(own())


def make_gathering():
    async def first():
        return (await asyncio.gather(own(), own()))[0]

    return asyncio.ensure_future(first())


class Awaitable:
    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return "own"


@types.coroutine
def make_generator_coroutine():
    yield
    return "own"


class AwaitableAtOnce:
    def __await__(self):
        return iter(())


AWAITABLES = [
    make_coroutine,
    make_future,
    make_done_future,
    make_task,
    make_gathering,
    Awaitable,
    make_generator_coroutine,
]


@pytest.mark.parametrize("fn", AWAITABLES, ids=lambda fn: fn.__name__)
def test_fn_may_return_anything_that_can_be_awaited(complaints, fn):
    async def main():
        coalescer = AsyncBatchCoalescer(ttl_seconds=60)
        return await asyncio.gather(*(coalescer.get_or_call("k", fn) for _ in range(3)))

    assert complaints.run(main) == ["own"] * 3
    assert complaints.all == []


def test_fn_may_return_an_object_that_has_nothing_to_wait_for(complaints, coalescer):
    assert complaints.run(lambda: coalescer.get_or_call("k", AwaitableAtOnce)) is None
    assert complaints.all == []


def never():
    return asyncio.get_running_loop().create_future()


def never_in_a_task():
    return asyncio.create_task(asyncio.Event().wait())


@pytest.mark.parametrize("make", [never, never_in_a_task], ids=lambda fn: fn.__name__)
async def test_what_the_call_awaits_is_cancelled_with_it(coalescer, make):
    made = []

    def fn():
        made.append(make())
        return made[0]

    leader = asyncio.create_task(coalescer.get_or_call("k", fn))
    await let_run()
    leader.cancel()
    await let_run()
    assert leader.cancelled()
    assert made[0].cancelled()


class Unreadable:
    def __repr__(self):
        raise LookupError


def numbers():
    yield 1


@pytest.mark.parametrize("result", [None, "text", 1, object(), [own], own, numbers(), Unreadable()], ids=type)
def test_what_cannot_be_awaited_is_a_type_error_and_is_not_retained(complaints, coalescer, result):
    async def main():
        with pytest.raises(TypeError, match="fn must return an awaitable") as info:
            await coalescer.get_or_call("k", lambda: result)
        assert "k" not in coalescer
        assert await coalescer.get_or_call("k", own) == "own"
        return info.value

    error = complaints.run(main)
    assert isinstance(error, CallResultError)
    assert isinstance(error, CoalesceError)
    assert complaints.all == []


def test_what_cannot_be_awaited_is_shared_with_those_who_have_joined():
    coalescer = AsyncBatchCoalescer(ttl_seconds=60)
    called, joined = threading.Event(), threading.Event()

    def fn():
        called.set()
        assert joined.wait(PATIENCE)
        return "not awaitable"

    here, there = LoopThread(), LoopThread()
    try:
        leader = here.start(coalescer.get_or_call("k", fn))
        assert called.wait(PATIENCE)
        waiters = [there.start(coalescer.get_or_call("k", refused)) for _ in range(3)]
        wait_for_waiters(coalescer, "k", 3)
        joined.set()
        for task in (leader, *waiters):
            with pytest.raises(CallResultError, match="awaitable, not 'not awaitable'"):
                task.result()
        assert "k" not in coalescer
    finally:
        here.end()
        there.end()


@pytest.mark.parametrize("suspends", [False, True])
@pytest.mark.parametrize("where", ["fn", "awaitable"])
def test_a_stop_iteration_becomes_a_runtime_error_as_in_any_coroutine(complaints, suspends, where):
    async def fail():
        if suspends:
            await let_run(2)
        raise StopIteration(1)

    def fn():
        if where == "fn":
            raise StopIteration(1)
        return fail()

    async def main():
        coalescer = AsyncBatchCoalescer(ttl_seconds=60)
        asking = (coalescer.get_or_call("k", fn) for _ in range(3))
        outcomes = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), PATIENCE)
        hit = (await asyncio.gather(coalescer.get_or_call("k", refused), return_exceptions=True))[0]
        return [*outcomes, hit]

    outcomes = complaints.run(main)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 4
    assert len({id(outcome) for outcome in outcomes}) == 4
    assert complaints.all == []


def test_a_stop_async_iteration_is_an_error_like_any_other(complaints):
    async def fail():
        await let_run(2)
        raise StopAsyncIteration

    async def main():
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        return await asyncio.gather(*(coalescer.get_or_call("k", fail) for _ in range(3)), return_exceptions=True)

    assert [type(outcome) for outcome in complaints.run(main)] == [StopAsyncIteration] * 3
    assert complaints.all == []

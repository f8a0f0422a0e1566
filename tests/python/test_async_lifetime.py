"""What is kept alive by calls, their outcomes and their errors, and for how long."""

import asyncio
import gc
import weakref

import pytest
from complaints import collect
from loops import HeldCall, LoopThread, ask, let_run, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, CoalesceError, _core


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


class Value:
    """Something that can be referred to weakly."""


async def hold_and_cancel(coalescer, call):
    leader, waiter = (asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(2))
    await let_run()
    for task in (leader, waiter):
        task.cancel()
    await let_run()


async def hold_and_fail(coalescer, call):
    call.error = LookupError()
    await hold_and_share(coalescer, call)


async def hold_and_share(coalescer, call):
    asking = asyncio.gather(*(coalescer.get_or_call("k", call) for _ in range(3)), return_exceptions=True)
    await let_run()
    call.release()
    await asking


@pytest.mark.parametrize("course", [hold_and_share, hold_and_fail, hold_and_cancel])
async def test_the_calls_task_and_the_coalescer_are_collected_afterwards(course):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=60), HeldCall(Value())
    await course(coalescer, call)
    await let_run()
    alive = [weakref.ref(coalescer), weakref.ref(call.task), weakref.ref(call.value), weakref.ref(call)]
    del coalescer, call
    collect()
    assert [reference() for reference in alive] == [None] * 4


@pytest.mark.parametrize("course", [hold_and_share, hold_and_fail, hold_and_cancel])
async def test_the_calls_task_and_its_callable_are_gone_though_the_coalescer_stays(coalescer, course):
    call = HeldCall(Value())
    await course(coalescer, call)
    await let_run()
    alive = [weakref.ref(call.task), weakref.ref(call)]
    del call
    collect()
    assert [reference() for reference in alive] == [None] * 2
    assert coalescer._waiters("k") == 0


def test_what_a_closed_loop_has_left_pending_is_collected_with_the_coalescer(complaints):
    """As it is without a coalescer."""

    def leave_pending():
        coalescer, call, thread = AsyncBatchCoalescer(ttl_seconds=60), HeldCall(Value()), LoopThread()
        thread.loop.set_exception_handler(lambda *_: None)
        ask(coalescer, thread, call)
        ask(coalescer, thread, refused)
        thread.close()
        return [weakref.ref(kept) for kept in (coalescer, call, call.value, thread.loop)]

    alive = leave_pending()
    collect()
    assert [reference() for reference in alive] == [None] * 4


def test_a_ring_of_a_coalescer_and_its_value_is_collected():
    async def make_ring():
        coalescer, value = AsyncBatchCoalescer(ttl_seconds=60), Value()
        value.coalescer = coalescer

        async def call():
            await asyncio.sleep(0)
            return value

        await asyncio.gather(*(coalescer.get_or_call("k", call) for _ in range(3)))
        return weakref.ref(value), weakref.ref(coalescer)

    alive = asyncio.run(make_ring())
    collect()
    assert [reference() for reference in alive] == [None, None]


@pytest.fixture
def no_collection():
    """Only reference counts free anything."""
    collect()
    gc.disable()
    yield
    gc.enable()


async def make_value():
    await asyncio.sleep(0)
    return Value()


@pytest.mark.usefixtures("no_collection")
async def test_a_value_that_is_not_retained_goes_with_its_last_caller():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)
    values = await asyncio.gather(*(coalescer.get_or_call("k", make_value) for _ in range(5)))
    await let_run()
    alive = weakref.ref(values[0])
    assert set(values) == {alive()}
    values.clear()
    assert alive() is None


@pytest.mark.usefixtures("no_collection")
async def test_a_value_that_a_cancelled_waiter_would_have_got_goes_with_the_last_caller():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)
    gate = asyncio.Event()

    async def call():
        await gate.wait()
        # The call is over before the waiter is.
        asyncio.get_running_loop().call_soon(callers[1].cancel)
        return Value()

    callers = [asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(2)]
    await let_run()
    gate.set()
    alive = weakref.ref(await callers[0])
    await let_run()
    assert callers[1].cancelled()
    callers.clear()
    assert alive() is None


@pytest.mark.usefixtures("no_collection")
def test_a_retained_value_goes_when_it_has_expired_though_nobody_calls():
    coalescer = AsyncBatchCoalescer(ttl_seconds=60)

    async def share():
        values = await asyncio.gather(*(coalescer.get_or_call("k", make_value) for _ in range(5)))
        return weakref.ref(values[0])

    alive = asyncio.run(share())
    assert alive() is not None
    _core._advance_clock(61)
    wait_until(lambda: alive() is None)


@pytest.mark.usefixtures("no_collection")
def test_a_retained_value_goes_by_itself_when_its_time_is_up():
    """Nobody moves the clock: the sweeper wakes by itself."""
    coalescer = AsyncBatchCoalescer(ttl_seconds=0.05)

    async def share():
        values = await asyncio.gather(*(coalescer.get_or_call("k", make_value) for _ in range(5)))
        return weakref.ref(values[0])

    alive = asyncio.run(share())
    wait_until(lambda: alive() is None)
    assert "retained=0" in repr(coalescer)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("ttl_seconds", [0, 60])
async def test_an_error_keeps_nothing_of_the_call_alive(ttl_seconds):
    coalescer, alive = AsyncBatchCoalescer(ttl_seconds=ttl_seconds), []

    async def call():
        local = Value()
        alive.append(weakref.ref(local))
        await asyncio.sleep(0)
        raise LookupError

    outcomes = await asyncio.gather(*(coalescer.get_or_call("k", call) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [LookupError] * 3
    await let_run()
    # The leader's error has its traceback, the frames and all.
    assert alive[0]() is not None
    outcomes.clear()
    assert alive[0]() is None


@pytest.mark.usefixtures("no_collection")
async def test_a_caller_that_was_told_of_a_recursion_keeps_nothing_alive(coalescer):
    alive = []

    async def call():
        local = Value()
        alive.append(weakref.ref(local))
        return await coalescer.get_or_call("k", refused)

    outcomes = await asyncio.gather(coalescer.get_or_call("k", call), return_exceptions=True)
    await let_run()
    assert isinstance(outcomes[0], CoalesceError)
    outcomes.clear()
    assert alive[0]() is None


@pytest.mark.usefixtures("no_collection")
async def test_an_error_that_reaches_a_leader_cancelled_at_that_moment_keeps_nothing_alive(coalescer):
    alive, callers = [], []

    async def call():
        local = Value()
        alive.append(weakref.ref(local))
        await let_run(2)
        callers[0].cancel()
        raise GeneratorExit

    callers.append(asyncio.create_task(coalescer.get_or_call("k", call)))
    await let_run()
    assert isinstance(callers[0].exception(), GeneratorExit)
    callers.clear()
    await let_run()
    assert alive[0]() is None

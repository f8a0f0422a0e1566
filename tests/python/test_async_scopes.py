"""Timeouts, task groups and contexts around calls, as asyncio has them."""

import asyncio
import contextvars
import sys

import pytest
from loops import HeldCall, let_run, start_callers

from llm_batch_coalesce import AsyncBatchCoalescer


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


async def own():
    return "own"


# Timeouts and task groups.


async def test_a_timeout_of_the_leader_leaves_the_call_to_the_waiters(coalescer):
    call = HeldCall("value")

    async def impatient():
        async with asyncio.timeout(None) as patience:
            asyncio.get_running_loop().call_soon(patience.reschedule, 0)
            await coalescer.get_or_call("k", call)

    leader = asyncio.create_task(impatient())
    await asyncio.sleep(0)
    waiter = asyncio.create_task(coalescer.get_or_call("k", refused))
    with pytest.raises(TimeoutError):
        await leader
    assert not call.cancelled.is_set()
    call.release()
    assert await waiter == "value"


async def test_a_timeout_of_a_waiter_concerns_it_alone(coalescer):
    call = HeldCall("value")
    leader, waiter = await start_callers(coalescer, call, refused)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await coalescer.get_or_call("k", refused)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(coalescer.get_or_call("k", refused), 0.01)
    assert coalescer._waiters("k") == 1
    call.release()
    assert await asyncio.gather(leader, waiter) == ["value", "value"]


async def test_a_timeout_of_the_only_caller_cancels_the_call(coalescer):
    call = HeldCall("value")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(coalescer.get_or_call("k", call), 0.01)
    await let_run()
    assert call.cancelled.is_set()
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_timeout_inside_the_call_is_an_error_for_all(coalescer):
    async def call():
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    outcomes = await asyncio.gather(
        *(coalescer.get_or_call("k", fn) for fn in (call, refused, refused)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [TimeoutError] * 3


async def test_the_tasks_of_a_group_share_one_call(coalescer):
    call = HeldCall("value")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coalescer.get_or_call("k", call)) for _ in range(10)]
        await let_run()
        call.release()
    assert [task.result() for task in tasks] == ["value"] * 10
    assert call.calls == 1


class GroupFailedError(Exception):
    """Ends a task group."""


async def fail_group(coalescer, *callables):
    async with asyncio.TaskGroup() as group:
        for fn in callables:
            group.create_task(coalescer.get_or_call("k", fn))
        await let_run()
        raise GroupFailedError


async def test_a_group_that_fails_takes_its_call_with_it(coalescer):
    call = HeldCall("value")
    with pytest.raises(ExceptionGroup) as info:
        await fail_group(coalescer, call, refused)
    assert info.group_contains(GroupFailedError, depth=1)
    await let_run()
    assert call.cancelled.is_set()
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_group_that_fails_leaves_its_call_to_a_waiter_outside(coalescer):
    call = HeldCall("value")
    failing = asyncio.create_task(fail_group(coalescer, call, refused))
    await let_run(2)
    waiter = asyncio.create_task(coalescer.get_or_call("k", refused))
    with pytest.raises(ExceptionGroup):
        await failing
    await let_run()
    assert not call.cancelled.is_set()
    call.release()
    assert await waiter == "value"


async def test_the_error_of_a_shared_call_fails_the_group_once_for_each_task(coalescer):
    call = HeldCall(error=LookupError("no such model"))

    async def ask_in_a_group():
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(coalescer.get_or_call("k", call))
            await let_run()
            call.release()

    with pytest.raises(ExceptionGroup) as info:
        await ask_in_a_group()
    errors = info.value.exceptions
    assert [repr(error) for error in errors] == ["LookupError('no such model')"] * 3
    assert len({id(error) for error in errors}) == 3
    assert call.error in errors


# The context that the call runs in.


WHO: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


async def test_the_call_runs_in_a_copy_of_its_leaders_context(coalescer):
    seen = []

    async def call():
        seen.append(WHO.get())
        WHO.set("call")
        await asyncio.sleep(0)
        seen.append(WHO.get())
        return "value"

    async def ask_as(name):
        WHO.set(name)
        assert await coalescer.get_or_call("k", call) == "value"
        return WHO.get()

    assert await asyncio.gather(ask_as("leader"), ask_as("waiter")) == ["leader", "waiter"]
    assert seen == ["leader", "call"]
    assert WHO.get() == "nobody"


async def test_what_the_callable_sets_before_it_suspends_does_not_leak_to_the_leader_either(coalescer):
    WHO.set("leader")

    def fn():
        WHO.set("call")
        return own()

    before = contextvars.copy_context()
    assert await coalescer.get_or_call("k", fn) == "own"
    assert dict(contextvars.copy_context()) == dict(before)


async def test_a_waiter_that_takes_over_calls_in_its_own_context(coalescer):
    first = HeldCall(error=GeneratorExit())

    async def ask_as(name, fn):
        WHO.set(name)
        return await coalescer.get_or_call("k", fn)

    async def who():
        return WHO.get()

    leader = asyncio.create_task(ask_as("leader", first))
    await let_run()
    heir = asyncio.create_task(ask_as("heir", who))
    await let_run()
    first.release()
    with pytest.raises(GeneratorExit):
        await leader
    assert await heir == "heir"


async def test_the_call_has_a_task_of_its_own(coalescer):
    async def call():
        return asyncio.current_task()

    task = await coalescer.get_or_call("k", call)
    assert task is not asyncio.current_task()
    assert task.done()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks start eagerly since Python 3.12")
async def test_callers_may_be_eager_tasks(coalescer):
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    call = HeldCall("value")
    leader, waiter, impatient = (asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(3))
    impatient.cancel()
    await let_run()
    leader.cancel()
    await let_run()
    assert (leader.cancelled(), impatient.cancelled()) == (True, True)
    call.release()
    assert await waiter == "value"
    assert call.calls == 1

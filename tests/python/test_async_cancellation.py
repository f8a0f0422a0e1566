"""Who is cancelled with whom, callers and calls on one loop. The rules stand at the top of `_async.py`."""

import asyncio

import pytest
from loops import PATIENCE, HeldCall, let_run, start_callers

from llm_batch_coalesce import AsyncBatchCoalescer


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


async def own():
    return "own"


# One loop: callers come and go.


async def test_a_cancelled_leader_leaves_the_call_to_the_waiters(coalescer):
    call = HeldCall("value")
    leader, first, second = await start_callers(coalescer, call, refused, refused)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert not call.cancelled.is_set()
    call.release()
    assert await asyncio.gather(first, second) == ["value", "value"]
    assert call.calls == 1


async def test_the_outcome_of_a_call_whose_leader_was_cancelled_is_retained(coalescer):
    call = HeldCall("value")
    leader, waiter = await start_callers(coalescer, call, refused)
    leader.cancel()
    await let_run()
    call.release()
    assert await waiter == "value"
    assert await coalescer.get_or_call("k", refused) == "value"


async def test_a_call_whose_leader_was_cancelled_can_still_be_joined(coalescer):
    call = HeldCall("value")
    leader, waiter = await start_callers(coalescer, call, refused)
    leader.cancel()
    await let_run()
    joiner = asyncio.create_task(coalescer.get_or_call("k", refused))
    await let_run()
    waiter.cancel()
    await let_run()
    assert not call.cancelled.is_set()
    call.release()
    assert await joiner == "value"


async def test_a_cancelled_waiter_leaves_alone(coalescer):
    call = HeldCall("value")
    leader, first, second = await start_callers(coalescer, call, refused, refused)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert coalescer._waiters("k") == 1
    call.release()
    assert await asyncio.gather(leader, second) == ["value", "value"]


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (1, 2, 0), (2, 0, 1)])
async def test_the_last_caller_to_leave_cancels_the_call(coalescer, order):
    call = HeldCall("value")
    tasks = await start_callers(coalescer, call, *[refused] * (len(order) - 1))
    for number in order:
        assert not call.cancelled.is_set()
        tasks[number].cancel()
        await let_run()
    assert call.cancelled.is_set()
    assert call.task.cancelled()
    assert all(task.cancelled() for task in tasks)
    assert "k" not in coalescer


class Lingering:
    """Is cancelled, and takes its time to clean up."""

    def __init__(self, ending):
        self._ending = ending
        self.cleaning = asyncio.Event()
        self.clean = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cleaning.set()
            await self.clean.wait()
            self.ended.set()
            return self._ending()


def answer_late():
    return "too late"


def fail_late():
    raise ValueError


def stay_cancelled():
    raise asyncio.CancelledError


@pytest.mark.parametrize("ending", [answer_late, fail_late, stay_cancelled])
async def test_nobody_joins_a_call_that_its_last_caller_has_left(coalescer, ending):
    abandoned = Lingering(ending)
    (leader,) = await start_callers(coalescer, abandoned)
    leader.cancel()
    # At this moment the caller has left, and the call's task may not even know yet.
    await asyncio.wait([leader])
    assert "k" not in coalescer
    call = HeldCall("new")
    newcomer, joiner = await start_callers(coalescer, call, refused)
    await asyncio.wait_for(abandoned.cleaning.wait(), PATIENCE)
    abandoned.clean.set()
    await asyncio.wait_for(abandoned.ended.wait(), PATIENCE)
    await let_run()
    assert not newcomer.done()
    call.release()
    assert await asyncio.gather(newcomer, joiner) == ["new", "new"]
    assert await coalescer.get_or_call("k", refused) == "new"


async def test_what_an_abandoned_call_still_returns_is_not_retained(coalescer):
    abandoned = Lingering(answer_late)
    (leader,) = await start_callers(coalescer, abandoned)
    leader.cancel()
    await let_run()
    abandoned.clean.set()
    await asyncio.wait_for(abandoned.ended.wait(), PATIENCE)
    await let_run()
    assert "k" not in coalescer
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_caller_that_is_cancelled_before_it_has_asked_leads_nothing(coalescer):
    leader = asyncio.create_task(coalescer.get_or_call("k", refused))
    leader.cancel()
    await let_run()
    assert leader.cancelled()
    assert await coalescer.get_or_call("k", own) == "own"


@pytest.mark.parametrize("rounds", range(6))
async def test_a_leader_may_be_cancelled_at_any_moment(coalescer, rounds):
    async def call():
        for _ in range(4):
            await asyncio.sleep(0)
        return "value"

    leader = asyncio.create_task(coalescer.get_or_call("k", call))
    await let_run(rounds)
    leader.cancel()
    await let_run()
    assert leader.done()
    assert await coalescer.get_or_call("k", own) in {"own", "value"}
    assert coalescer._waiters("k") == 0


async def test_a_call_that_ends_at_the_moment_its_last_caller_is_cancelled_is_over(coalescer):
    async def call():
        await asyncio.sleep(0)
        leader.cancel()
        return "value"

    leader = asyncio.create_task(coalescer.get_or_call("k", call))
    await let_run()
    assert leader.cancelled()
    assert await coalescer.get_or_call("k", refused) == "value"


# The call itself is cancelled.


async def test_a_call_cancelled_from_outside_cancels_the_callers_on_its_loop(coalescer):
    call = HeldCall("value")
    tasks = await start_callers(coalescer, call, refused, refused)
    call.task.cancel()
    await let_run()
    assert all(task.cancelled() for task in tasks)
    # They were not asked to: it is the call that was.
    assert [task.cancelling() for task in tasks] == [0, 0, 0]
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_call_cancelled_before_it_has_begun_cancels_the_callers_on_its_loop_too(coalescer):
    async def never():
        await asyncio.Event().wait()

    known = asyncio.all_tasks()
    callers = [asyncio.create_task(coalescer.get_or_call("k", fn)) for fn in (never, refused, refused)]
    await asyncio.sleep(0)
    (call,) = asyncio.all_tasks() - known - set(callers)
    call.cancel()
    await let_run()
    assert all(task.cancelled() for task in callers)
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_cancelled_error_that_comes_out_of_the_callable_cancels_the_callers(coalescer):
    cancelled = asyncio.get_running_loop().create_future()
    cancelled.cancel()
    gate = asyncio.Event()

    async def call():
        await gate.wait()
        await cancelled

    tasks = await start_callers(coalescer, call, refused)
    gate.set()
    await let_run()
    assert all(task.cancelled() for task in tasks)
    assert "k" not in coalescer


async def test_a_callable_that_is_cancelled_at_once_cancels_its_caller(coalescer):
    async def call():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await coalescer.get_or_call("k", call)
    assert await coalescer.get_or_call("k", own) == "own"


async def test_a_call_that_survives_its_cancellation_is_a_call_like_any_other(coalescer):
    async def call():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "survived"

    known = asyncio.all_tasks()
    leader, waiter = await start_callers(coalescer, call, refused)
    (task,) = asyncio.all_tasks() - known - {leader, waiter}
    task.cancel()
    assert await asyncio.gather(leader, waiter) == ["survived", "survived"]


# Errors for the leader alone.


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_an_error_that_is_no_exception_is_for_the_leader_and_the_next_waiter_leads(coalescer, error):
    call, handed = HeldCall(error=error()), HeldCall("second")
    results = []

    async def ask(fn):
        # Out of a task, the first two would end the loop.
        try:
            results.append(await coalescer.get_or_call("k", fn))
        except error as caught:
            results.append(caught)

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for fn in (call, handed, refused, refused):
            group.create_task(ask(fn))
            await let_run()
        call.release()
        await let_run()
        assert results == [call.error]
        assert handed.calls == 1
        assert coalescer._waiters("k") == 2
        handed.release()
    assert results == [call.error, "second", "second", "second"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_an_error_that_is_no_exception_is_not_retained(coalescer, error):
    async def call():
        raise error

    with pytest.raises(error):
        await coalescer.get_or_call("k", call)
    assert "k" not in coalescer
    assert await coalescer.get_or_call("k", own) == "own"


async def test_an_error_that_is_no_exception_is_not_lost_if_the_leader_is_cancelled_at_that_moment(coalescer):
    calls = []

    async def call():
        calls.append(asyncio.current_task())
        await gate.wait()
        leader.cancel()
        raise GeneratorExit

    gate = asyncio.Event()
    leader, waiter = await start_callers(coalescer, call, own)
    gate.set()
    assert await waiter == "own"
    outcomes = [task.exception() for task in (leader, *calls) if not task.cancelled()]
    assert any(isinstance(outcome, GeneratorExit) for outcome in outcomes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_with_the_leader_gone_it_is_raised_on_in_the_calls_task(coalescer, error):
    call = HeldCall(error=error())

    async def lose_the_leader():
        leader, waiter = await start_callers(coalescer, call, own)
        leader.cancel()
        await let_run()
        call.release()
        return waiter

    loop = asyncio.new_event_loop()
    try:
        waiter = loop.run_until_complete(lose_the_leader())
        with pytest.raises(error):
            # It ends the loop, as it would have without a coalescer.
            loop.run_until_complete(waiter)
        assert call.task.exception() is call.error
        assert loop.run_until_complete(waiter) == "own"
    finally:
        loop.close()


async def test_with_the_leader_gone_a_generator_exit_is_the_calls_tasks(coalescer):
    call = HeldCall(error=GeneratorExit())
    leader, waiter = await start_callers(coalescer, call, own)
    leader.cancel()
    await let_run()
    call.release()
    assert await waiter == "own"
    assert call.task.exception() is call.error


async def test_a_leader_that_took_over_counts_as_a_call_and_not_as_joined_too(coalescer):
    call = HeldCall(error=GeneratorExit())
    leader, heir, waiter = await start_callers(coalescer, call, own, refused)
    call.release()
    with pytest.raises(GeneratorExit):
        await leader
    assert await asyncio.gather(heir, waiter) == ["own", "own"]
    assert "calls=2 joined=1 hits=0" in repr(coalescer)

"""Who is cancelled with whom: callers, calls and loops. The rules stand at the top of `_async.py`."""

import asyncio
import contextvars
import sys
import threading

import pytest
from loops import PATIENCE, HeldCall, LoopThread, ask, let_run, wait_for_waiters, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, _core


@pytest.fixture
def loops():
    """Makes loops in threads, and ends those that the test has left open."""
    made = []

    def make():
        made.append(LoopThread())
        return made[-1]

    yield make
    for loop in made:
        loop.end()


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


async def own():
    return "own"


async def start(coalescer, *callables):
    """Start a caller for each callable, in this order; the first leads. Returns when all wait."""
    tasks = []
    for fn in callables:
        tasks.append(asyncio.create_task(coalescer.get_or_call("k", fn)))
        await let_run()
    assert coalescer._waiters("k") == len(callables) - 1
    return tasks


# One loop: callers come and go.


async def test_a_cancelled_leader_leaves_the_call_to_the_waiters(coalescer):
    call = HeldCall("value")
    leader, first, second = await start(coalescer, call, refused, refused)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    assert not call.cancelled.is_set()
    call.release()
    assert await asyncio.gather(first, second) == ["value", "value"]
    assert call.calls == 1


async def test_the_outcome_of_a_call_whose_leader_was_cancelled_is_retained(coalescer):
    call = HeldCall("value")
    leader, waiter = await start(coalescer, call, refused)
    leader.cancel()
    await let_run()
    call.release()
    assert await waiter == "value"
    assert await coalescer.get_or_call("k", refused) == "value"


async def test_a_call_whose_leader_was_cancelled_can_still_be_joined(coalescer):
    call = HeldCall("value")
    leader, waiter = await start(coalescer, call, refused)
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
    leader, first, second = await start(coalescer, call, refused, refused)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert coalescer._waiters("k") == 1
    call.release()
    assert await asyncio.gather(leader, second) == ["value", "value"]


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (1, 2, 0), (2, 0, 1)])
async def test_the_last_caller_to_leave_cancels_the_call(coalescer, order):
    call = HeldCall("value")
    tasks = await start(coalescer, call, *[refused] * (len(order) - 1))
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
    (leader,) = await start(coalescer, abandoned)
    leader.cancel()
    # At this moment the caller has left, and the call's task may not even know yet.
    await asyncio.wait([leader])
    assert "k" not in coalescer
    call = HeldCall("new")
    newcomer, joiner = await start(coalescer, call, refused)
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
    (leader,) = await start(coalescer, abandoned)
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
    tasks = await start(coalescer, call, refused, refused)
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

    tasks = await start(coalescer, call, refused)
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
    leader, waiter = await start(coalescer, call, refused)
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
    leader, waiter = await start(coalescer, call, own)
    gate.set()
    assert await waiter == "own"
    outcomes = [task.exception() for task in (leader, *calls) if not task.cancelled()]
    assert any(isinstance(outcome, GeneratorExit) for outcome in outcomes)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_with_the_leader_gone_it_is_raised_on_in_the_calls_task(coalescer, error):
    call = HeldCall(error=error())

    async def lose_the_leader():
        leader, waiter = await start(coalescer, call, own)
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
    leader, waiter = await start(coalescer, call, own)
    leader.cancel()
    await let_run()
    call.release()
    assert await waiter == "own"
    assert call.task.exception() is call.error


async def test_a_leader_that_took_over_counts_as_a_call_and_not_as_joined_too(coalescer):
    call = HeldCall(error=GeneratorExit())
    leader, heir, waiter = await start(coalescer, call, own, refused)
    call.release()
    with pytest.raises(GeneratorExit):
        await leader
    assert await asyncio.gather(heir, waiter) == ["own", "own"]
    assert "calls=2 joined=1 hits=0" in repr(coalescer)


# The lead is offered, and not taken.


@pytest.mark.parametrize("after_the_offer", [False, True])
async def test_a_waiter_that_is_cancelled_when_it_should_lead_passes_the_lead_on(coalescer, after_the_offer):
    gate = asyncio.Event()

    async def call():
        await gate.wait()
        if after_the_offer:
            asyncio.get_running_loop().call_soon(first.cancel)
        else:
            first.cancel()
        raise GeneratorExit

    leader, first, second, third = await start(coalescer, call, refused, own, refused)
    gate.set()
    with pytest.raises(GeneratorExit):
        await leader
    assert await asyncio.gather(second, third) == ["own", "own"]
    assert first.cancelled()


async def test_when_all_are_cancelled_that_should_lead_the_next_caller_leads_anew(coalescer):
    call = HeldCall(error=GeneratorExit())
    leader, *waiters = await start(coalescer, call, refused, refused, refused)
    call.release()
    for waiter in waiters:
        asyncio.get_running_loop().call_soon(waiter.cancel)
    with pytest.raises(GeneratorExit):
        await leader
    await let_run()
    assert all(waiter.cancelled() for waiter in waiters)
    assert "k" not in coalescer
    assert await coalescer.get_or_call("k", own) == "own"


def test_a_waiter_on_a_loop_that_is_busy_passes_the_lead_on_if_it_is_cancelled(coalescer, loops):
    leading, busy, third = loops(), loops(), loops()
    call, taken_over = HeldCall(error=GeneratorExit()), HeldCall("taken over")
    leader, offered, next_one = (
        ask(coalescer, loop, fn) for loop, fn in ((leading, call), (busy, refused), (third, taken_over))
    )
    busy.hold()
    offered.cancel()
    call.release()
    with pytest.raises(GeneratorExit):
        leader.result()
    busy.let_go()
    assert taken_over.started.wait(PATIENCE)
    with pytest.raises(asyncio.CancelledError):
        offered.result()
    taken_over.release()
    assert next_one.result() == "taken over"


def test_an_offer_to_a_loop_that_does_not_run_goes_to_the_next_after_a_second(coalescer, loops):
    leading, stuck, third = loops(), loops(), loops()
    call, taken_over = HeldCall(error=GeneratorExit()), HeldCall("taken over")
    leader, offered, next_one = (
        ask(coalescer, loop, fn) for loop, fn in ((leading, call), (stuck, refused), (third, taken_over))
    )
    stuck.hold()
    call.release()
    with pytest.raises(GeneratorExit):
        leader.result()
    _core._advance_clock(1.1)
    assert taken_over.started.wait(PATIENCE)
    taken_over.release()
    assert next_one.result() == "taken over"
    # Back again, the one that had the offer asks anew.
    stuck.let_go()
    assert offered.result() == "taken over"


def test_a_withdrawn_offer_that_nobody_else_wants_ends_the_flight(coalescer, loops):
    leading, stuck = loops(), loops()
    call = HeldCall(error=GeneratorExit())
    leader, offered = (ask(coalescer, loop, fn) for loop, fn in ((leading, call), (stuck, own)))
    stuck.hold()
    call.release()
    with pytest.raises(GeneratorExit):
        leader.result()
    _core._advance_clock(1.1)
    wait_until(lambda: "k" not in coalescer)
    stuck.let_go()
    assert offered.result() == "own"


def test_an_offer_to_a_loop_that_is_closed_goes_to_the_next(coalescer, loops):
    leading, closed, third = loops(), loops(), loops()
    call = HeldCall(error=GeneratorExit())
    leader, lost, next_one = (
        ask(coalescer, loop, fn) for loop, fn in ((leading, call), (closed, refused), (third, own))
    )
    closed.close()
    call.release()
    with pytest.raises(GeneratorExit):
        leader.result()
    _core._advance_clock(1.1)
    assert next_one.result() == "own"
    assert not lost.done()


# Several loops: calls and loops end.


def test_a_call_cancelled_from_outside_goes_on_with_a_waiter_of_another_loop(coalescer, loops):
    here, there = loops(), loops()
    call, taken_over = HeldCall("value"), HeldCall("taken over")
    leader, waiter, heir, last = (
        ask(coalescer, loop, fn) for loop, fn in ((here, call), (here, refused), (there, taken_over), (there, refused))
    )
    here.do(call.task.cancel)
    for lost in (leader, waiter):
        with pytest.raises(asyncio.CancelledError):
            lost.result()
    assert taken_over.started.wait(PATIENCE)
    assert taken_over.loop is there.loop
    taken_over.release()
    assert [heir.result(), last.result()] == ["taken over", "taken over"]


def test_the_last_caller_to_leave_cancels_the_call_on_another_loop(coalescer, loops):
    here, there = loops(), loops()
    call = HeldCall("value")
    leader, waiter = ask(coalescer, here, call), ask(coalescer, there, refused)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        leader.result()
    assert not call.cancelled.is_set()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        waiter.result()
    assert call.cancelled.wait(PATIENCE)
    assert "k" not in coalescer


def test_when_asyncio_run_returns_with_the_call_pending_a_waiter_elsewhere_takes_over(coalescer, loops):
    there = loops()
    call = HeldCall("value")
    leading, go_home = threading.Event(), []

    async def main():
        asked = asyncio.create_task(coalescer.get_or_call("k", call))
        also_asked = asyncio.create_task(coalescer.get_or_call("k", refused))
        await let_run()
        over = asyncio.Event()
        go_home.append(lambda: call.loop.call_soon_threadsafe(over.set))
        leading.set()
        await over.wait()
        return asked, also_asked

    returned = []
    thread = threading.Thread(target=lambda: returned.extend(asyncio.run(main())))
    thread.start()
    assert leading.wait(PATIENCE)
    waiter = ask(coalescer, there, own)
    go_home[0]()
    assert waiter.result() == "own"
    thread.join(PATIENCE)
    assert call.cancelled.is_set()
    assert [task.cancelled() for task in returned] == [True, True]


def test_when_the_loop_is_closed_with_the_call_pending_a_waiter_elsewhere_takes_over(coalescer, loops):
    closed, there = loops(), loops()
    call = HeldCall("value")
    lost, waiter = ask(coalescer, closed, call), ask(coalescer, there, own)
    closed.close()
    # Nobody calls and nobody moves the clock: the sweeper finds out by itself.
    assert waiter.result() == "own"
    assert not lost.done()
    assert not call.cancelled.is_set()


def test_when_the_loop_is_closed_after_its_leader_was_cancelled_a_waiter_elsewhere_takes_over(coalescer, loops):
    closed, there = loops(), loops()
    leader, waiter = ask(coalescer, closed, HeldCall("value")), ask(coalescer, there, own)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        leader.result()
    closed.close()
    _core._advance_clock(0)
    assert waiter.result() == "own"


def test_a_waiter_that_joined_before_the_call_first_suspended_takes_over_when_the_loop_is_closed(coalescer, loops):
    closed, there = loops(), loops()
    called, joined = threading.Event(), threading.Event()

    def call_for_long():
        called.set()
        assert joined.wait(PATIENCE)
        return HeldCall("value")()

    closed.start(coalescer.get_or_call("k", call_for_long))
    assert called.wait(PATIENCE)
    waiter = ask(coalescer, there, own)
    joined.set()
    closed.close()
    _core._advance_clock(0)
    assert waiter.result() == "own"


def test_the_loop_of_a_waiter_that_took_over_may_be_closed_too(coalescer, loops):
    first, second, third = loops(), loops(), loops()
    taken_over = HeldCall("taken over")
    ask(coalescer, first, HeldCall("value"))
    ask(coalescer, second, taken_over)
    waiter = ask(coalescer, third, own)
    first.close()
    _core._advance_clock(0)
    assert taken_over.started.wait(PATIENCE)
    wait_for_waiters(coalescer, "k", 1)
    second.close()
    assert waiter.result() == "own"


def test_the_first_who_asks_elsewhere_after_the_loop_was_closed_leads(coalescer, loops):
    closed, there = loops(), loops()
    ask(coalescer, closed, HeldCall("value"))
    ask(coalescer, closed, refused)
    closed.close()
    assert there.start(coalescer.get_or_call("k", own)).result() == "own"


def test_who_asks_elsewhere_after_the_loop_was_closed_joins_the_waiter_that_takes_over(coalescer, loops):
    closed, there = loops(), loops()
    taken_over = HeldCall("taken over")
    ask(coalescer, closed, HeldCall("value"))
    waiter = ask(coalescer, there, taken_over)
    closed.close()
    newcomer = there.start(coalescer.get_or_call("k", refused))
    assert taken_over.started.wait(PATIENCE)
    wait_for_waiters(coalescer, "k", 1)
    taken_over.release()
    assert [waiter.result(), newcomer.result()] == ["taken over", "taken over"]


def test_a_loop_that_is_stopped_and_runs_again_keeps_its_call(coalescer, loops):
    there = loops()
    loop = asyncio.new_event_loop()
    call = HeldCall("value")

    async def lead():
        leading = asyncio.create_task(coalescer.get_or_call("k", call))
        await let_run()
        return leading

    try:
        leader = loop.run_until_complete(lead())
        waiter = ask(coalescer, there, refused)
        _core._advance_clock(2)
        newcomer = ask(coalescer, there, refused)
        call.release()
        assert loop.run_until_complete(leader) == "value"
    finally:
        loop.close()
    assert [waiter.result(), newcomer.result()] == ["value", "value"]


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
    leader, waiter = await start(coalescer, call, refused)
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

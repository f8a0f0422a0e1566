"""The lead goes from loop to loop: it is offered and not taken, and calls and loops end."""

import asyncio
import threading

import pytest
from loops import PATIENCE, HeldCall, LoopThread, ask, let_run, start_callers, wait_for_waiters, wait_until

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

    leader, first, second, third = await start_callers(coalescer, call, refused, own, refused)
    gate.set()
    with pytest.raises(GeneratorExit):
        await leader
    assert await asyncio.gather(second, third) == ["own", "own"]
    assert first.cancelled()


async def test_when_all_are_cancelled_that_should_lead_the_next_caller_leads_anew(coalescer):
    call = HeldCall(error=GeneratorExit())
    leader, *waiters = await start_callers(coalescer, call, refused, refused, refused)
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

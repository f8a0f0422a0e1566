"""One coalescer, many event loops: at the same time in threads, and one after another."""

import asyncio
import random
import sys
import threading
from collections import Counter

import pytest
from loops import PATIENCE, HeldCall, LoopThread, ask, let_run, wait_for_waiters, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer


@pytest.fixture
def loops():
    """Makes loops in threads and ends them after the test. In debug mode they refuse calls from wrong threads."""
    made = []

    def make(count, kind=asyncio.SelectorEventLoop):
        for _ in range(count):
            made.append(LoopThread(kind()))
            made[-1].loop.set_debug(True)
        return made[-count:]

    yield make
    for loop in made:
        loop.end()


def refused():
    pytest.fail("nobody may call this")


async def asked_here(coalescer, fn, key="k"):
    """The outcome, and the loop and thread in which the caller goes on."""
    try:
        outcome = await coalescer.get_or_call(key, fn)
    except LookupError as error:
        outcome = error
    return outcome, asyncio.get_running_loop(), threading.get_ident()


def test_the_tasks_of_four_loops_share_one_call_and_go_on_each_on_its_own_loop(loops):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall(object())
    threads = loops(4)
    idents = [thread.do(threading.get_ident) for thread in threads]
    asked = [[thread.start(asked_here(coalescer, call)) for _ in range(10)] for thread in threads]
    wait_for_waiters(coalescer, "k", 39)
    call.release()
    for thread, ident, tasks in zip(threads, idents, asked, strict=True):
        assert [task.result() for task in tasks] == [(call.value, thread.loop, ident)] * 10
    assert call.calls == 1
    assert call.loop in [thread.loop for thread in threads]
    assert "calls=1 joined=39 hits=0" in repr(coalescer)


def test_the_tasks_of_four_loops_share_an_error_and_each_raises_its_own(loops):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall(error=LookupError("no such model"))
    threads = loops(4)
    asked = [(thread, thread.start(asked_here(coalescer, call))) for thread in threads * 5]
    wait_for_waiters(coalescer, "k", 19)
    call.release()
    errors = []
    for thread, task in asked:
        error, loop, _ = task.result()
        errors.append(error)
        assert loop is thread.loop
        assert repr(error) == "LookupError('no such model')"
    assert len({id(error) for error in errors}) == 20
    assert errors.count(call.error) == 1


def test_waiters_elsewhere_need_nothing_more_of_the_leaders_loop(loops):
    """Woken when the call completes, they go on though the leader's loop is blocked from then on."""
    coalescer, call, go_on = AsyncBatchCoalescer(ttl_seconds=0), HeldCall("value"), threading.Event()
    leading, other = loops(2)

    async def lead():
        value = await coalescer.get_or_call("k", call)
        assert go_on.wait(PATIENCE)
        return value

    leader = leading.start(lead())
    assert call.started.wait(PATIENCE)
    waiters = [other.start(coalescer.get_or_call("k", refused)) for _ in range(3)]
    wait_for_waiters(coalescer, "k", 3)
    call.release()
    assert [waiter.result() for waiter in waiters] == ["value"] * 3
    assert not leader.done()
    go_on.set()
    assert leader.result() == "value"


def test_a_waiter_whose_loop_is_busy_holds_up_nobody_else(loops):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall(object())
    leading, busy, other = loops(3)
    asked = [ask(coalescer, thread, call) for thread in (leading, busy, other)]
    busy.hold()
    call.release()
    assert asked[0].result() is asked[2].result() is call.value
    assert not asked[1].done()
    busy.let_go()
    # What is not retained is still there for the last who joined.
    assert asked[1].result() is call.value


def test_a_waiter_whose_loop_was_closed_holds_up_nobody_else(loops):
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall("value")
    leading, closed, other = loops(3)
    asked = [ask(coalescer, thread, call) for thread in (leading, closed, other)]
    closed.close()
    call.release()
    assert [asked[0].result(), asked[2].result()] == ["value", "value"]


class Unreachable(asyncio.SelectorEventLoop):
    """A loop that other threads cannot reach for a while."""

    cut_off = False

    def call_soon_threadsafe(self, *args, **kwargs):
        if self.cut_off:
            msg = "cut off"
            raise OSError(msg)
        return super().call_soon_threadsafe(*args, **kwargs)


def test_a_loop_that_cannot_be_woken_holds_up_no_other_loop(loops, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall("value")
    threads = loops(1) + loops(1, Unreachable) + loops(2)
    asked = [ask(coalescer, thread, call) for thread in threads]
    threads[1].loop.cut_off = True
    call.release()
    try:
        assert [asked[number].result() for number in (0, 2, 3)] == ["value"] * 3
    finally:
        threads[1].loop.cut_off = False
    assert [repr(error) for error in told] == ["OSError('cut off')"]


COALESCER = AsyncBatchCoalescer(ttl_seconds=60)


def test_a_coalescer_made_outside_of_any_loop_serves_one_loop_after_another():
    assert COALESCER._waiters("k") == 0
    calls = []

    async def call():
        calls.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return object()

    async def ask_together(key):
        return await asyncio.gather(*(COALESCER.get_or_call(key, call) for _ in range(5)))

    first = asyncio.run(ask_together("k"))
    for _ in range(3):
        # Retained in one loop, hit in another.
        assert set(asyncio.run(ask_together("k"))) == set(first)
    assert len(calls) == len(set(first)) == 1
    for number in range(3):
        assert len(set(asyncio.run(ask_together(number)))) == 1
    assert len(calls) == 4


def test_an_error_retained_in_one_loop_is_a_hit_in_another():
    coalescer = AsyncBatchCoalescer(ttl_seconds=60)

    async def call():
        await asyncio.sleep(0)
        raise LookupError

    errors = [asyncio.run(asked_here(coalescer, fn))[0] for fn in (call, refused, refused)]
    assert [type(error) for error in errors] == [LookupError] * 3
    assert len({id(error) for error in errors}) == 3


def test_a_coalescer_may_be_made_in_a_loop_that_has_ended():
    async def make():
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        assert await coalescer.get_or_call("k", HeldNever()) == "value"
        return coalescer

    coalescer = asyncio.run(make())
    assert asyncio.run(coalescer.get_or_call("k", HeldNever())) == "value"


class HeldNever:
    async def __call__(self):
        await asyncio.sleep(0)
        return "value"


async def test_thousands_of_tasks_share_one_call():
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall(object())
    tasks = [asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(5_000)]
    await let_run(3)
    assert coalescer._waiters("k") == 4_999
    call.release()
    assert set(await asyncio.gather(*tasks)) == {call.value}
    assert call.calls == 1


async def test_thousands_of_waiters_may_leave_one_after_another():
    coalescer, call = AsyncBatchCoalescer(ttl_seconds=0), HeldCall("value")
    tasks = [asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(3_000)]
    await let_run(3)
    for task in tasks[:-1]:
        task.cancel()
    await let_run(3)
    assert coalescer._waiters("k") == 1
    call.release()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes[-1] == "value"
    assert Counter(type(outcome) for outcome in outcomes) == {asyncio.CancelledError: 2_999, str: 1}
    assert call.calls == 1


async def test_thousands_of_keys_are_called_once_each():
    coalescer, calls = AsyncBatchCoalescer(ttl_seconds=60), Counter()

    async def ask(number):
        async def call():
            calls[number] += 1
            await asyncio.sleep(0)
            return number

        return await coalescer.get_or_call(("key", number), call)

    numbers = [number for number in range(2_000) for _ in range(3)]
    assert await asyncio.gather(*(ask(number) for number in numbers)) == numbers
    assert calls == Counter(range(2_000))
    assert len(coalescer) == 2_000


def test_many_loops_hit_a_retained_outcome(crew):
    coalescer, value = AsyncBatchCoalescer(ttl_seconds=60), object()

    async def call():
        return value

    async def hit():
        return [await coalescer.get_or_call("k", refused) for _ in range(2_000)]

    assert asyncio.run(coalescer.get_or_call("k", call)) is value
    for outcomes in crew.start(4, lambda _: asyncio.run(hit())).join():
        assert set(outcomes) == {value}
    assert "calls=1 joined=0 hits=8000" in repr(coalescer)


class Throw:
    """One random request of one of three keys: how long its call would take, and how it would end."""

    def __init__(self, dice):
        self.key, self._steps, self._ending = dice.randrange(3), dice.randrange(8), dice.random()

    async def call(self):
        await let_run(self._steps)
        if self._ending < 0.1:
            raise GeneratorExit(self)
        if self._ending < 0.2:
            raise asyncio.CancelledError
        if self._ending < 0.4:
            raise LookupError(self.key)
        return self.key

    async def ask(self, coalescer):
        """What came of it; whatever is wrong is raised."""
        try:
            outcome = await coalescer.get_or_call(self.key, self.call)
        except (LookupError, GeneratorExit) as error:
            outcome = error
        expected = (int, LookupError, GeneratorExit).index(type(outcome))
        # A GeneratorExit is nobody's but the one's whose call it ended.
        assert (outcome if expected == 0 else outcome.args[0]) == (self.key, self.key, self)[expected]


async def throw_dice(coalescer, seed, count):
    dice = random.Random(seed)
    asking = []
    for _ in range(count):
        asking.append(asyncio.create_task(Throw(dice).ask(coalescer)))
        if dice.random() < 0.5:
            dice.choice(asking).cancel()
        await let_run(dice.randrange(3))
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    return Counter(
        "cancelled" if isinstance(outcome, asyncio.CancelledError) else repr(outcome) for outcome in outcomes
    )


def test_callers_on_many_loops_that_come_and_go_are_served_whoever_leads(crew):
    """Leaders and waiters are cancelled and fail at random. Nobody hangs, and who stays gets what was computed."""
    coalescer, loops, count = AsyncBatchCoalescer(ttl_seconds=0), 4, 400
    total = Counter()
    for counts in crew.start(loops, lambda number: asyncio.run(throw_dice(coalescer, number, count))).join():
        total += counts
    assert total.keys() == {"None", "cancelled"}
    assert total.total() == loops * count
    wait_until(lambda: "in_flight=0" in repr(coalescer))
    assert len(coalescer) == 0
    assert [coalescer._waiters(key) for key in range(3)] == [0, 0, 0]

"""A call that asks for its own key would wait for itself. It is told so at once; nobody else is."""

import asyncio
import contextvars
import subprocess
import sys
import threading

import pytest
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, RecursiveCallError


@pytest.fixture
def coalescer():
    return AsyncBatchCoalescer(ttl_seconds=60)


def refused():
    pytest.fail("nobody may call this")


async def own():
    return "own"


async def bounded(awaitable):
    """Without the error, the test would hang."""
    async with asyncio.timeout(PATIENCE):
        return await awaitable


async def directly(ask):
    return await ask()


async def through_gather(ask):
    return await asyncio.gather(asyncio.sleep(0), ask())


async def through_a_task(ask):
    return await asyncio.create_task(ask())


async def through_a_task_of_a_task(ask):
    return await asyncio.create_task(through_a_task(ask))


async def through_a_callback(ask):
    started = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(lambda: started.set_result(asyncio.ensure_future(ask())))
    return await (await started)


async def through_a_timeout(ask):
    return await asyncio.wait_for(ask(), PATIENCE)


async def through_an_executor_thread(ask):
    return await asyncio.to_thread(asyncio.run, ask())


async def after_it_has_suspended(ask):
    await asyncio.sleep(0)
    return await ask()


WAYS = [
    directly,
    through_gather,
    through_a_task,
    through_a_task_of_a_task,
    through_a_callback,
    through_a_timeout,
    through_an_executor_thread,
    after_it_has_suspended,
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_that_asks_for_its_own_key_is_told_at_once(coalescer, way):
    async def call():
        return await way(lambda: coalescer.get_or_call("the key", refused))

    with pytest.raises(RecursiveCallError, match="'the key'"):
        await bounded(coalescer.get_or_call("the key", call))
    assert "the key" not in coalescer
    assert await coalescer.get_or_call("the key", own) == "own"


async def test_a_group_in_the_call_that_asks_for_its_key_fails(coalescer):
    async def call():
        async with asyncio.TaskGroup() as group:
            group.create_task(coalescer.get_or_call("k", refused))

    with pytest.raises(ExceptionGroup) as info:
        await bounded(coalescer.get_or_call("k", call))
    assert info.group_contains(RecursiveCallError, depth=1)


async def test_the_callable_may_go_on_after_it_was_told(coalescer):
    async def call():
        try:
            return await coalescer.get_or_call("k", refused)
        except RecursiveCallError:
            return "without"

    assert await bounded(coalescer.get_or_call("k", call)) == "without"
    assert await coalescer.get_or_call("k", refused) == "without"


async def test_a_call_that_asks_for_its_key_through_another_keys_call_is_told(coalescer):
    told = []

    async def ask_a():
        return await coalescer.get_or_call("b", ask_b)

    async def ask_b():
        try:
            await coalescer.get_or_call("a", refused)
        except RecursiveCallError as error:
            told.append(str(error))
            raise

    with pytest.raises(RecursiveCallError):
        await bounded(coalescer.get_or_call("a", ask_a))
    assert len(told) == 1
    assert "'a'" in told[0]
    assert "a" not in coalescer
    assert "b" not in coalescer


async def test_a_long_way_round_is_seen_too(coalescer):
    async def call(number):
        return await coalescer.get_or_call((number + 1) % 20, lambda: call((number + 1) % 20))

    with pytest.raises(RecursiveCallError):
        await bounded(coalescer.get_or_call(0, lambda: call(0)))
    assert len(coalescer) == 0


async def test_a_call_that_asks_through_another_coalescer_is_told(coalescer):
    other = AsyncBatchCoalescer()

    async def call():
        return await other.get_or_call("k", lambda: coalescer.get_or_call("k", refused))

    with pytest.raises(RecursiveCallError):
        await bounded(coalescer.get_or_call("k", call))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks start eagerly since Python 3.12")
async def test_a_call_that_asks_through_an_eager_task_is_told(coalescer):
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)

    async def call():
        return await asyncio.create_task(coalescer.get_or_call("k", refused))

    with pytest.raises(RecursiveCallError):
        await bounded(coalescer.get_or_call("k", call))


# The error is the asker's alone.


async def test_waiters_do_not_share_the_error_and_the_next_of_them_leads(coalescer):
    gate = asyncio.Event()

    async def call():
        await gate.wait()
        return await coalescer.get_or_call("k", refused)

    leader, heir, waiter = (asyncio.create_task(coalescer.get_or_call("k", fn)) for fn in (call, own, refused))
    await let_run()
    gate.set()
    with pytest.raises(RecursiveCallError):
        await leader
    assert await bounded(asyncio.gather(heir, waiter)) == ["own", "own"]


async def test_waiters_of_every_call_on_the_way_take_over(coalescer):
    gate = asyncio.Event()

    async def call_b():
        await gate.wait()
        return await coalescer.get_or_call("a", refused)

    leader = asyncio.create_task(coalescer.get_or_call("a", lambda: coalescer.get_or_call("b", call_b)))
    await let_run()
    heirs = [asyncio.create_task(coalescer.get_or_call(key, own)) for key in ("a", "b")]
    await let_run()
    gate.set()
    with pytest.raises(RecursiveCallError):
        await leader
    assert await bounded(asyncio.gather(*heirs)) == ["own", "own"]


async def test_an_error_made_of_it_is_an_error_like_any_other(coalescer):
    async def call():
        await asyncio.sleep(0)
        try:
            await coalescer.get_or_call("k", refused)
        except RecursiveCallError as error:
            raise LookupError from error

    outcomes = await asyncio.gather(*(coalescer.get_or_call("k", fn) for fn in (call, refused)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [LookupError, LookupError]


# No false alarm.


async def test_a_call_may_ask_for_another_key(coalescer):
    async def call():
        return await coalescer.get_or_call("b", own)

    assert await coalescer.get_or_call("a", call) == "own"


async def test_a_call_may_wait_for_another_keys_call(coalescer):
    held = HeldCall("b")
    other = asyncio.create_task(coalescer.get_or_call("b", held))
    await let_run()
    asking = asyncio.create_task(coalescer.get_or_call("a", lambda: coalescer.get_or_call("b", refused)))
    await let_run()
    assert coalescer._waiters("b") == 1
    held.release()
    assert await asyncio.gather(asking, other) == ["b", "b"]


async def test_a_call_may_ask_another_coalescer_for_the_same_key(coalescer):
    other = AsyncBatchCoalescer()
    assert await coalescer.get_or_call("k", lambda: other.get_or_call("k", own)) == "own"


async def test_who_started_the_leader_is_an_ordinary_caller(coalescer):
    held = HeldCall("value")
    leader = asyncio.create_task(coalescer.get_or_call("k", held))
    await let_run()
    waiter = asyncio.create_task(coalescer.get_or_call("k", refused))
    await let_run()
    held.release()
    assert await asyncio.gather(leader, waiter) == ["value", "value"]


async def test_the_leader_may_ask_again_when_the_call_is_over():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)

    async def call():
        await asyncio.sleep(0)
        return object()

    assert await coalescer.get_or_call("k", call) is not await coalescer.get_or_call("k", call)


async def lead_and_leave_behind(coalescer, fn):
    """A task that the call of "k" has started; it asks for "k" once `gate` is set, which is after that call."""
    gate = asyncio.Event()
    left_behind = []

    async def later():
        await gate.wait()
        return await coalescer.get_or_call("k", fn)

    async def call():
        left_behind.append(asyncio.create_task(later()))
        await asyncio.sleep(0)
        return "first"

    assert await coalescer.get_or_call("k", call) == "first"
    return left_behind[0], gate


async def test_a_task_that_outlives_its_call_may_be_hit():
    coalescer = AsyncBatchCoalescer(ttl_seconds=60)
    later, gate = await lead_and_leave_behind(coalescer, refused)
    gate.set()
    assert await later == "first"


async def test_a_task_that_outlives_its_call_may_lead():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)
    later, gate = await lead_and_leave_behind(coalescer, own)
    gate.set()
    assert await later == "own"


async def test_a_task_that_outlives_its_call_may_join_the_next_one():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)
    later, gate = await lead_and_leave_behind(coalescer, refused)
    held = HeldCall("second")
    leader = asyncio.create_task(coalescer.get_or_call("k", held))
    await let_run()
    gate.set()
    await let_run()
    assert coalescer._waiters("k") == 1
    held.release()
    assert await asyncio.gather(leader, later) == ["second", "second"]


async def test_a_task_that_outlives_its_call_is_seen_as_the_call_that_it_leads_itself():
    coalescer = AsyncBatchCoalescer(ttl_seconds=0)
    later, gate = await lead_and_leave_behind(coalescer, lambda: coalescer.get_or_call("k", refused))
    gate.set()
    with pytest.raises(RecursiveCallError):
        await bounded(later)


async def test_a_task_left_behind_by_a_call_that_others_took_over_is_an_ordinary_caller(coalescer):
    gate, taken_over = asyncio.Event(), HeldCall("taken over")
    left_behind = []

    async def later():
        await gate.wait()
        return await coalescer.get_or_call("k", refused)

    async def call():
        left_behind.append(asyncio.create_task(later()))
        await asyncio.sleep(0)
        raise GeneratorExit

    leader, heir = (asyncio.create_task(coalescer.get_or_call("k", fn)) for fn in (call, taken_over))
    await let_run()
    assert isinstance(leader.exception(), GeneratorExit)
    assert taken_over.calls == 1
    # The same flight, but no longer that call.
    gate.set()
    await let_run()
    assert coalescer._waiters("k") == 1
    taken_over.release()
    assert await asyncio.gather(heir, *left_behind) == ["taken over", "taken over"]


async def test_after_clear_the_callable_may_lead_a_call_of_its_own_key(coalescer):
    async def call():
        coalescer.clear()
        return await coalescer.get_or_call("k", own)

    assert await bounded(coalescer.get_or_call("k", call)) == "own"


async def test_a_task_that_the_call_starts_in_an_empty_context_is_an_ordinary_caller(coalescer):
    """It is the context that tells, so whoever needs to can step out of it."""
    held, waiters = HeldCall("value"), []

    async def call():
        waiters.append(contextvars.Context().run(asyncio.ensure_future, coalescer.get_or_call("k", refused)))
        return await held()

    leader = asyncio.create_task(coalescer.get_or_call("k", call))
    await let_run()
    assert coalescer._waiters("k") == 1
    held.release()
    assert await asyncio.gather(leader, *waiters) == ["value", "value"]


def test_callers_on_another_loop_are_ordinary_callers(coalescer):
    here, there = LoopThread(), LoopThread()
    try:
        held = HeldCall("value")
        leader = here.start(coalescer.get_or_call("k", held))
        assert held.started.wait(PATIENCE)
        waiter = there.start(coalescer.get_or_call("k", refused))
        wait_for_waiters(coalescer, "k", 1)
        held.release()
        assert [leader.result(), waiter.result()] == ["value", "value"]
    finally:
        here.end()
        there.end()


CHAIN = """
import asyncio
import threading

from llm_batch_coalesce import AsyncBatchCoalescer


async def chain(length):
    coalescer, ended = AsyncBatchCoalescer(ttl_seconds=0), asyncio.Event()
    running = set()

    def start(number):
        task = asyncio.create_task(coalescer.get_or_call("k", lambda: call(number)))
        running.add(task)
        task.add_done_callback(running.discard)

    async def call(number):
        if number < length:
            asyncio.get_running_loop().call_soon(start, number + 1)
        else:
            ended.set()

    start(0)
    await ended.wait()
    print(repr(coalescer))


# With a small stack, what grows with the length of the chain shows early.
threading.stack_size(256 * 1024)
thread = threading.Thread(target=asyncio.run, args=(chain(20_000),))
thread.start()
thread.join()
print("done")
"""


def test_calls_that_each_start_the_next_one_leave_nothing_behind():
    """Like a job that starts itself again: each context is a copy of the last one's, whose call is long over."""
    ended = subprocess.run([sys.executable, "-c", CHAIN], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "calls=20001" in ended.stdout
    assert ended.stdout.endswith("done\n")


def test_an_executor_thread_that_the_call_does_not_wait_for_may_ask_when_the_call_is_over():
    coalescer, over = AsyncBatchCoalescer(ttl_seconds=0), threading.Event()

    def later():
        assert over.wait(PATIENCE)
        return asyncio.run(coalescer.get_or_call("k", own))

    async def main():
        started = []

        async def call():
            started.append(asyncio.create_task(asyncio.to_thread(later)))
            await asyncio.sleep(0)
            return "first"

        assert await coalescer.get_or_call("k", call) == "first"
        over.set()
        return await started[0]

    assert asyncio.run(main()) == "own"

"""Two faces of one map: a thread and a task that ask for one key share one call, whoever leads."""

import asyncio
import concurrent.futures
import gc
import threading
import weakref

import pytest
from faces import AskedInThread, HeldInThread, refused
from loops import PATIENCE, HeldCall, LoopThread, wait_for_waiters, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, DeadlockError, RecursiveCallError, _core


class Stop(BaseException):
    """For the leader alone; the next waiter leads."""


class Thing:
    """Something that can be watched and can refer to anything."""


def faces_of_threads(**options):
    coalescer = BatchCoalescer(**options)
    return coalescer, coalescer.as_async()


def faces_of_tasks(**options):
    coalescer = AsyncBatchCoalescer(**options)
    return coalescer.as_sync(), coalescer


@pytest.fixture(params=[faces_of_threads, faces_of_tasks])
def faces(request):
    """Makes a face for threads and one for tasks, of which either is the original."""
    return request.param


def loop_in_a_thread():
    thread = LoopThread()
    yield thread
    thread.end()


loop, other_loop = pytest.fixture(loop_in_a_thread, name="loop"), pytest.fixture(loop_in_a_thread, name="other_loop")


class Pair:
    """A face for threads and one for tasks. Each method starts a caller and returns a function for its result."""

    def __init__(self, threads, tasks):
        self.threads, self.tasks = threads, tasks

    def start(self, work):
        return AskedInThread(work, None).result

    def lead_in_thread(self, held, key="k"):
        result = self.start(lambda: self.threads.get_or_call(key, held))
        assert held.started.wait(PATIENCE)
        return result

    def lead_in_task(self, loop, held, key="k"):
        asked = loop.start(self.tasks.get_or_call(key, held))
        assert held.started.wait(PATIENCE)
        return asked.result

    def _wait(self, start, key):
        waiting = self.threads._waiters(key)
        result = start()
        wait_for_waiters(self.tasks, key, waiting + 1)
        return result

    def wait_in_thread(self, fn, key="k"):
        return self._wait(lambda: self.start(lambda: self.threads.get_or_call(key, fn)), key)

    def wait_in_task(self, loop, fn, key="k"):
        return self._wait(lambda: loop.start(self.tasks.get_or_call(key, fn)).result, key)

    def block(self, loop, fn, key="k"):
        """Let the thread of a loop wait, and with it the loop."""
        return self._wait(lambda: self.start(lambda: loop.do(self.threads.get_or_call, key, fn)), key)


@pytest.fixture
def pair(faces):
    return Pair(*faces(ttl_seconds=60, private_errors=KeyError))


async def own():
    return "own"


# One call, whoever leads.


@pytest.mark.parametrize("task_leads", [True, False])
def test_threads_and_tasks_share_one_call_whoever_leads(pair, loop, other_loop, task_leads):
    held = (HeldCall if task_leads else HeldInThread)(object())
    asked = [pair.lead_in_task(loop, held) if task_leads else pair.lead_in_thread(held)]
    asked += [pair.wait_in_thread(refused) for _ in range(4)]
    asked += [pair.wait_in_task(place, refused) for place in (loop, other_loop, loop)]
    held.release()
    assert {id(each()) for each in asked} == {id(held.value)}
    for face in (pair.threads, pair.tasks):
        assert (face.stats().calls, face.stats().joined) == (1, 7)


@pytest.mark.parametrize("task_leads", [True, False])
def test_the_leader_gets_the_error_and_the_other_side_a_copy(pair, loop, task_leads):
    held = (HeldCall if task_leads else HeldInThread)(error=LookupError("no such model"))
    leader = pair.lead_in_task(loop, held) if task_leads else pair.lead_in_thread(held)
    waiter = pair.wait_in_thread(refused) if task_leads else pair.wait_in_task(loop, refused)
    held.release()
    with pytest.raises(LookupError, match="no such model") as led:
        leader()
    with pytest.raises(LookupError, match="no such model") as joined:
        waiter()
    assert led.value is held.error
    assert joined.value is not held.error


def test_what_one_face_retains_the_other_hits(pair):
    value = object()
    assert pair.threads.get_or_call("thread's", lambda: value) is value
    assert asyncio.run(pair.tasks.get_or_call("thread's", refused)) is value
    assert asyncio.run(pair.tasks.get_or_call("task's", own)) == pair.threads.get_or_call("task's", refused) == "own"
    assert pair.threads.outcome("task's", refused).role == "hit"


# Hand-over.


@pytest.mark.parametrize("error", [KeyError, Stop])
@pytest.mark.parametrize("task_leads", [True, False])
def test_a_private_error_hands_over_between_threads_and_tasks(pair, loop, task_leads, error):
    held = (HeldCall if task_leads else HeldInThread)(error=error())
    leader = pair.lead_in_task(loop, held) if task_leads else pair.lead_in_thread(held)
    heir = pair.wait_in_thread(lambda: "own") if task_leads else pair.wait_in_task(loop, own)
    held.release()
    with pytest.raises(error):
        leader()
    assert heir() == pair.threads.get_or_call("k", refused) == "own"
    assert (pair.tasks.stats().handed_over, pair.tasks.stats().calls) == (1, 2)


def test_a_thread_takes_over_when_the_leaders_loop_is_closed(pair, loop):
    pair.lead_in_task(loop, HeldCall())
    heir = pair.wait_in_thread(lambda: "own")
    loop.close()
    assert heir() == "own"


def test_a_thread_takes_over_when_the_calls_task_is_cancelled(pair, loop):
    held = HeldCall()
    leader, heir = pair.lead_in_task(loop, held), pair.wait_in_thread(lambda: "own")
    loop.do(held.task.cancel)
    assert heir() == "own"
    with pytest.raises(asyncio.CancelledError):
        leader()


def test_a_cancelled_leader_leaves_its_call_to_the_thread_that_waits(pair, loop):
    held = HeldCall("value")
    leader = loop.start(pair.tasks.get_or_call("k", held))
    assert held.started.wait(PATIENCE)
    waiter = pair.wait_in_thread(refused)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        leader.result()
    held.release()
    assert waiter() == "value"
    assert not held.cancelled.is_set()


def test_to_cancel_a_key_wakes_threads_and_tasks(pair, loop):
    held = HeldInThread("value")
    leader = pair.lead_in_thread(held)
    waiters = [pair.wait_in_task(loop, refused), pair.wait_in_thread(refused)]
    assert pair.tasks.cancel("k")
    for waiter, error in zip(waiters, (asyncio.CancelledError, concurrent.futures.CancelledError), strict=True):
        with pytest.raises(error):
            waiter()
    held.release()
    assert leader() == "value"
    assert "k" not in pair.threads


# Threads that run loops.


def test_a_thread_that_would_block_the_loop_that_computes_its_key_is_told(pair, loop):
    held = HeldCall("value")
    leader = pair.lead_in_task(loop, held)
    with pytest.raises(DeadlockError, match="'k'"):
        loop.do(pair.threads.get_or_call, "k", refused)
    held.release()
    assert leader() == "value"


def test_a_thread_that_would_block_a_loop_that_its_key_waits_for_is_told(pair, loop):
    """The loop computes "a", a thread's call of "b" waits for it, and the loop is about to wait for "b"."""
    held = HeldCall("value")
    leader = pair.lead_in_task(loop, held, "a")
    between = pair.start(lambda: pair.threads.get_or_call("b", lambda: pair.threads.get_or_call("a", refused)))
    wait_for_waiters(pair.threads, "a", 1)
    with pytest.raises(DeadlockError, match="'b'"):
        loop.do(pair.threads.get_or_call, "b", refused)
    held.release()
    assert leader() == between() == "value"


def test_of_two_loops_that_block_for_each_other_the_second_is_told(pair, loop, other_loop):
    held = [HeldCall("of the one"), HeldCall("of the other")]
    leaders = [pair.lead_in_task(place, held[key], key) for key, place in enumerate((loop, other_loop))]
    blocked = pair.block(loop, refused, 1)
    with pytest.raises(DeadlockError):
        other_loop.do(pair.threads.get_or_call, 0, refused)
    for each in held:
        each.release()
    assert [leaders[0](), leaders[1](), blocked()] == ["of the one", "of the other", "of the other"]


def test_a_thread_may_block_its_loop_for_a_call_elsewhere(pair, loop, other_loop):
    held = HeldCall("value")
    leader, blocked = pair.lead_in_task(other_loop, held), pair.block(loop, refused)
    held.release()
    assert leader() == blocked() == "value"


def test_a_call_that_asks_in_a_thread_for_its_own_key_is_told(pair, loop):
    async def call():
        return await asyncio.to_thread(pair.threads.get_or_call, "k", refused)

    with pytest.raises(RecursiveCallError, match="'k'"):
        loop.start(pair.tasks.get_or_call("k", call)).result()
    assert loop.start(pair.tasks.get_or_call("k", own)).result() == "own"


def test_a_call_that_asks_the_other_face_for_its_own_key_is_told(pair, loop):
    async def call():
        return pair.threads.get_or_call("k", refused)

    with pytest.raises(RecursiveCallError, match="'k'"):
        loop.start(pair.tasks.get_or_call("k", call)).result()
    with pytest.raises(RecursiveCallError, match="'k'"):
        pair.threads.get_or_call("k", lambda: asyncio.run(pair.tasks.get_or_call("k", refused)))


def test_a_task_whose_loop_is_blocked_comes_last_in_a_hand_over(pair, loop):
    elsewhere, held, taken_over = HeldInThread("elsewhere"), HeldInThread(error=Stop()), HeldInThread("value")
    leaders = [pair.lead_in_thread(held), pair.lead_in_thread(elsewhere, "other")]
    first = pair.wait_in_task(loop, own)
    blocked = pair.block(loop, refused, "other")
    second = pair.wait_in_thread(taken_over)
    held.release()
    with pytest.raises(Stop):
        leaders[0]()
    assert taken_over.started.wait(PATIENCE)
    # The lead was not offered to the task in vain: it still waits.
    assert pair.threads._waiters("k") == 1
    taken_over.release()
    elsewhere.release()
    assert [second(), first(), leaders[1](), blocked()] == ["value", "value", "elsewhere", "elsewhere"]


def test_a_blocked_loops_thread_takes_over_before_a_task_of_that_loop(pair, loop):
    held, taken_over = HeldInThread(error=Stop()), HeldInThread("value")
    leader, task = pair.lead_in_thread(held), pair.wait_in_task(loop, own)
    blocked = pair.block(loop, taken_over)
    held.release()
    with pytest.raises(Stop):
        leader()
    assert taken_over.started.wait(PATIENCE)
    assert pair.threads._waiters("k") == 1
    taken_over.release()
    assert blocked() == task() == "value"


# What faces share.


def test_faces_share_options_stats_and_keys(faces, loop):
    threads, tasks = faces(
        ttl_seconds=60, error_ttl_seconds=0, private_errors=KeyError, max_flight_seconds=9, max_retained=1, name="both"
    )
    assert threads.name == tasks.name == "both"
    for number in range(1_000):
        threads.put(number, number)
    assert len(threads) == len(tasks) < 1_000
    assert threads.stats() == tasks.stats()
    assert tasks.stats().evicted > 0
    tasks.clear()
    for face, other in ((threads, tasks), (tasks, threads)):
        face.put("k", "value")
        assert other.peek("k") == "value"
        assert other.forget("k")
        assert "k" not in face
    with pytest.raises(ZeroDivisionError):
        threads.get_or_call("k", lambda: 1 / 0)
    assert "k" not in tasks
    held = HeldCall("old")
    leader = loop.start(tasks.get_or_call("aged", held))
    assert held.started.wait(PATIENCE)
    assert [flight.key for flight in threads.flights()] == ["aged"]
    _core._advance_clock(10)
    assert threads.get_or_call("aged", lambda: "new") == "new"
    held.release()
    assert leader.result() == "old"
    threads.reset_stats()
    assert tasks.stats().calls == 0


@pytest.mark.parametrize("on_abandoned", ["cancel", "finish"])
def test_a_face_has_its_own_word_on_abandoned_calls(loop, on_abandoned):
    tasks = AsyncBatchCoalescer(ttl_seconds=60).as_sync().as_async(on_abandoned=on_abandoned)
    held = HeldCall("value")
    leader = loop.start(tasks.get_or_call("k", held))
    assert held.started.wait(PATIENCE)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        leader.result()
    if on_abandoned == "cancel":
        assert held.cancelled.wait(PATIENCE)
        assert "k" not in tasks
    else:
        held.release()
        wait_until(lambda: tasks.peek("k") == "value")
    with pytest.raises(ValueError, match="on_abandoned"):
        BatchCoalescer().as_async(on_abandoned="ignore")


# Who keeps whom alive.


def test_a_face_keeps_the_original_alive_but_no_face_in_between():
    first = BatchCoalescer()
    between = first.as_async()
    last, watched = between.as_sync(), [weakref.ref(first), weakref.ref(between)]
    del first, between
    gc.collect()
    assert watched[1]() is None
    last.put("k", 1)
    assert watched[0]().peek("k") == 1
    del last
    gc.collect()
    assert watched[0]() is None


@pytest.mark.parametrize("holder", [0, 1])
def test_a_cycle_of_face_and_original_is_collected(faces, holder):
    pair = faces(ttl_seconds=float("inf"))
    thing, face = Thing(), pair[holder]
    thing.faces = pair
    face.put("value", thing)
    face.put("both", pair)
    face.put(thing, "key")
    watched = [weakref.ref(each) for each in (thing, *pair)]
    del pair, face, thing
    gc.collect()
    assert [each() for each in watched] == [None, None, None]


@pytest.mark.parametrize("kept", [0, 1])
def test_what_any_face_holds_survives_collections(faces, kept):
    pair = faces(ttl_seconds=float("inf"))
    thing = Thing()
    thing.faces, thing.itself = pair, thing
    pair[0].put("k", thing)
    watched, face = weakref.ref(thing), pair[kept]
    del pair, thing
    for _ in range(20):
        gc.collect()
    assert face.peek("k") is watched()
    assert watched().itself is watched()
    assert watched().faces[kept] is face
    face.clear()
    gc.collect()
    assert watched() is None


def test_collections_while_both_faces_are_used_find_the_map_whole(faces, crews):
    (threads, tasks), stop = faces(ttl_seconds=60), threading.Event()

    def ask(number):
        count = 0
        while not stop.is_set():
            thing = Thing()
            thing.faces = (threads, tasks)
            key = (number, count % 50)
            assert threads.get_or_call(key, lambda thing=thing: thing).faces == (threads, tasks)
            tasks.forget((number, (count + 25) % 50))
            count += 1

    asking = crews().start(2, ask)
    for _ in range(50):
        gc.collect()
    stop.set()
    asking.join()

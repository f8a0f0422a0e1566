"""`get_or_call_many` of threads and tasks on one map, on many event loops, 16 at once."""

import asyncio
import random
import threading

import pytest
from batches import HeldBatchInTask, HeldBatchInThread, named, nobody
from faces import AskedInThread, HeldInThread, outcomes, refused
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, MissingKeysError

INF = float("inf")
CALLERS = 16


class LimitError(Exception):
    """Is private."""


@pytest.fixture
def loops():
    made = []

    def make(count):
        made.extend(LoopThread() for _ in range(count))
        return made[-count:]

    yield make
    for loop in made:
        loop.end()


@pytest.fixture
def held_in_thread():
    batch = HeldBatchInThread(named)
    yield batch
    batch.release()


def start(work):
    return AskedInThread(work, None)


async def answer(missing):
    await asyncio.sleep(0)
    return named(missing)


# Who leads and who joins.


@pytest.mark.parametrize("task_leads", [True, False])
def test_a_thread_and_a_task_share_what_either_leads(loops, held_in_thread, task_leads):
    threads, (loop,) = BatchCoalescer(INF), loops(1)
    tasks, held_in_task = threads.as_async(), HeldBatchInTask()
    held = held_in_task if task_leads else held_in_thread
    if task_leads:
        leader = loop.start(tasks.get_or_call_many(["a", "b"], held))
    else:
        leader = start(lambda: threads.get_or_call_many(["a", "b"], held))
    assert held.started.wait(PATIENCE)
    # Each has a key of its own, too, and joins when it has been led.
    others = [
        start(lambda: threads.get_or_call_many(["b", "t", "a"], named)),
        loop.start(tasks.get_or_call_many(["u", "a"], answer)),
        start(lambda: threads.get_or_call("a", refused)),
        loop.start(tasks.get_or_call("b", refused)),
    ]
    wait_for_waiters(threads, "a", 3)
    wait_for_waiters(threads, "b", 2)
    wait_until(lambda: "t" in threads and "u" in threads)
    held.release()
    assert leader.result() == {"a": "of a", "b": "of b"}
    assert outcomes(others) == [{"b": "of b", "t": "of t", "a": "of a"}, {"u": "of u", "a": "of a"}, "of a", "of b"]
    stats = tasks.stats()
    assert (stats.calls, stats.joined) == (4, 5)


@pytest.mark.parametrize("task_waits", [True, False])
@pytest.mark.parametrize("task_leads", [True, False])
def test_a_busy_batch_leads_the_key_itself_when_its_leader_is_gone(loops, held_in_thread, task_leads, task_waits):
    threads, (loop, other_loop) = BatchCoalescer(INF, private_errors=LimitError), loops(2)
    tasks = threads.as_async()
    other = (HeldCall if task_leads else HeldInThread)(error=LimitError())
    leader = loop.start(tasks.get_or_call("x", other)) if task_leads else start(lambda: threads.get_or_call("x", other))
    assert other.started.wait(PATIENCE)
    held = HeldBatchInTask() if task_waits else held_in_thread
    if task_waits:
        busy = other_loop.start(tasks.get_or_call_many(["x", "a"], held))
    else:
        busy = start(lambda: threads.get_or_call_many(["x", "a"], held))
    assert held.started.wait(PATIENCE)
    other.release()
    assert type(outcomes([leader])[0]) is LimitError
    assert "x" not in threads
    held.release()
    assert busy.result() == {"x": "of x", "a": "of a"}
    assert held.asked == [["a"], ["x"]]
    assert threads.stats().in_flight == 0


def test_a_thread_takes_over_from_a_batch_of_a_closed_loop(loops):
    threads, (loop,) = BatchCoalescer(INF), loops(1)
    held = HeldBatchInTask()
    loop.start(threads.as_async().get_or_call_many(["a", "b"], held))
    assert held.started.wait(PATIENCE)
    waiting = start(lambda: threads.get_or_call_many(["b", "c", "a"], named))
    wait_for_waiters(threads, "b", 1)
    wait_until(lambda: "c" in threads)
    loop.close()
    assert waiting.result() == {"b": "of b", "c": "of c", "a": "of a"}
    assert threads.stats().in_flight == 0


def test_a_busy_task_of_a_closed_loop_holds_up_nobody(loops):
    threads, (loop,) = BatchCoalescer(INF, private_errors=LimitError), loops(1)
    first, held = HeldInThread(error=LimitError()), HeldBatchInTask()
    leader = start(lambda: threads.get_or_call("x", first))
    assert first.started.wait(PATIENCE)
    loop.start(threads.as_async().get_or_call_many(["x", "a"], held))
    assert held.started.wait(PATIENCE)
    heir = start(lambda: threads.get_or_call("x", lambda: "own"))
    wait_for_waiters(threads, "x", 2)
    loop.close()
    first.release()
    assert type(outcomes([leader])[0]) is LimitError
    assert heir.result() == "own"


def test_to_cancel_a_key_wakes_the_batches_that_wait_and_spares_those_that_lead(loops, held_in_thread):
    threads, (loop,) = BatchCoalescer(INF), loops(1)
    leader = start(lambda: threads.get_or_call_many(["a", "b"], held_in_thread))
    assert held_in_thread.started.wait(PATIENCE)
    waiting = [
        start(lambda: threads.get_or_call_many(["a"], nobody)),
        loop.start(threads.as_async().get_or_call_many(["a", "b"], answer)),
    ]
    wait_for_waiters(threads, "a", 2)
    assert threads.as_async().cancel("a")
    assert [type(error).__module__.split(".")[0] for error in outcomes(waiting)] == ["concurrent", "asyncio"]
    wait_for_waiters(threads, "b", 0)
    held_in_thread.release()
    assert leader.result() == {"a": "of a", "b": "of b"}
    assert "a" not in threads


# 16 at once.


class Asking:
    """Asks for random sets of keys that overlap with those of the others, and notes what was computed."""

    def __init__(self, threads, seed, retained):
        self.threads, self.tasks = threads, threads.as_async()
        self._seed, self._retained = seed, retained
        self.computed, self.requests, self.lock = [], 0, threading.Lock()

    def _sets(self, number):
        choice = random.Random(1_000 * self._seed + number)
        keys = range(200 if self._retained else 30)
        for _ in range(20):
            yield choice, choice.sample(keys, choice.randint(1, 60 if self._retained else 12))

    def _led(self, choice, missing):
        with self.lock:
            self.computed.extend(missing)
        if self._retained:
            return {key: (key,) for key in missing}
        fate = choice.randrange(6)
        if fate < 2:
            raise (LimitError, LookupError)[fate]
        return {key: (key,) for key in (missing[1:] if fate == 2 else missing)}

    def _check(self, got, wanted, values):
        assert list(values) == wanted
        for key, value in values.items():
            assert value == (key,)
            if self._retained:
                # Whoever asks and whenever, it is the one object that was computed.
                assert got.setdefault(key, value) is value

    def _check_error(self, wanted, error):
        assert not self._retained, error
        with self.lock:
            self.requests += len(wanted)
        if isinstance(error, MissingKeysError):
            assert set(error.missing) <= set(wanted)
            assert error.values == {key: (key,) for key in wanted if key not in error.missing}

    def in_thread(self, number):
        got = {}
        for choice, wanted in self._sets(number):
            try:
                values = self.threads.get_or_call_many(
                    wanted, lambda missing, choice=choice: self._led(choice, missing)
                )
            except (LimitError, LookupError) as error:
                self._check_error(wanted, error)
            else:
                self._check(got, wanted, values)
                with self.lock:
                    self.requests += len(wanted)
        return got

    async def in_task(self, number):
        got = {}
        for choice, wanted in self._sets(number):

            async def work(missing, choice=choice):
                await let_run(choice.randrange(4))
                return self._led(choice, missing)

            try:
                values = await self.tasks.get_or_call_many(wanted, work)
            except (LimitError, LookupError) as error:
                self._check_error(wanted, error)
            else:
                self._check(got, wanted, values)
                with self.lock:
                    self.requests += len(wanted)
        return got


@pytest.mark.parametrize("places", [(1, 0), (4, 0), (2, 8), (1, 8)], ids="{0[0]} loops, {0[1]} threads".format)
@pytest.mark.parametrize("retained", [True, False], ids=["retained", "failing"])
@pytest.mark.parametrize("seed", range(3))
def test_16_callers_with_overlapping_keys_come_to_an_end(loops, crews, seed, places, retained):
    """Retained, each key is computed once. If not, calls fail for all or for one, or lack a key; nothing is lost."""
    threads = BatchCoalescer(INF if retained else 0, private_errors=LimitError)
    (count, share), asking = places, Asking(threads, seed, retained)
    made = loops(count)
    in_threads = crews().start(share, asking.in_thread) if share else None
    asked = [made[number % count].start(asking.in_task(number)) for number in range(share, CALLERS)]
    results = [each.result() for each in asked] + (in_threads.join() if in_threads else [])
    stats = threads.stats()
    assert stats.calls == len(asking.computed)
    assert (stats.timeouts, stats.in_flight) == (0, 0)
    if retained:
        assert sorted(asking.computed) == sorted(set().union(*results))
        for key in range(200):
            assert len({id(got[key]) for got in results if key in got}) <= 1
        assert (stats.errors, stats.cancelled, stats.handed_over) == (0, 0, 0)
    else:
        assert len(threads) == 0
    assert stats.calls + stats.joined + stats.hits + stats.cancelled == asking.requests


@pytest.mark.parametrize("count", [1, 4])
def test_16_tasks_come_to_an_end_though_callers_are_cancelled(loops, count):
    coalescer, places = AsyncBatchCoalescer(0, private_errors=LimitError), loops(count)

    async def ask(number):
        choice = random.Random(number)

        async def work(missing):
            await let_run(choice.randrange(4))
            fate = choice.randrange(6)
            if fate < 2:
                raise (LimitError, LookupError)[fate]
            return [*missing, 1] if fate == 2 else missing

        for _ in range(60):
            wanted = choice.sample(range(30), choice.randint(1, 12))
            task = asyncio.create_task(coalescer.get_or_call_many(wanted, work))
            await let_run(choice.randrange(6))
            if choice.randrange(4) == 0:
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and not isinstance(task.exception(), LimitError | LookupError):
                assert task.result() == {key: key for key in wanted}

    for each in [places[number % count].start(ask(number)) for number in range(CALLERS)]:
        each.result()
    wait_until(lambda: coalescer.stats().in_flight == 0)
    assert len(coalescer) == 0
    wait_until(lambda: not coalescer._tasks)

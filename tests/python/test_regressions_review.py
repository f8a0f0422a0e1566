"""Defects that a later review has found, in streams, batches, woken tasks and exits, each as a caller meets it."""

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading

import pytest
from faces import AskedInThread, HeldInThread, refused
from loops import PATIENCE, LoopThread, let_run, wait_for_waiters, wait_until
from test_fork import Child
from upstreams import HeldStream

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, RecursiveCallError

# A task that has to pull needs no worker of the executor: they may all wait for what it pulls.


@pytest.fixture(params=[1, 2, None], ids=["one worker", "two workers", "as many as asyncio's own"])
def pool(request):
    pool = concurrent.futures.ThreadPoolExecutor(request.param)
    yield pool
    pool.shutdown(wait=False)


@pytest.fixture
def loop(pool):
    loop = LoopThread()
    loop.do(loop.loop.set_default_executor, pool)
    yield loop
    loop.end()


@pytest.fixture
def fill(pool, loop):
    """Give every worker of the loop's executor something to do; returns when all are at it."""

    def fill(work):
        started = threading.Semaphore(0)

        def run():
            started.release()
            return work()

        workers = [loop.start(asyncio.to_thread(run)) for _ in range(pool._max_workers)]
        for _ in workers:
            assert started.acquire(timeout=PATIENCE)
        return workers

    return fill


async def read(stream):
    return [item async for item in stream]


def test_a_task_pulls_for_the_executors_workers_that_read_the_same_stream(loop, fill):
    coalescer, held, go = BatchCoalescer(ttl_seconds=60), HeldStream(range(50)), threading.Event()

    def read_too():
        assert go.wait(PATIENCE)
        return list(coalescer.stream("k", refused))

    workers = fill(read_too)
    leads = coalescer.stream("k", held)
    held.let()
    assert next(leads) == 0
    # The leader does not go on, so it is the task that has to pull.
    reading = loop.start(read(coalescer.as_async().stream("k", refused)))
    loop.start(let_run()).result()
    go.set()
    held.wait_for_pull(2)
    wait_until(lambda: coalescer._readers("k")[0] == 2 + len(workers))
    held.let(50)
    assert [each.result() for each in (reading, *workers)] == [list(range(50))] * (1 + len(workers))


def test_a_task_pulls_while_the_executors_workers_wait_for_it_to_have_read(loop, fill):
    coalescer, has_read = BatchCoalescer(ttl_seconds=0), threading.Event()
    workers = fill(lambda: has_read.wait(PATIENCE))
    leads = coalescer.stream("k", lambda: iter(range(50)))
    assert next(leads) == 0
    assert loop.start(read(coalescer.as_async().stream("k", refused))).result() == list(range(50))
    has_read.set()
    assert all(worker.result() for worker in workers)


# Tasks that are woken in one callback do not depend on each other's steps.


@pytest.fixture
def woken():
    """Run a leader and waiters on a loop of their own, each with what it does next; until something leaves the loop."""
    loop = asyncio.new_event_loop()
    coalescer, go_on = AsyncBatchCoalescer(ttl_seconds=0), asyncio.Event()

    async def call():
        await go_on.wait()
        return "value"

    async def ask(after):
        value = await coalescer.get_or_call("k", call)
        return after(coalescer) if after else value

    async def begin(work):
        tasks = [asyncio.ensure_future(ask(None))]
        await let_run()
        tasks += [asyncio.ensure_future(ask(after)) for after in work]
        await let_run()
        assert coalescer._waiters("k") == len(work)
        return tasks

    def woken(*work):
        tasks = loop.run_until_complete(begin(work))
        loop.call_soon(go_on.set)
        return loop, tasks

    yield woken
    loop.close()


def run_nested(loop, task):
    """Run the loop in a task's step until another task is done, as nest_asyncio does; at most some rounds."""
    current, ready = asyncio.current_task(loop), len(loop._ready)
    asyncio.tasks._leave_task(loop, current)
    for _ in range(100):
        if not task.done():
            loop.call_soon(int)  # so that it never waits
            loop._run_once()
    # The round that this step belongs to has counted its callbacks.
    for _ in range(ready):
        loop.call_soon(int)
    asyncio.tasks._enter_task(loop, current)
    assert task.done(), "the loop does not reach the other task"
    return task.result()


@pytest.mark.parametrize("number", [0, 1])
def test_a_task_may_run_the_loop_until_another_is_done_that_was_woken_with_it(woken, number):
    asked = []
    work = [None, None, None]
    work[number] = lambda _: run_nested(loop, asked[-1])
    loop, tasks = woken(*work)
    asked.extend(tasks)
    loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
    assert [task.result() for task in tasks] == ["value"] * 4


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_in_one_task_comes_out_of_no_other_tasks_call(woken, error):
    def end(number):
        def end(coalescer):
            raise error(number)

        return end

    def go_on(coalescer):
        coalescer.cancel("other")
        return coalescer.as_sync().get_or_call("another", lambda: "goes on")

    loop, tasks = woken(go_on, end(1), go_on, end(2), go_on)
    raised = []
    for _ in range(2):
        with pytest.raises(error) as caught:
            loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
        raised.append(caught.value.args)
    loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
    assert sorted(raised) == [(1,), (2,)]
    assert [task.exception().args for task in (tasks[2], tasks[4])] == [(1,), (2,)]
    assert [tasks[number].result() for number in (0, 1, 3, 5)] == ["value"] + ["goes on"] * 3


# Batches.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_batch_whose_call_forks_calls_in_the_child_for_what_it_had_joined():
    coalescer, held = BatchCoalescer(ttl_seconds=60), HeldInThread("parent's")
    leader = AskedInThread(lambda: coalescer.get_or_call("joined", held), None)
    assert held.started.wait(PATIENCE)
    calls = []
    with Child() as child:

        def call(keys):
            if not calls:
                child.fork()
            calls.append(list(keys))
            if not child.here:
                held.release()
            return dict.fromkeys(keys, "batch's")

        got = coalescer.get_or_call_many(["led", "joined"], call)
        if child.here:
            assert (got, calls) == ({"led": "batch's", "joined": "batch's"}, [["led"], ["joined"]])
            assert coalescer.stats().in_flight == 0
    assert (got, calls) == ({"led": "batch's", "joined": "parent's"}, [["led"]])
    assert leader.result() == "parent's"


class Interrupted(asyncio.SelectorEventLoop):
    """A loop that is hit by Ctrl-C when the main thread tells it something, once it is armed."""

    armed = False

    def call_soon_threadsafe(self, *args, **options):
        handle = super().call_soon_threadsafe(*args, **options)
        if self.armed and threading.current_thread() is threading.main_thread():
            self.armed = False
            signal.raise_signal(signal.SIGINT)
        return handle


@pytest.fixture
def waiters():
    """Starts a task for each key, on a loop that is interrupted when the first is told."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = LoopThread(Interrupted())

    def start(tasks, keys):
        asked = [loop.start(tasks.get_or_call(key, refused)) for key in keys]
        for key in keys:
            wait_for_waiters(tasks, key, 1)
        loop.loop.armed = True
        return asked

    yield start
    loop.loop.armed = False
    loop.end()
    signal.signal(signal.SIGINT, before)


def upper(keys):
    return {key: key.upper() for key in keys}


def test_an_interrupt_while_a_threads_batch_completes_key_after_key_loses_no_value(waiters):
    coalescer, asked = BatchCoalescer(ttl_seconds=60), []

    def call(keys):
        asked.extend(waiters(coalescer.as_async(), keys))
        return upper(keys)

    with pytest.raises(KeyboardInterrupt):
        coalescer.get_or_call_many(["a", "b", "z"], call)
    assert [each.result() for each in asked] == ["A", "B", "Z"]
    assert coalescer.get_or_call_many(["a", "b", "z"], refused) == {"a": "A", "b": "B", "z": "Z"}
    assert (coalescer.stats().calls, coalescer.stats().in_flight) == (3, 0)


def test_an_interrupt_while_a_tasks_batch_completes_key_after_key_loses_no_value(waiters):
    coalescer, loop, go_on = AsyncBatchCoalescer(ttl_seconds=60), asyncio.SelectorEventLoop(), asyncio.Event()

    async def call(keys):
        await go_on.wait()
        return upper(keys)

    asking = loop.create_task(coalescer.get_or_call_many(["a", "b", "z"], call))
    loop.run_until_complete(let_run())
    asked = waiters(coalescer, ["a", "b", "z"])
    go_on.set()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.wait([asking], timeout=PATIENCE))
    assert [each.result() for each in asked] == ["A", "B", "Z"]
    loop.run_until_complete(let_run())
    assert type(asking.exception()) is KeyboardInterrupt
    loop.close()
    assert coalescer.stats().calls == 3


class Asking:
    """A key whose comparison, or hash, asks for what a batch is about to call for."""

    def __init__(self, coalescer, asks_in):
        self.coalescer, self.asks_in, self.asking, self.raised = coalescer, asks_in, False, []

    def _ask(self, where):
        if where != self.asks_in or self.asking:
            return
        self.asking = True
        try:
            if "config" in self.coalescer:
                self.coalescer.get_or_call("config", refused)
        except Exception as error:
            self.raised.append(error)
        finally:
            self.asking = False

    def __hash__(self):
        self._ask("hash")
        return hash("config")

    def __eq__(self, other):
        self._ask("eq")
        return self is other


@pytest.mark.parametrize("asks_in", ["hash", "eq"])
def test_a_key_of_a_batch_that_asks_for_an_earlier_key_of_it_is_told_so_at_once(asks_in):
    coalescer = BatchCoalescer(ttl_seconds=0)
    key = Asking(coalescer, asks_in)
    work = AskedInThread(lambda: coalescer.get_or_call_many(["config", key], lambda keys: [1] * len(keys)), None)
    assert list(work.result().values()) == [1, 1]
    assert {type(error) for error in key.raised} == {RecursiveCallError}
    assert coalescer.get_or_call("config", lambda: 2) == 2


# Daemon threads at work in the user's own code, below the core, when the interpreter ends.

EXIT = """
import asyncio, random, sys, threading, time
from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

keeping, dropping = BatchCoalescer(60), BatchCoalescer(0)
evicting, tasks = BatchCoalescer(60, max_retained=10), AsyncBatchCoalescer(0)
begun = threading.Semaphore(0)

def be_long(*_):
    for _ in range(2000): pass

class Key(int):
    def __hash__(self): return be_long() or int(self)
class Value:
    __del__ = be_long
class Upstream:
    def __iter__(self): return iter([1])
    def __getattr__(self, name):
        be_long()
        raise AttributeError(name)
class Loop(asyncio.SelectorEventLoop):
    def call_soon(self, *args, **options):
        be_long()
        return super().call_soon(*args, **options)

keys = list(map(Key, range(20)))
def generate():
    for number in range(20): yield be_long() or number

def ones(keys): return [1] * len(keys)

def forget():
    key = random.random()
    keeping.get_or_call(key, Value)
    keeping.forget(key)

def read_one(fn):
    stream = dropping.stream(random.random(), fn)
    next(stream)
    stream.close()

WORKS = {
    "keys from a generator": lambda: keeping.get_or_call_many(generate(), ones),
    "keys with a hash": lambda: keeping.get_or_call_many(keys, ones),
    "closed upstreams": lambda: read_one(Upstream),
    "dropped items": lambda: read_one(lambda: iter([Value(), Value(), Value()])),
    "forgotten values": forget,
    "evicted values": lambda: evicting.get_or_call(random.random(), Value),
    "cancelled waiters": lambda: asyncio.Runner(loop_factory=Loop).run(cancel_waiters()),
}

async def forever(): await asyncio.Event().wait()
async def cancel_waiters():
    key = threading.get_ident()
    leader = asyncio.ensure_future(tasks.get_or_call(key, forever))
    await asyncio.sleep(0)
    while True:
        waiters = [asyncio.ensure_future(tasks.get_or_call(key, forever)) for _ in range(100)]
        await asyncio.sleep(0)
        for waiter in waiters: waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        begun.release()

def repeat(work):
    for _ in range(4):
        work()
        begun.release()
    while True:  # nothing else, so that the end most likely comes in the midst of it
        work()

for _ in range(6): threading.Thread(target=repeat, args=(WORKS[sys.argv[1]],), daemon=True).start()
for _ in range(20): begun.acquire()
time.sleep(random.random() * 0.02)
print("done")
"""


OF_BATCHES = ["keys from a generator", "keys with a hash"]
OF_DROPS = ["closed upstreams", "dropped items", "forgotten values", "evicted values"]


@pytest.mark.parametrize("work", [*OF_BATCHES, *OF_DROPS, "cancelled waiters"])
def test_daemon_threads_below_the_core_do_not_hinder_the_exit(work):
    command = [sys.executable, "-c", EXIT, work]
    for _ in range(3):
        ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")

"""A forked child goes on at once with what is retained, and with no flight, whatever the parent was doing."""

import asyncio
import concurrent.futures
import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback

import pytest
from faces import AskedInThread, HeldInThread, refused
from loops import PATIENCE, HeldCall, LoopThread, wait_for_waiters
from watching import Freed

from llm_batch_coalesce import BatchCoalescer, Stats, _core

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    # Python 3.12 and later say so of every fork with threads.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


class Child:
    """A forked child. What fails there ends its `with` block, and fails the parent's with the child's traceback."""

    here, _pid = False, None

    def __enter__(self):
        return self

    def fork(self):
        """True in the child."""
        reading, writing = os.pipe()
        self._pid = os.fork()
        self.here = self._pid == 0
        os.close(reading if self.here else writing)
        self._report = writing if self.here else reading
        if self.here:
            # One that hangs tells where, and is killed.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.register(signal.SIGALRM, writing, all_threads=True, chain=True)
            signal.alarm(20)
        return self.here

    def __exit__(self, kind, error, _):
        if self.here:
            if error is not None:
                os.write(self._report, "".join(traceback.format_exception(error)).encode()[-60_000:])
            os._exit(error is not None)
        if self._pid is None:
            return
        with os.fdopen(self._report, "rb") as pipe:
            report = pipe.read().decode()
        status = os.waitpid(self._pid, 0)[1]
        assert (status, report) == (0, ""), f"in the child: status {status}\n{report}"


class Thing:
    """Something that can be watched."""


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=100)


async def own():
    return "own"


def serve(coalescer, crew, key):
    """Eight threads share a call; its number of calls."""
    calls = []

    def call():
        calls.append(None)
        wait_for_waiters(coalescer, key, 7)
        return "shared"

    assert crew.start(8, lambda _: coalescer.get_or_call(key, call)).join() == ["shared"] * 8
    return len(calls)


def test_what_fails_in_a_child_fails_here():
    """Of the tests themselves: they would else pass whatever happens in their children."""

    def fail_in_a_child():
        with Child() as child:
            if child.fork():
                1 / 0

    with pytest.raises(AssertionError, match=r"(?s)in the child: status 256.*fail_in_a_child.*ZeroDivisionError"):
        fail_in_a_child()


def test_a_child_works_at_once_while_the_parent_has_flights_and_waiters(coalescer, crews):
    tasks, loop = coalescer.as_async(), LoopThread()
    held, held_task = HeldInThread("parent's"), HeldCall("parent's")
    asked = [AskedInThread(lambda: coalescer.get_or_call("thread's", held), None)]
    assert held.started.wait(PATIENCE)
    asked += [loop.start(tasks.get_or_call("task's", held_task))]
    assert held_task.started.wait(PATIENCE)
    for key in ("thread's", "task's"):
        asked += [AskedInThread(lambda key=key: coalescer.get_or_call(key, refused), None) for _ in range(2)]
        asked += [loop.start(tasks.get_or_call(key, refused)) for _ in range(2)]
        wait_for_waiters(coalescer, key, 4)
    with Child() as child:
        if child.fork():
            assert coalescer.flights() == []
            assert len(coalescer) == 0
            assert coalescer.stats() == Stats(*[0] * 10)
            for key in ("thread's", "task's"):
                assert key not in coalescer
                assert coalescer._waiters(key) == 0
                assert not coalescer.forget(key)
                assert not coalescer.cancel(key)
            assert coalescer.get_or_call("thread's", lambda: "child's") == "child's"
            assert asyncio.run(tasks.get_or_call("task's", own)) == coalescer.get_or_call("task's", refused) == "own"
            assert serve(coalescer, crews(), "new") == 1
    assert coalescer.stats().in_flight == 2
    held.release()
    held_task.release()
    assert [each.result() for each in asked] == ["parent's"] * 10
    loop.end()
    assert coalescer.get_or_call("thread's", refused) == "parent's"


def test_what_is_retained_stays_in_the_child_and_expires_there(coalescer):
    value = object()
    coalescer.get_or_call("value", lambda: value)
    with pytest.raises(ZeroDivisionError):
        coalescer.get_or_call("error", lambda: 1 / 0)
    coalescer.put("for long", 1, ttl_seconds=float("inf"))
    with Child() as child:
        if child.fork():
            assert coalescer.stats() == Stats(*[0] * 9, retained=3)
            assert coalescer.get_or_call("value", refused) is value
            with pytest.raises(ZeroDivisionError):
                coalescer.get_or_call("error", refused)
            assert coalescer.stats().hits == 2
            _core._advance_clock(101)
            assert "value" not in coalescer
            assert coalescer.get_or_call("value", lambda: "new") == "new"
            assert coalescer.get_or_call("for long", refused) == 1
    assert coalescer.get_or_call("value", refused) is value


def test_what_expires_in_the_child_is_freed_there_with_nobody_calling(coalescer):
    things = [Thing() for _ in range(10)]
    before = [Freed(thing) for thing in things]
    while things:
        coalescer.put(len(things), things.pop())
    with Child() as child:
        if child.fork():
            thing = Thing()
            after = Freed(thing)
            coalescer.put("child's", thing)
            del thing
            assert not any(event.is_set() for event in [*before, after])
            _core._advance_clock(101)
            assert all(event.wait() for event in [*before, after])
    assert not any(event.is_set() for event in before)
    coalescer.clear()
    assert all(event.wait() for event in before)


def test_a_thread_that_was_looking_for_a_key_when_the_parent_forked_keeps_nothing_of_the_childs_alive(coalescer):
    looking, go_on = threading.Event(), threading.Event()

    class Key:
        def __hash__(self):
            return 1_000_003

        def __eq__(self, other):
            looking.set()
            return go_on.wait(PATIENCE)

    coalescer.put(Key(), "value")
    asked = AskedInThread(lambda: coalescer.get_or_call(Key(), refused), None)
    assert looking.wait(PATIENCE)
    with Child() as child:
        if child.fork():
            events = []
            for key in range(100):
                thing = Thing()
                events.append(Freed(thing))
                coalescer.put(key, thing)
            del thing
            _core._advance_clock(101)
            assert all(event.wait() for event in events)
    go_on.set()
    assert asked.result() == "value"


@pytest.mark.parametrize("way", ["returns", "raises", "asks"])
def test_a_callable_that_forks_gives_the_childs_caller_its_result_and_publishes_nothing(coalescer, way):
    """In the child it may even ask for its own key, since the flight that it is part of is the parent's."""
    waiters = []
    with Child() as child:

        def call():
            waiters.append(AskedInThread(lambda: coalescer.get_or_call("k", refused), None))
            wait_for_waiters(coalescer, "k", 1)
            if not child.fork():
                return "parent's"
            if way == "raises":
                raise LookupError
            return coalescer.get_or_call("k", lambda: "inner") if way == "asks" else "child's"

        try:
            result = coalescer.get_or_call("k", call)
        except LookupError:
            result = "failed"
        if child.here:
            assert result == {"returns": "child's", "raises": "failed", "asks": "inner"}[way]
            assert coalescer.forget("k") == (way == "asks")
            assert coalescer.stats().calls == (way == "asks")
            assert coalescer.get_or_call("k", lambda: "new") == "new"
    assert result == coalescer.get_or_call("k", refused) == waiters[0].result() == "parent's"


@pytest.mark.parametrize("asks", [True, False])
def test_a_child_may_fork_again_whether_it_has_asked_for_anything_or_not(coalescer, crews, asks):
    coalescer.put("from the parent", 1)
    with Child() as child:
        if child.fork():
            if asks:
                coalescer.put("from the child", 2)
            with Child() as grandchild:
                if grandchild.fork():
                    assert coalescer.get_or_call("from the parent", refused) == 1
                    assert coalescer.peek("from the child") == (2 if asks else None)
                    assert serve(coalescer, crews(), "k") == 1
                    event = Freed(coalescer.get_or_call("thing", Thing))
                    _core._advance_clock(101)
                    assert event.wait()
            assert serve(coalescer, crews(), "k") == 1
    assert "from the child" not in coalescer


def test_a_server_that_loads_the_app_and_then_forks_its_workers(coalescer, crews):
    """Each worker has calls of its own, in threads and on a loop, and all have what was warmed before."""
    tasks = coalescer.as_async()
    assert serve(coalescer, crews(), "warm") == 1
    assert asyncio.run(tasks.get_or_call("warm too", own)) == "own"

    async def serve_tasks():
        return await asyncio.gather(*(tasks.get_or_call(n % 3, own) for n in range(30)))

    with contextlib.ExitStack() as stack:
        for worker in [stack.enter_context(Child()) for _ in range(4)]:
            if worker.fork():
                assert coalescer.get_or_call("warm", refused) == "shared"
                assert coalescer.get_or_call("warm too", refused) == "own"
                assert serve(coalescer, crews(), "k") == 1
                assert asyncio.run(serve_tasks()) == ["own"] * 30
                assert coalescer.stats().calls == 4
                break
    assert "k" not in coalescer


OF_POOLS = BatchCoalescer(ttl_seconds=100)


def work_in_pool(number):
    calls = []
    assert OF_POOLS.get_or_call("warm", refused) == "from the parent"
    OF_POOLS.get_or_call("k", lambda: calls.append(None))
    return number, os.getpid(), len(calls)


def test_a_pool_of_forked_processes():
    OF_POOLS.put("warm", "from the parent")
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        results = list(pool.map(work_in_pool, range(40), timeout=PATIENCE))
        # One call for each process, and none of them is the parent's.
        assert sum(calls for *_, calls in results) == len({pid for _, pid, _ in results} - {os.getpid()})
    assert "k" not in OF_POOLS


def run(program):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_a_child_exits_as_any_program_does():
    program = """
import os, threading
from llm_batch_coalesce import BatchCoalescer
coalescer = BatchCoalescer()
for _ in range(3):
    threading.Thread(target=coalescer.get_or_call, args=("held", threading.Event().wait), daemon=True).start()
while coalescer._waiters("held") < 2:
    pass
coalescer.put("k", 1)
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
else:
    coalescer.get_or_call("k2", lambda: 1)
print("done", flush=True)
"""
    assert run(program) == "done\ndone\n"


UNDER_LOAD = """
import asyncio, faulthandler, logging, os, random, signal, sys, threading
from llm_batch_coalesce import BatchCoalescer, CoalesceError

sys.setswitchinterval(0.0005)
faulthandler.enable()
logging.disable()
coalescer = BatchCoalescer(ttl_seconds=0.001, error_ttl_seconds=0, max_retained=50, max_flight_seconds=0.05)
tasks, stop = coalescer.as_async(), threading.Event()

def hammer(seed):
    numbers = random.Random(seed)
    # Its naps leave the children a processor.
    while not stop.wait(numbers.choice([0, 0, 0, 0.001])):
        one, other = numbers.randrange(30), numbers.randrange(30)
        try:
            timeout = numbers.choice([None, 0.001])
            coalescer.get_or_call(one, lambda: coalescer.get_or_call(other, object), timeout=timeout)
            coalescer.get_or_call(other, lambda: one // (other % 3))
            coalescer.forget(one)
        except (CoalesceError, TimeoutError, ZeroDivisionError):
            pass

async def hammer_with_tasks():
    async def call():
        await asyncio.sleep(0.0005)
    while not stop.is_set():
        await asyncio.gather(*(tasks.get_or_call(number, call) for number in range(10)), return_exceptions=True)

threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(3)]
threads += [threading.Thread(target=lambda: asyncio.run(hammer_with_tasks()))]
for thread in threads:
    thread.start()
coalescer.put("warm", 1, ttl_seconds=100)

def work():
    assert coalescer.stats().in_flight == 0
    for key in [*range(9), "warm"]:
        coalescer.get_or_call(key, lambda: coalescer.get_or_call((key,), object))
    assert coalescer.stats().in_flight == 0

def ends_well(pid):
    pause = threading.Event()
    for _ in range(5_000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        pause.wait(0.002)
    # It tells where it hangs.
    os.kill(pid, signal.SIGABRT)
    os.waitpid(pid, 0)

running, ended = [], 0
for _ in range(1_000):
    running.append(os.fork())
    if running[-1] == 0:
        try:
            work()
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    if len(running) == 4:
        ended += sum(map(bool, map(ends_well, running)))
        running.clear()
stop.set()
for thread in threads:
    thread.join()
print(ended, coalescer.stats().in_flight)
"""


def test_a_thousand_forks_under_load():
    assert run(UNDER_LOAD) == "1000 0\n"

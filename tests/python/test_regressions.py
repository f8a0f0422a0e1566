"""Defects that a review has found, each as a caller meets it."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading

import pytest
from faces import AskedInThread, HeldInThread, refused
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

PROLOGUE = """
import asyncio, sys, threading
from dataclasses import dataclass
from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _core

def wait_until(condition):
    pause = threading.Event()
    while not condition():
        pause.wait(0.002)
"""


def run(program):
    ended = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program], capture_output=True, text=True, timeout=50, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


# A daemon thread that takes the interpreter while it finalizes is unwound: that must not go through compiled frames.

EXIT = """
retaining, retaining_nothing = BatchCoalescer(ttl_seconds=100), BatchCoalescer(ttl_seconds=0)
tasks = AsyncBatchCoalescer(ttl_seconds=0)
busy = threading.Semaphore(0)

@dataclass(frozen=True)
class Key:
    a: str
    b: int

def fail():
    raise ValueError("broken")

def copied_error():
    try:
        retaining.get_or_call("k", fail)
    except ValueError:
        pass

def failing_miss():
    try:
        retaining_nothing.get_or_call("k", fail)
    except ValueError:
        pass

def hash_in_python():
    retaining.get_or_call(Key("a", 1), int)

def outcome_of_a_hit():
    retaining.outcome("k", int)

def refused_request():
    try:
        retaining.get_or_call("k", int, timeout=-1)
    except ValueError:
        pass

async def call():
    await asyncio.sleep(0)
    return 1

async def many_tasks():
    while True:
        for _ in range(5):
            await asyncio.gather(*(tasks.get_or_call("k", call) for _ in range(20)))
        busy.release()

def repeat(work):
    while True:
        for _ in range(100):
            work()
        busy.release()

for _ in range(THREADS):
    threading.Thread(target=WORK, daemon=True).start()
for _ in range(3 * THREADS):
    busy.acquire()
print("done")
"""


@pytest.mark.parametrize(
    "work", ["copied_error", "failing_miss", "hash_in_python", "outcome_of_a_hit", "refused_request", "many_tasks"]
)
def test_daemon_threads_at_work_do_not_hinder_the_exit(work):
    if work == "many_tasks":
        program = EXIT.replace("WORK", "lambda: asyncio.run(many_tasks())").replace("THREADS", "2")
    else:
        program = EXIT.replace("WORK", f"lambda: repeat({work})").replace("THREADS", "4")
    for _ in range(4):
        assert run(program) == "done\n"


# The flight holds what wakes its waiters, and the collector has to see that.


def test_a_collection_leaves_tasks_alone_that_nobody_but_a_flight_holds():
    coalescer, held, results = AsyncBatchCoalescer(ttl_seconds=0), HeldCall("value"), []

    async def ask():
        results.append(await coalescer.get_or_call("k", held))

    async def main():
        for _ in range(3):
            asyncio.ensure_future(ask())  # noqa: RUF006 - that is the point
        await let_run()
        for _ in range(5):
            gc.collect()
        held.release()
        await let_run()

    asyncio.run(main())
    assert results == ["value"] * 3


def test_a_collection_leaves_tasks_alone_that_wait_for_a_thread():
    coalescer, held, results = AsyncBatchCoalescer(ttl_seconds=0), HeldInThread("value"), []
    leader = AskedInThread(lambda: coalescer.as_sync().get_or_call("k", held), None)
    assert held.started.wait(PATIENCE)
    got = threading.Semaphore(0)

    async def ask():
        results.append(await coalescer.get_or_call("k", refused))
        got.release()

    async def main():
        for _ in range(3):
            asyncio.ensure_future(ask())  # noqa: RUF006 - that is the point
        await let_run()
        for _ in range(5):
            gc.collect()
        held.release()
        for _ in range(3):
            assert await asyncio.to_thread(got.acquire, timeout=PATIENCE)

    asyncio.run(main())
    assert leader.result() == "value"
    assert results == ["value"] * 3


# What a signal handler raises while waiters are being woken is for the main thread, and holds up nobody.


class Interrupt(KeyboardInterrupt):
    pass


@pytest.fixture
def interrupting():
    """A loop that is hit by a signal when it is told of what `hit` is called for, counted from now."""

    def handle(*_):
        raise Interrupt

    class Interrupting(asyncio.SelectorEventLoop):
        hits = ()
        told = 0

        def _tell(self):
            self.told += 1
            if self.told in self.hits:
                signal.raise_signal(signal.SIGUSR1)

        def call_soon(self, *args, **options):
            handle = super().call_soon(*args, **options)
            self._tell()
            return handle

        def call_soon_threadsafe(self, *args, **options):
            handle = super().call_soon_threadsafe(*args, **options)
            self._tell()
            return handle

        def hit(self, *numbers):
            self.hits, self.told = numbers, 0

    before = signal.signal(signal.SIGUSR1, handle)
    loop = Interrupting()
    yield loop
    loop.close()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupt_while_tasks_of_the_running_loop_are_woken_is_not_swallowed(interrupting, number):
    coalescer, go_on = AsyncBatchCoalescer(ttl_seconds=0), asyncio.Event()

    async def call():
        await go_on.wait()
        interrupting.hit(number)
        return "value"

    async def begin():
        asked = [asyncio.ensure_future(coalescer.get_or_call("k", call)) for _ in range(10)]
        await let_run()
        return asked

    async def go():
        go_on.set()
        await asyncio.gather(*asked, return_exceptions=True)

    asked = interrupting.run_until_complete(begin())
    with pytest.raises(Interrupt):
        interrupting.run_until_complete(go())
    interrupting.hit()
    # The leader's task raises what has come out of its call, as any task does that awaits another.
    with pytest.raises(Interrupt):
        interrupting.run_until_complete(asyncio.wait(asked))
    interrupting.run_until_complete(asyncio.wait(asked))
    assert isinstance(asked[0].exception(), Interrupt)
    assert [each.result() for each in asked[1:]] == ["value"] * 9
    assert len(coalescer) == 0


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signal")
def test_an_interrupt_while_other_loops_are_told_reaches_the_leader(interrupting):
    threads = BatchCoalescer(ttl_seconds=60)
    tasks, loop, other = threads.as_async(), LoopThread(interrupting), LoopThread()
    asked = []

    def call():
        asked.extend(place.start(tasks.get_or_call("k", refused)) for place in (loop, other, loop))
        wait_for_waiters(threads, "k", 3)
        interrupting.hit(1)
        return "value"

    try:
        with pytest.raises(Interrupt):
            threads.get_or_call("k", call)
        interrupting.hit()
        assert [each.result() for each in asked] == ["value"] * 3
        assert threads.get_or_call("k", refused) == "value"
    finally:
        loop.end()
        other.end()


# The rest.


@pytest.mark.skipif(sys.platform != "linux", reason="takes memory away as Linux does")
def test_a_sweeper_that_could_not_start_starts_later():
    program = """
import resource, weakref

class Thing:
    pass

def make():
    thing = Thing()
    alive.add(thing)
    return thing

alive, coalescer = weakref.WeakSet(), BatchCoalescer(ttl_seconds=0.3)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
# No room for another thread's stack.
resource.setrlimit(resource.RLIMIT_AS, (used + 1024 * 1024, hard))
coalescer.get_or_call("first", make)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
with open("/proc/self/stat") as stat:
    assert stat.read().rsplit(")")[-1].split()[17] == "1", "the sweeper has started"
for number in range(100):
    coalescer.get_or_call(number, make)
# Nobody moves the clock: that would wake the sweeper whatever it waits for.
wait_until(lambda: not alive)
print("freed")
"""
    assert run(program) == "freed\n"


def test_a_second_import_leaves_coalescers_at_work():
    """As tools do that reload what they test."""
    program = """
import llm_batch_coalesce as first

def fail():
    raise LookupError("broken")

def forget_modules():
    for name in [name for name in sys.modules if name.startswith("llm_batch_coalesce")]:
        del sys.modules[name]

coalescer = first.BatchCoalescer(ttl_seconds=100)
calls, go_on, results = [], threading.Event(), []
def call():
    calls.append(None)
    go_on.wait()
    return "value"
threads = [threading.Thread(target=lambda: results.append(coalescer.get_or_call("k", call))) for _ in range(4)]
threads[0].start()
wait_until(lambda: calls)
try:
    coalescer.get_or_call("failing", fail)
except LookupError:
    pass
for _ in range(2):
    forget_modules()
    import llm_batch_coalesce as again
for thread in threads[1:]:
    thread.start()
wait_until(lambda: coalescer._waiters("k") == 3)
go_on.set()
for thread in threads:
    thread.join()
assert results == ["value"] * 4, results
assert calls == [None], calls
for _ in range(2):
    try:
        coalescer.get_or_call("failing", call)
    except LookupError:
        pass
try:
    coalescer.get_or_call("own", lambda: coalescer.get_or_call("own", call))
except first.RecursiveCallError:
    pass
assert coalescer.outcome("k", call).role == "hit"
other = again.BatchCoalescer(ttl_seconds=100)
assert [other.get_or_call("k", lambda: "other's") for _ in range(2)] == ["other's"] * 2
print("done")
"""
    assert run(program) == "done\n"


def test_an_offer_to_tasks_of_a_closed_loop_goes_on_to_the_next_at_once():
    """Nothing but the offer itself can do it here: the sweeper is stopped."""
    program = """
tasks = AsyncBatchCoalescer(ttl_seconds=0)
threads, go_on, closed, kept, results = tasks.as_sync(), threading.Event(), asyncio.new_event_loop(), [], []

class Stop(BaseException):
    pass

def call():
    go_on.wait()
    raise Stop

def lead():
    try:
        threads.get_or_call("k", call)
    except Stop:
        results.append("stopped")

async def own():
    return "own"

async def spawn():
    kept.extend(asyncio.ensure_future(tasks.get_or_call("k", own)) for _ in range(4))
    while tasks._waiters("k") < 4:
        await asyncio.sleep(0)

leader = threading.Thread(target=lead)
leader.start()
wait_until(lambda: "k" in tasks)
closed.run_until_complete(spawn())
closed.close()
heir = threading.Thread(target=lambda: results.append(asyncio.run(tasks.get_or_call("k", own))))
heir.start()
wait_until(lambda: tasks._waiters("k") == 5)
_core._stop_sweeper()
go_on.set()
heir.join()
leader.join()
print(sorted(results))
for task in kept:
    task._log_destroy_pending = False
"""
    assert run(program) == "['own', 'stopped']\n"

"""A forked child has the streams that are retained, and waits for nobody who has stayed in the parent."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
from faces import refused
from loops import LoopThread
from test_fork import Child
from upstreams import HeldAsyncStream, HeldStream, Reader, wait_for_readers

from llm_batch_coalesce import BatchCoalescer, SharedCallError, _core

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    # Python 3.12 and later say so of every fork with threads.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=100)


@pytest.fixture
def loop():
    loop = LoopThread()
    yield loop
    loop.end()


async def read(stream):
    return [item async for item in stream]


def yields(*items):
    async def generate():
        for item in items:
            yield item

    return generate


def works(coalescer, key):
    """Read new streams of the key, in threads and tasks, in this process."""
    held = HeldStream("ab")
    readers = [Reader().start(coalescer, held, key)]
    held.wait_for_pull()
    readers += [Reader().start(coalescer, refused, key) for _ in range(3)]
    wait_for_readers(coalescer, 4, 3, key)
    held.let(3)
    assert [reader.result() for reader in readers] == [(["a", "b"], None)] * 4
    assert coalescer.forget(key)
    assert asyncio.run(read(coalescer.as_async().stream(key, yields(1, 2)))) == [1, 2]
    assert list(coalescer.stream(key, refused)) == [1, 2]


def is_lost(stream):
    with pytest.raises(SharedCallError, match="is gone"):
        next(stream)
    return list(stream) == []


def test_a_child_reads_what_is_retained_and_it_expires_there(coalescer):
    items = [object(), object()]
    assert list(coalescer.stream("k", lambda: items)) == items
    with pytest.raises(ZeroDivisionError):
        list(coalescer.stream("failed", lambda: (1 / 0 for _ in "a")))
    half = coalescer.stream("k", refused)
    assert next(half) is items[0]
    with Child() as child:
        if child.fork():
            assert list(half) == items[1:]
            assert list(coalescer.stream("k", refused)) == items
            with pytest.raises(ZeroDivisionError):
                list(coalescer.stream("failed", refused))
            assert asyncio.run(read(coalescer.as_async().stream("k", refused))) == items
            _core._advance_clock(101)
            assert "k" not in coalescer
            works(coalescer, "k")
    assert list(coalescer.stream("k", refused)) == items


@pytest.mark.parametrize("led_by", ["thread", "task"])
def test_a_child_waits_for_nobody_who_stayed_in_the_parent(coalescer, loop, led_by):
    if led_by == "thread":
        held = HeldStream("abc")
        leader = Reader().start(coalescer, held)
    else:
        held = HeldAsyncStream("abc")
        leader = Reader().start(coalescer.as_async(), held, loop=loop)
    held.wait_for_pull()
    nothing, one, two = (coalescer.stream("k", lambda: ["child's"]) for _ in range(3))
    held.let(2)
    leader.wait_for(2)
    held.wait_for_pull(3)
    assert [next(one), next(two), next(two)] == ["a", "a", "b"]
    with Child() as child:
        if child.fork():
            assert (coalescer.flights(), len(coalescer), coalescer._readers("k")) == ([], 0, (0, 0))
            # What is there it reads.
            assert next(one) == "b"
            assert is_lost(one)
            assert is_lost(two)
            assert list(nothing) == ["child's"]
            assert coalescer.stats().in_flight == 0
            works(coalescer, "k2")
    held.let(2)
    assert leader.result() == (["a", "b", "c"], None)
    assert [list(nothing), list(one), list(two)] == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_a_reader_that_waited_for_its_first_item_starts_over_in_the_child(coalescer):
    held = HeldStream("abc")
    leader = Reader().start(coalescer, held)
    held.wait_for_pull()
    stream = coalescer._open("k", None, None, False)
    assert coalescer._readers("k") == (2, 0)
    with Child() as child:
        if child.fork():
            assert stream.take() == "again"
            assert stream.wait()
            stream.leave()
            works(coalescer, "k")
    stream.leave()
    held.let(4)
    assert leader.result() == (["a", "b", "c"], None)


def test_the_reader_that_pulled_itself_has_lost_its_stream_too(coalescer):
    """Both processes would pull the same upstream."""
    closed = []

    def generate():
        try:
            yield from range(5)
        finally:
            closed.append(os.getpid())

    stream = coalescer.stream("k", generate)
    assert next(stream) == 0
    with Child() as child:
        if child.fork():
            assert is_lost(stream)
            works(coalescer, "k")
    assert (list(stream), closed) == ([1, 2, 3, 4], [os.getpid()])


def test_a_reader_may_leave_in_the_child(coalescer, loop):
    held = HeldAsyncStream("ab")
    leader = Reader().start(coalescer.as_async(), held, loop=loop)
    held.wait_for_pull()
    held.let()
    leader.wait_for(1)
    one, other = coalescer.stream("k", refused), coalescer.stream("k", refused)
    assert next(one) == next(other) == "a"
    with Child() as child:
        if child.fork():
            one.close()
            del other
            works(coalescer, "k")
    held.let(2)
    assert leader.result() == (["a", "b"], None)
    assert list(one) == list(other) == ["b"]


def test_an_upstream_that_forks(coalescer):
    with Child() as child:

        def generate():
            yield "a"
            child.fork()
            yield "child's" if child.here else "parent's"
            yield "c"

        stream = coalescer.stream("k", generate)
        assert next(stream) == "a"
        item = next(stream)
        if child.here:
            assert item == "child's"
            assert is_lost(stream)
            assert "k" not in coalescer
            works(coalescer, "k")
    assert (item, list(stream)) == ("parent's", ["c"])
    assert list(coalescer.stream("k", refused)) == ["a", "parent's", "c"]


UNDER_LOAD = """
import asyncio, faulthandler, os, random, signal, sys, threading
from llm_batch_coalesce import BatchCoalescer, SharedCallError

sys.setswitchinterval(0.0005)
faulthandler.enable()
coalescer = BatchCoalescer(ttl_seconds=0.001)
tasks, stop = coalescer.as_async(), threading.Event()

def generate():
    for item in range(20):
        yield item

async def generate_in_task():
    for item in range(20):
        yield item
        await asyncio.sleep(0)

def hammer(seed):
    numbers = random.Random(seed)
    while not stop.wait(numbers.choice([0, 0, 0, 0.001])):
        with coalescer.stream(numbers.randrange(5), generate) as stream:
            for item in stream:
                if numbers.random() < 0.01:
                    break

async def hammer_with_tasks():
    async def read(key):
        return [item async for item in tasks.stream(key, generate_in_task)]
    while not stop.is_set():
        await asyncio.gather(*(read(number % 5) for number in range(10)))

# asyncio's own lock must not be held in a fork.
asyncio.new_event_loop().close()
threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(3)]
threads += [threading.Thread(target=lambda: asyncio.run(hammer_with_tasks()))]
for thread in threads:
    thread.start()

def work(streams):
    for stream in streams:
        try:
            list(stream)
        except SharedCallError:
            pass
    for key in range(5):
        assert list(coalescer.stream(key, generate)) == list(range(20))
        assert asyncio.run(read(key + 10)) == list(range(20))
    assert coalescer.stats().in_flight == 0

async def read(key):
    return [item async for item in tasks.stream(key, generate_in_task)]

ended = 0
for number in range(300):
    streams = [coalescer.stream(key, generate) for key in range(5)]
    for stream in streams[number % 2:]:
        next(stream)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        try:
            work(streams)
            os._exit(0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    ended += os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
del streams, stream
print(ended, coalescer.stats().in_flight)
"""


def test_many_forks_under_load():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", UNDER_LOAD]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "300 0\n", "")


def test_daemons_of_the_parent_do_not_hinder_the_exit_of_a_child():
    program = """
import os, threading
from llm_batch_coalesce import BatchCoalescer
coalescer = BatchCoalescer()
def generate():
    yield 1
    threading.Event().wait()
for _ in range(3):
    threading.Thread(target=list, args=(coalescer.stream("k", generate),), daemon=True).start()
while coalescer._readers("k") != (3, 2):
    pass
stream = coalescer.stream("k", generate)
next(stream)
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
print("done", flush=True)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\ndone\n", "")
    assert threading.active_count() < 50

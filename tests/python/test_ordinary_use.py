"""What users do with any class or function: subclass it, decorate what is decorated, run it on other versions."""

import asyncio
import functools
import subprocess
import sys

import pytest

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

KINDS = [BatchCoalescer, AsyncBatchCoalescer]


@pytest.mark.parametrize("kind", KINDS)
def test_a_subclass_may_have_a_constructor_of_its_own(kind):
    class Own(kind):
        def __init__(self, client, seconds):
            super().__init__(ttl_seconds=seconds, name="own")
            self.client = client

    own = Own("client", 77.0)
    assert (own.client, own.name) == ("client", "own")
    assert "ttl_seconds=77.0" in repr(own)
    own.put("k", 1)
    assert own.peek("k") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_of_a_subclass_are_refused_as_ever(kind):
    class Own(kind):
        def __init__(self):
            super().__init__(ttl_seconds=-1)

    with pytest.raises(ValueError, match="ttl_seconds must be zero or more seconds, not -1"):
        Own()
    with pytest.raises(TypeError, match="unexpected keyword argument 'ttl'"):
        kind(ttl=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coalescer_in_use_is_not_made_anew(kind):
    coalescer = kind(ttl_seconds=60)
    coalescer.put("k", 1)
    with pytest.raises(RuntimeError, match="__init__ is called once"):
        coalescer.__init__(ttl_seconds=1)
    assert coalescer.peek("k") == 1
    assert "ttl_seconds=60.0" in repr(coalescer)


def test_any_int_is_a_timeout():
    async def call():
        return "value"

    assert BatchCoalescer().get_or_call("k", lambda: "value", timeout=10**400) == "value"
    assert asyncio.run(AsyncBatchCoalescer().get_or_call("k", call, timeout=10**400)) == "value"


def hands_in_a_connection(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn("connection", *args, **kwargs)

    return wrapper


def test_a_function_that_gets_arguments_handed_in_is_keyed_by_those_of_its_caller():
    @BatchCoalescer().coalesced()
    @hands_in_a_connection
    def query(connection, limit=1, page=2):
        return connection, limit, page

    assert query(7) == ("connection", 7, 2)
    assert query(7, 1) == ("connection", 7, 1)
    assert query(page=3) == ("connection", 1, 3)


# Gives a Python that has it not what free-threaded 3.14 does: threads begin in a copy of their starter's context.
THREADS_INHERIT = """
import asyncio, contextvars, sys, threading, types
if not hasattr(sys.flags, "thread_inherit_context"):
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if not name.startswith("_")}
    sys.flags = types.SimpleNamespace(**flags, thread_inherit_context=1)
    start_thread = threading.Thread.start

    def start(thread):
        thread._context, run = contextvars.copy_context(), thread.run
        thread.run = lambda: thread._context.run(run)
        start_thread(thread)

    threading.Thread.start, threading.Thread._context = start, None

from llm_batch_coalesce import AsyncBatchCoalescer, RecursiveCallError

coalescer = AsyncBatchCoalescer()
threads = coalescer.as_sync()
asked = []


async def asks_through_a_new_worker():
    return await asyncio.to_thread(threads.get_or_call, "k", lambda: 1)


async def starts_a_thread():
    thread = threading.Thread(target=lambda: asked.append(threads.get_or_call("other", lambda: 1, timeout=20)))
    thread.start()
    while coalescer._waiters("other") < 1:
        await asyncio.sleep(0.001)
    return thread


async def main():
    try:
        await coalescer.get_or_call("k", asks_through_a_new_worker)
    except RecursiveCallError:
        asked.append("refused")
    thread = await coalescer.get_or_call("other", starts_a_thread)
    await asyncio.get_running_loop().run_in_executor(None, thread.join)
    print(asked[0], asked[1] is thread)


asyncio.run(main())
"""


def test_threads_that_inherit_a_context_are_part_of_a_call_only_if_they_run_something_in_it():
    command = [sys.executable, "-X", "thread_inherit_context=1", "-c", THREADS_INHERIT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.stdout, ended.stderr) == ("refused True\n", "")


# What gevent's and eventlet's monkey patching does: a "thread" is run by and by, in this very thread.
PATCHED_THREADS = """
import _thread, weakref
_thread.start_new_thread = lambda function, arguments: function(*arguments)

from llm_batch_coalesce import BatchCoalescer

class Thing:
    pass

coalescer = BatchCoalescer(ttl_seconds=0.05)
gone = weakref.ref(coalescer.get_or_call("k", Thing))
import time
while gone() is not None:
    time.sleep(0.01)
print("freed")
"""


def test_the_sweeper_has_a_thread_of_its_own_where_threads_are_patched():
    command = [sys.executable, "-c", PATCHED_THREADS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "freed\n", "")


def test_a_call_may_return_its_own_callable():
    async def call():
        return call

    coalescer = AsyncBatchCoalescer()
    assert [asyncio.run(coalescer.get_or_call("k", call)) for _ in range(3)] == [call] * 3
    assert (coalescer.stats().calls, coalescer.stats().hits) == (1, 2)

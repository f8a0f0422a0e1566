"""One failed call, many threads that raise its error; and nothing is ever left behind for Python to complain of."""

import asyncio
import contextlib
import gc
import logging
import random
import sys
import threading
import traceback
import warnings

import pytest
from faces import HeldInThread
from loops import PATIENCE, LoopThread, let_run, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

FREE_THREADED = "free-threading" in sys.version
TIMES = 100_000 if FREE_THREADED else 5_000


class SlottedError(Exception):
    __slots__ = ("code",)

    def __init__(self, *, code):
        self.code = code


def fail():
    try:
        raise KeyError("cause")
    except KeyError as cause:
        error = LookupError("no such model")
        error.add_note("a note")
        raise error from cause


def frames(error):
    """The lines of a traceback, innermost last."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]


def test_sixteen_threads_raise_one_retained_error_each_with_a_traceback_of_its_own(crew):
    coalescer = BatchCoalescer(ttl_seconds=float("inf"))
    with pytest.raises(LookupError):
        coalescer.get_or_call("k", fail)

    def raise_it(_):
        here, wrong = sys._getframe(), 0
        for _ in range(TIMES):
            try:
                coalescer.get_or_call("k", fail)
            except LookupError as error:
                own = error.__traceback__
                if own.tb_frame is not here or own.tb_next is not None or error.__context__ is not None:
                    wrong += 1
            else:
                wrong += 1
        return wrong

    assert crew.start(16, raise_it).join() == [0] * 16
    assert coalescer.stats().hits == 16 * TIMES


def test_what_a_caller_does_to_its_error_is_seen_by_nobody_else(crew):
    """Each one raises it through frames of its own, gives it a note, and changes what it holds."""
    coalescer = BatchCoalescer(ttl_seconds=float("inf"))
    with pytest.raises(LookupError):
        coalescer.get_or_call("k", fail)

    def one(number):
        coalescer.get_or_call("k", fail)

    def other(number):
        one(number)

    def raise_it(number):
        way = one if number % 2 else other
        for _ in range(200):
            with pytest.raises(LookupError) as info:
                way(number)
            error = info.value
            assert frames(error) == ["raise_it", "one"] if number % 2 else ["raise_it", "other", "one"]
            assert error.args == ("no such model",)
            assert error.__notes__[0] == "a note"
            assert not any("thread" in note for note in error.__notes__)
            assert not hasattr(error, "number")
            assert error.__cause__.args == ("cause",)
            assert not hasattr(error.__cause__, "number")
            error.add_note(f"thread {number}")
            error.args = (number,)
            error.number = error.__cause__.number = number

    crew.start(8, raise_it).join()


def error_of(coalescer, fn):
    try:
        coalescer.get_or_call("k", fn)
    except Exception as error:
        return error


@pytest.mark.parametrize("make", [lambda: SlottedError(code=7), lambda: ExceptionGroup("all", [OSError(2, "gone")])])
def test_all_who_wait_for_a_failing_call_raise_at_once(make, crews):
    coalescer = BatchCoalescer(ttl_seconds=0)
    for _ in range(20):
        held = HeldInThread(error=make())

        crew = crews().start(16, lambda _, held=held: error_of(coalescer, held))
        wait_until(lambda: coalescer._waiters("k") == 15)
        held.release()
        errors = crew.join()
        assert {type(error) for error in errors} == {type(held.error)}
        assert len({id(error) for error in errors}) == 16
        assert sum(error is held.error for error in errors) == 1
        for each in errors:
            assert frames(each) == (["error_of", "__call__"] if each is held.error else ["error_of"])


# Nothing is left behind.


@pytest.fixture
def complaints(monkeypatch, caplog):
    """All that Python has to say of exceptions that nobody retrieved and coroutines that nobody awaited."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: said.append(("unraisable", args.err_msg, args.exc_value)))
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(("thread", args.exc_value)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: said.append(("warning", str(message))))
        with caplog.at_level(logging.WARNING):
            yield said
    said.extend(("log", record.getMessage()) for record in caplog.records)


def test_complaints_are_heard(complaints, caplog):
    """Of the tests themselves: they would else pass whatever Python says."""

    async def lose():
        asyncio.get_running_loop().create_future().set_exception(LookupError())
        own()
        gc.collect()

    asyncio.run(lose())
    assert [kind for kind, *_ in complaints] == ["warning"]
    assert "never retrieved" in caplog.text
    caplog.clear()


async def own():
    return "own"


class Stop(BaseException):
    pass


def call_at_random(numbers):
    """A call that ends in one of the ways that there are."""
    naps, way = numbers.randrange(4), numbers.randrange(8)

    async def call():
        for _ in range(naps):
            await asyncio.sleep(0)
        if way == 0:
            raise LookupError("no such model")
        if way == 1:
            raise Stop
        if way == 2:
            raise PermissionError("private")
        if way == 3:
            raise asyncio.CancelledError
        if way == 4:
            await asyncio.sleep(0.001)
        return "value"

    return (lambda: "nothing to await") if way == 5 else call


async def callers_at_random(coalescer, seed, said):
    """Leaders and waiters, of which some are cancelled, before they begin too, and some have no patience."""
    numbers = random.Random(seed)
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: said.append(("loop", context["message"], repr(context.get("exception"))))
    )

    async def ask():
        timeout = numbers.choice([None, None, 0, 0.0005])
        with contextlib.suppress(Exception, Stop):
            await coalescer.get_or_call(numbers.randrange(3), call_at_random(numbers), timeout=timeout)

    for _ in range(150):
        asked = [asyncio.create_task(ask()) for _ in range(numbers.randrange(1, 8))]
        for _ in range(numbers.randrange(4)):
            await asyncio.sleep(0)
        for task in asked:
            if numbers.random() < 0.4:
                task.cancel()
        if numbers.random() < 0.1:
            coalescer.cancel(numbers.randrange(3))
        if numbers.random() < 0.1:
            coalescer.forget(numbers.randrange(3))
        await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("on_abandoned", ["cancel", "finish"])
def test_python_never_complains_whatever_is_cancelled_when(complaints, on_abandoned, crews):
    options = {"on_abandoned": on_abandoned, "private_errors": PermissionError, "error_ttl_seconds": 0}
    tasks = AsyncBatchCoalescer(ttl_seconds=0, **options)
    threads, stop = tasks.as_sync(), threading.Event()

    def ask(number):
        numbers = random.Random(number)
        while not stop.is_set():
            # Whatever comes out of it, the CancelledErrors of a thread too.
            with contextlib.suppress(Exception):
                threads.get_or_call(numbers.randrange(3), lambda: numbers.choice([1, None]).real, timeout=0.01)

    crew = crews().start(2, ask)
    loops = [LoopThread() for _ in range(2)]
    try:
        asked = [loop.start(callers_at_random(tasks, seed, complaints)) for loop in loops for seed in range(3)]
        for each in asked:
            each.result()
    finally:
        stop.set()
        crew.join()
        for loop in loops:
            loop.end()
    assert tasks.stats().in_flight == 0
    del asked
    for _ in range(3):
        gc.collect()
    # What is no Exception, and whose caller has gone, is raised on in the call's task: it must not get lost.
    assert [each for each in complaints if each[-1] != "Stop()"] == []


def test_python_never_complains_of_a_leader_that_is_cancelled_as_its_call_fails(complaints):
    """In the very moment: the call is over, and its caller has not yet read what became of it."""

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(("loop", context)))
        coalescer = AsyncBatchCoalescer(ttl_seconds=0)
        for count in range(1, 4):
            asked, gate = [], asyncio.Event()

            async def call(asked=asked, gate=gate):
                await gate.wait()
                for task in asked:
                    task.cancel()
                raise LookupError

            asked += [asyncio.create_task(coalescer.get_or_call("k", call)) for _ in range(count)]
            await let_run()
            gate.set()
            results = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(result) for result in results} <= {asyncio.CancelledError, LookupError}
        assert len(coalescer) == 0

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    gc.collect()
    assert complaints == []

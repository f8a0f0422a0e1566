"""Threads and tasks behind one set of methods, so that one test speaks for both."""

import asyncio
import concurrent.futures
import itertools
import threading

from loops import PATIENCE, HeldCall, LoopThread, Raised, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer


def refused():
    """What nobody may call."""
    raise AssertionError("nobody may call this")


class Face:
    """Asks a coalescer as its kind of caller does. Ends, at the test's end, what the test has left open."""

    kind: type
    cancelled_error: type[BaseException]

    def __enter__(self):
        return self

    def coalescer(self, *args, **options):
        return self.kind(*args, **options)

    def start(self, coalescer, fn, key="k", *, method="get_or_call", name=None, **options):
        """Start a caller; returns when it leads, waits or is done."""
        calls, waiting = coalescer.stats().calls, coalescer._waiters(key)
        asked = self._start(getattr(coalescer, method), name, key, fn, options)
        wait_until(lambda: asked.done() or coalescer._waiters(key) > waiting or coalescer.stats().calls > calls)
        return asked

    def lead(self, coalescer, held, key="k", **options):
        """Start a caller that leads; returns when it is held in its call."""
        asked = self.start(coalescer, held, key, **options)
        assert held.started.wait(PATIENCE)
        return asked

    def join(self, coalescer, count, fn=refused, key="k", **options):
        """Start so many callers one after the other; returns when all wait."""
        waiting = coalescer._waiters(key)
        asked = [self.start(coalescer, fn, key, **options) for _ in range(count)]
        assert coalescer._waiters(key) == waiting + count
        return asked

    def ask(self, coalescer, fn, key="k", *, method="get_or_call", **options):
        """Ask, and return or raise what comes of it."""
        return self.begin(coalescer, fn, key, method=method, **options).result()

    def begin(self, coalescer, fn, key="k", *, method="get_or_call", **options):
        """Start a caller, and return at once."""
        return self._start(getattr(coalescer, method), None, key, fn, options)


class Threads(Face):
    """Each caller is a thread."""

    kind = BatchCoalescer
    cancelled_error = concurrent.futures.CancelledError

    def __init__(self):
        self._held = []

    def __exit__(self, *_):
        for held in self._held:
            held.release()

    def callable(self, work):
        return work

    def held(self, value=None, error=None):
        self._held.append(HeldInThread(value, error))
        return self._held[-1]

    def _start(self, method, name, key, fn, options):
        return AskedInThread(lambda: method(key, fn, **options), name)


class Tasks(Face):
    """Each caller is a task, and all are on one loop."""

    kind = AsyncBatchCoalescer
    cancelled_error = asyncio.CancelledError
    count = 1

    def __init__(self):
        self.loops = [LoopThread() for _ in range(self.count)]
        self._next = itertools.cycle(self.loops)

    def __exit__(self, *_):
        for loop in self.loops:
            loop.end()

    def callable(self, work):
        async def call():
            await asyncio.sleep(0)
            return work()

        return call

    def held(self, value=None, error=None):
        return HeldCall(value, error)

    def _start(self, method, name, key, fn, options):
        asked = next(self._next).start(method(key, fn, **options))
        if name is not None:
            asked.task.set_name(name)
        return asked


class Loops(Tasks):
    """Each caller is a task, now on the one loop, now on the other."""

    count = 2


FACES = [Threads, Tasks, Loops]


class HeldInThread:
    """A callable that stays in its call until `release`."""

    def __init__(self, value=None, error=None):
        self.value, self.error = value, error
        self.calls = 0
        self.started = threading.Event()
        self._released = threading.Event()

    def __call__(self):
        self.calls += 1
        self.started.set()
        assert self._released.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.value

    def release(self):
        self._released.set()


class AskedInThread:
    """A function that runs in a thread of its own."""

    def __init__(self, function, name):
        self._done = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(function,), name=name)
        self._thread.start()

    def _run(self, function):
        try:
            self._done.set_result(function())
        except BaseException as error:
            self._done.set_result(Raised(error))

    def done(self):
        return self._done.done()

    def result(self):
        result = self._done.result(PATIENCE)
        self._thread.join(PATIENCE)
        if isinstance(result, Raised):
            raise result.error
        return result


def outcomes(callers):
    """Wait for callers; the value of each, or its error."""
    results = []
    for caller in callers:
        try:
            results.append(caller.result())
        except BaseException as error:
            results.append(error)
    return results

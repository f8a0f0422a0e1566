"""Upstreams that yield when a test lets them, and readers in threads and tasks that can be watched."""

import asyncio
import itertools
import threading

from faces import AskedInThread, refused
from loops import PATIENCE, LoopThread, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer


class HeldStream:
    """An upstream for threads: it yields an item, or fails, when the test lets it."""

    def __init__(self, items=(), error=None):
        self.calls = self.pulls = self.closed = 0
        self.pulled_by = []
        self._items, self._error = iter(items), error
        self._gate = threading.Semaphore(0)

    def __call__(self):
        self.calls += 1
        return self

    def __iter__(self):
        return self

    def __next__(self):
        self.pulled_by.append(threading.current_thread().name)
        self.pulls += 1
        assert self._gate.acquire(timeout=PATIENCE)
        try:
            return next(self._items)
        except StopIteration:
            if self._error is None:
                raise
        raise self._error

    def close(self):
        self.closed += 1
        self.let(1_000)

    def let(self, count=1):
        """Let it go on so many times; its end is one of them."""
        self._gate.release(count)

    def wait_for_pull(self, number=1):
        """Return when it is asked for its item of this number, counted from one."""
        wait_until(lambda: self.pulls >= number)


class HeldAsyncStream:
    """The same for tasks; `let` may be called in any thread."""

    def __init__(self, items=(), error=None):
        self.calls = self.pulls = self.closed = 0
        self._items, self._error = iter(items), error
        self._begun = threading.Event()

    def __call__(self):
        self.calls += 1
        self._loop, self._gate = asyncio.get_running_loop(), asyncio.Semaphore(0)
        self._begun.set()
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        self.pulls += 1
        self.task = asyncio.current_task()
        await self._gate.acquire()
        try:
            return next(self._items)
        except StopIteration:
            if self._error is None:
                raise StopAsyncIteration from None
        raise self._error

    async def aclose(self):
        self.closed += 1

    def let(self, count=1):
        assert self._begun.wait(PATIENCE)
        for _ in range(count):
            self._loop.call_soon_threadsafe(self._gate.release)

    def wait_for_pull(self, number=1):
        wait_until(lambda: self.pulls >= number)


class Reader:
    """Reads a stream: what it has got so far, and in the end its items and its error.

    It may leave the stream after so many items, or pause there until it may `go_on`.
    """

    def __init__(self, *, leave_after=None, pause_after=None):
        self.items = []
        self._leave_after, self._pause_after = leave_after, pause_after
        self._go_on = threading.Event()

    def read(self, stream):
        try:
            with stream:
                while len(self.items) != self._leave_after:
                    if len(self.items) == self._pause_after:
                        assert self._go_on.wait(PATIENCE)
                    self.items.append(next(stream))
        except StopIteration:
            pass
        except BaseException as error:
            return self.items, error
        return self.items, None

    async def read_in_task(self, stream):
        try:
            while len(self.items) != self._leave_after:
                if len(self.items) == self._pause_after:
                    assert await asyncio.to_thread(self._go_on.wait, PATIENCE)
                self.items.append(await anext(stream))
        except StopAsyncIteration:
            pass
        except BaseException as error:
            return self.items, error
        finally:
            await stream.aclose()
        return self.items, None

    def start(self, coalescer, fn, key="k", *, loop=None, name=None, **options):
        """Begin to read in a thread of its own, or in a task of a loop in a thread."""
        self._asked = (
            AskedInThread(lambda: self.read(coalescer.stream(key, fn, **options)), name)
            if loop is None
            else loop.start(self._read_named(name, coalescer, key, fn, options))
        )
        return self

    async def _read_named(self, name, coalescer, key, fn, options):
        if name is not None:
            asyncio.current_task().set_name(name)
        return await self.read_in_task(coalescer.stream(key, fn, **options))

    def wait_for(self, count):
        """Return when it has so many items."""
        wait_until(lambda: len(self.items) >= count)
        assert len(self.items) == count

    def go_on(self):
        self._go_on.set()

    def cancel(self):
        self._asked.cancel()

    def result(self):
        """Its items, and the error that it ended with."""
        return self._asked.result()


def wait_for_readers(coalescer, readers, waiting, key="k"):
    """Return when the key's stream has exactly so many readers, and so many of them wait."""
    wait_until(lambda: coalescer._readers(key) == (readers, waiting))


class Readers:
    """Readers of one kind: threads, or tasks of so many loops. Ends the loops at the test's end."""

    def __init__(self, loops=0):
        self.in_threads = not loops
        self.coalescer = AsyncBatchCoalescer if loops else BatchCoalescer
        self.held = HeldAsyncStream if loops else HeldStream
        self.loops = [LoopThread() for _ in range(loops)]
        self._next = itertools.cycle(self.loops or [None])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for loop in self.loops:
            loop.end()

    def yields(self, *items, error=None):
        """A callable for `stream` that yields all this at once."""

        def fn():
            held = self.held(items, error)
            stream = held()
            if self.in_threads:
                held.let(len(items) + 1)
            else:
                for _ in range(len(items) + 1):
                    held._gate.release()
            return stream

        return fn

    def start(self, coalescer, fn, key="k", *, leave_after=None, pause_after=None, **options):
        reader = Reader(leave_after=leave_after, pause_after=pause_after)
        return reader.start(coalescer, fn, key, loop=next(self._next), **options)

    def lead(self, coalescer, held, key="k", **options):
        """Start a reader that leads; returns when upstream is asked for its first item."""
        reader = self.start(coalescer, held, key, **options)
        held.wait_for_pull()
        wait_for_readers(coalescer, 1, 0 if self.in_threads else 1, key)
        return reader

    def join(self, coalescer, count, fn=refused, key="k", **options):
        """Start so many readers of a stream whose upstream is held, one after the other. Returns when all wait."""
        readers, waiting = coalescer._readers(key)
        joined = []
        for number in range(1, count + 1):
            joined.append(self.start(coalescer, fn, key, **options))
            wait_for_readers(coalescer, readers + number, waiting + number, key)
        return joined

    def read(self, coalescer, fn=refused, key="k", **options):
        """Read a stream; its items, and the error that it ended with."""
        return self.start(coalescer, fn, key, **options).result()


class Stop(BaseException):
    """For the one that leads or pulls alone."""

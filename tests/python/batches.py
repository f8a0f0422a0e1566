"""Callers that ask for many keys at once, whether they are threads or tasks; see `faces`."""

import asyncio
import concurrent.futures
import threading

from faces import Threads
from loops import PATIENCE


def nobody(missing):
    """What nobody may call."""
    raise AssertionError(f"nobody may call this for {missing}")


def named(missing):
    """The answer of most calls in these tests."""
    return {key: f"of {key}" for key in missing}


def start_many(face, coalescer, keys, fn, **options):
    """Start a caller, and do not wait for it."""
    return face._start(coalescer.get_or_call_many, None, keys, fn, options)


def ask_many(face, coalescer, keys, fn=nobody, **options):
    """Ask, and return or raise what comes of it."""
    return start_many(face, coalescer, keys, fn, **options).result()


def lead_many(face, coalescer, keys, held, **options):
    """Start a caller that leads; returns when it is held in its call."""
    asked = start_many(face, coalescer, keys, held, **options)
    assert held.started.wait(PATIENCE)
    return asked


def batch(face, work=named):
    """A callable for many keys, as the face's coalescers take it, that does this work."""
    if isinstance(face, Threads):
        return work

    async def call(missing):
        await asyncio.sleep(0)
        return work(missing)

    return call


def held_batch(face, work=named):
    """The same, held in its call until `release`."""
    if not isinstance(face, Threads):
        return HeldBatchInTask(work)
    held = HeldBatchInThread(work)
    # Released at the end of a test that fails, too.
    face._held.append(held)
    return held


def raising(error):
    """Work that fails."""

    def work(missing):
        raise error

    return work


class HeldBatchInThread:
    """A callable for many keys that stays in its call until `release`, and notes the keys of each call."""

    def __init__(self, work):
        self.asked, self.started, self._work = [], threading.Event(), work
        self._released = threading.Event()

    def __call__(self, missing):
        self.asked.append(list(missing))
        self.started.set()
        assert self._released.wait(PATIENCE)
        return self._work(missing)

    def release(self):
        self._released.set()


class HeldBatchInTask:
    """The same for tasks of any loop."""

    def __init__(self, work=named):
        self.asked, self.started, self.cancelled, self._work = [], threading.Event(), threading.Event(), work
        self._released = concurrent.futures.Future()
        self.task = None

    async def __call__(self, missing):
        self.asked.append(list(missing))
        self.task = asyncio.current_task()
        self.started.set()
        try:
            await asyncio.shield(asyncio.wrap_future(self._released))
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return self._work(missing)

    def release(self):
        if not self._released.done():
            self._released.set_result(None)

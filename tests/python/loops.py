"""Event loops in threads of their own, and calls that are held until a test lets them go."""

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

PATIENCE = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when the condition holds; it is brought about by another thread."""
    pause = threading.Event()
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for does not happen"
        pause.wait(0.002)


def wait_for_waiters(coalescer: Any, key: object, count: int) -> None:
    """Return when exactly so many callers wait for the key's flight."""
    wait_until(lambda: coalescer._waiters(key) == count)


def wait_for_callers(member: Any, key: object, callers: int) -> None:
    """Return when so many callers, or more, of a member of a fleet are in its flight of the key."""
    if callers > 1:
        wait_until(lambda: [each.waiters + 1 >= callers for each in member.do("flights") if each.key == key] == [True])


def ask(coalescer: Any, thread: "LoopThread", fn: Callable[[], Any]) -> "Asked":
    """Ask for "k" on a loop that runs in a thread; returns when that caller leads or waits."""

    def calls() -> str:
        return repr(coalescer).split(" calls=")[1].split()[0]

    led, waiting = calls(), coalescer._waiters("k")
    asked = thread.start(coalescer.get_or_call("k", fn))
    wait_until(lambda: coalescer._waiters("k") > waiting or calls() != led)
    return asked


async def let_run(rounds: int = 20) -> None:
    """Let all other tasks of this loop run until they wait for something."""
    for _ in range(rounds):
        await asyncio.sleep(0)


async def start_callers(coalescer: Any, *callables: Callable[[], Any]) -> list[asyncio.Task[Any]]:
    """Ask for "k" in a task for each callable, in this order; the first leads. Returns when all wait."""
    tasks = []
    for fn in callables:
        tasks.append(asyncio.create_task(coalescer.get_or_call("k", fn)))
        await let_run()
    assert coalescer._waiters("k") == len(callables) - 1
    return tasks


class HeldCall:
    """A callable for `get_or_call` that stays in its call until `release`, from any thread."""

    def __init__(self, value: object = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error
        self.calls = 0
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.loop: asyncio.AbstractEventLoop
        self.task: asyncio.Task[Any]

    async def __call__(self) -> Any:
        self.calls += 1
        self.loop = asyncio.get_running_loop()
        self.task = asyncio.current_task()
        self._gate = asyncio.Event()
        self.started.set()
        try:
            await self._gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        return self.value

    def release(self) -> None:
        assert self.started.wait(PATIENCE)
        self.loop.call_soon_threadsafe(self._gate.set)


class LoopThread:
    """An event loop that runs in a thread of its own until it is ended, or closed with its tasks pending."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop or asyncio.new_event_loop()
        self._hold = threading.Event()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> "Asked":
        """Run a coroutine as a task of this loop, as far as it gets; the task is there when this returns."""
        return Asked(self, coroutine)

    def do(self, function: Callable[..., Any], *args: object) -> Any:
        """Call a function in the loop's thread and return what it returns."""
        done = concurrent.futures.Future()

        def call() -> None:
            try:
                done.set_result(function(*args))
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        return done.result(PATIENCE)

    def hold(self) -> None:
        """Block the loop's thread until `let_go`. Returns when it is blocked."""
        held = threading.Event()
        self._hold.clear()

        def block() -> None:
            held.set()
            self._hold.wait(PATIENCE)

        self.loop.call_soon_threadsafe(block)
        assert held.wait(PATIENCE)

    def let_go(self) -> None:
        self._hold.set()

    def close(self) -> None:
        """Stop and close the loop as it is: tasks stay pending for ever."""
        self.let_go()
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._join()
            self.loop.close()

    def end(self) -> None:
        """Cancel all tasks and close the loop when they are done, as `asyncio.run` does."""
        self.let_go()
        if self.loop.is_closed():
            return

        async def cancel_all() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        ended = asyncio.run_coroutine_threadsafe(cancel_all(), self.loop)
        ended.result(PATIENCE)
        self.close()

    def _join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a loop hangs"


class Asked:
    """A coroutine that runs on a `LoopThread`, seen from the test's thread."""

    def __init__(self, thread: LoopThread, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._thread = thread
        self._done = concurrent.futures.Future()
        self.task: asyncio.Task[None] = thread.do(thread.loop.create_task, self._run(coroutine))

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        try:
            self._done.set_result(await coroutine)
        except BaseException as error:
            # A future of concurrent.futures must not be cancelled by it.
            self._done.set_result(Raised(error))
            if isinstance(error, asyncio.CancelledError):
                raise

    def cancel(self) -> None:
        """Ask the loop to cancel the task, without waiting for it."""
        self._thread.loop.call_soon_threadsafe(self.task.cancel)

    def done(self) -> bool:
        return self._done.done()

    def result(self) -> Any:
        """Wait for the coroutine's result, or raise what it raised."""
        result = self._done.result(PATIENCE)
        if isinstance(result, Raised):
            raise result.error
        return result


class Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error

"""Members of a fleet, and callers of theirs that a test holds and lets go. As a script, one in a process of its own."""

import asyncio
import concurrent.futures
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import redis
import redis.asyncio
from loops import PATIENCE, LoopThread, wait_for_callers

from llm_batch_coalesce import Retain
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer


@dataclass
class Wish:
    """What some callers of one member ask for at the same time, and what their callable does."""

    key: Any
    callers: int = 1
    value: Any = None
    error: BaseException | None = None
    hold: bool = False
    retain_seconds: float | None = None
    timeout: float | None = None
    ttl_seconds: float | None = None
    how: str = "get_or_call"


class Asked:
    """Callers that were started, and their outcomes: values, and errors as they were raised."""

    def __init__(self, member: "Member", wish: Wish, tell: Callable[..., None] | None = None) -> None:
        self.wish = wish
        self._member = member
        self.calls = 0
        # Set when the callable runs.
        self.called = threading.Event()
        self.outcomes: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        self._tell = tell or (lambda *_: None)
        self._lock = threading.Lock()
        self._got: dict[int, Any] = {}
        self._gate = threading.Event()
        self._gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    # What a test does.

    def wait_for_call(self) -> "Asked":
        """Return when the callable runs, and the other callers wait for it."""
        assert self.called.wait(PATIENCE), "the callable is not called"
        wait_for_callers(self._member, self.wish.key, self.wish.callers)
        return self

    def release(self) -> None:
        """Let the callable return or raise, now and whenever it is called."""
        with self._lock:
            self._gate.set()
            gates, self._gates = self._gates, []
        for loop, gate in gates:
            loop.call_soon_threadsafe(gate.set)

    def results(self) -> list[Any]:
        """Return what the callers got, in order; errors are among them."""
        return self.outcomes.result(PATIENCE)

    def result(self) -> Any:
        """Return or raise what the only caller got."""
        (result,) = self.results()
        if isinstance(result, BaseException):
            raise result
        return result

    def done(self) -> bool:
        return self.outcomes.done()

    # What members do.

    def note_call(self) -> None:
        with self._lock:
            self.calls += 1
        self.called.set()
        self._tell("called", self.calls)

    def note_outcome(self, number: int, outcome: Any) -> None:
        with self._lock:
            self._got[number] = outcome
            if len(self._got) < self.wish.callers:
                return
        results = [self._got[number] for number in range(self.wish.callers)]
        self._tell("done", results)
        self.outcomes.set_result(results)

    def call(self) -> Any:
        """Be the callable of threads."""
        self.note_call()
        if self.wish.hold:
            self._gate.wait()
        return self._answer()

    async def call_in_task(self) -> Any:
        """Be the callable of tasks."""
        self.note_call()
        if self.wish.hold:
            gate = asyncio.Event()
            with self._lock:
                if not self._gate.is_set():
                    self._gates.append((asyncio.get_running_loop(), gate))
                else:
                    gate.set()
            await gate.wait()
        return self._answer()

    def _answer(self) -> Any:
        if self.wish.error is not None:
            raise self.wish.error
        if self.wish.retain_seconds is not None:
            return Retain(self.wish.value, self.wish.retain_seconds)
        return self.wish.value


class Member:
    """A coalescer of this process, for threads or for tasks, which are on a loop of its own."""

    def __init__(self, kind: str, address: dict[str, Any], options: dict[str, Any], client: Any = None) -> None:
        self.kind = kind
        self._asked: list[Asked] = []
        self._threads: list[threading.Thread] = []
        self.loop: LoopThread | None = None
        if kind == "threads":
            self.client: Any = client or redis.Redis(**address)
            self.coalescer: Any = DistributedBatchCoalescer(self.client, **options)
        else:
            self.client = client or redis.asyncio.Redis(**address)
            self.coalescer = AsyncDistributedBatchCoalescer(self.client, **options)
            self.loop = LoopThread()

    def ask(self, key: Any, *, tell: Callable[..., None] | None = None, **wish: Any) -> Asked:
        """Start callers, all at once; the fields of `Wish` say what they want."""
        asked = Asked(self, Wish(key, **wish), tell)
        self._asked.append(asked)
        if self.loop is None:
            self._ask_in_threads(asked)
        else:
            self.loop.do(functools.partial(self._ask_in_tasks, asked))
        return asked

    def get(self, key: Any, value: Any = None, **wish: Any) -> Any:
        """Return what one caller gets, whose callable returns the value."""
        return self.ask(key, value=value, **wish).result()

    def _ask_in_threads(self, asked: Asked) -> None:
        wish, barrier = asked.wish, threading.Barrier(asked.wish.callers)

        def run(number: int) -> None:
            try:
                barrier.wait(PATIENCE)
                method = getattr(self.coalescer, wish.how)
                got = method(wish.key, asked.call, timeout=wish.timeout, ttl_seconds=wish.ttl_seconds)
            except BaseException as error:
                got = error
            asked.note_outcome(number, got)

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(wish.callers)]
        self._threads += threads
        for thread in threads:
            thread.start()

    def _ask_in_tasks(self, asked: Asked) -> None:
        wish = asked.wish

        async def run(number: int) -> None:
            try:
                method = getattr(self.coalescer, wish.how)
                got = await method(wish.key, asked.call_in_task, timeout=wish.timeout, ttl_seconds=wish.ttl_seconds)
            except BaseException as error:
                got = error
            asked.note_outcome(number, got)

        asked.tasks = [asyncio.get_running_loop().create_task(run(number)) for number in range(wish.callers)]

    def do(self, name: str, *args: Any) -> Any:
        """Call a method of the coalescer, or read a property; what is awaitable is awaited."""

        def run() -> Any:
            found = getattr(self.coalescer, name)
            return found(*args) if callable(found) else found

        async def run_in_task() -> Any:
            result = run()
            return await result if inspect.isawaitable(result) else result

        if self.loop is None:
            return run()
        return self.loop.start(run_in_task()).result()

    def close(self) -> None:
        """End everything of this member."""
        for asked in self._asked:
            asked.release()
        if self.loop is None:
            for thread in self._threads:
                thread.join(PATIENCE)
                assert not thread.is_alive(), "a caller hangs"
            self.coalescer.close()
            self.client.close()
            return
        for asked in self._asked:
            asked.outcomes.exception(PATIENCE)

        async def close() -> None:
            await self.coalescer.close()
            await self.client.aclose()

        self.loop.start(close()).result()
        self.loop.end()


class Host:
    """Does what the other end of a connection says, until that is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._member: Any = None
        self._asked: dict[int, Asked] = {}

    def serve(self) -> None:
        while True:
            try:
                word, number, *rest = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            if word == "ask":
                key, wish = rest
                self._asked[number] = self._member.ask(key, tell=functools.partial(self._send, number), **wish)
            elif word == "release":
                self._asked[number].release()
            else:
                self._do(word, number, *rest)

    def _do(self, word: str, number: int, *rest: Any) -> None:
        result = None
        try:
            if word == "open":
                self._member = Member(*rest)
            elif word == "close":
                self._member.close()
                self._asked.clear()
            else:
                result = self._member.do(*rest)
        except BaseException as error:
            result = error
        self._send(number, "did", result)

    def _send(self, *message: Any) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:
                os._exit(0)
            except Exception as error:  # what cannot be pickled
                self._connection.send((*message[:-1], [error]))


if __name__ == "__main__":
    Host(Connection(int(sys.argv[1]))).serve()

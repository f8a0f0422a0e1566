"""The readers: threads or asyncio tasks that hover when the trace says so and time how long an answer takes."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Final

from llm_batch_coalesce._demo.windows import Call

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence

    from llm_batch_coalesce._demo.trace import Hover

    Share = Callable[[Hashable, Callable[[], str]], str]
    AsyncShare = Callable[[Hashable, Callable[[], Awaitable[str]]], Awaitable[str]]

# The run begins a moment from now, so that starting the readers is no part of it.
_HEAD_START_SECONDS: Final = 0.05

# Ctrl-C does not interrupt a wait for a lock on Windows, only the pause between two such waits.
_WAIT_SLICE_SECONDS: Final = 0.2

# How long readers of a run that has failed may take to come to rest. They are daemons: none can keep the demo alive.
_REST_SECONDS: Final = 0.5


@dataclass(slots=True)
class Log:
    """What readers saw."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from each hover to its answer."""
    calls: list[Call] = field(default_factory=list)
    """The upstream calls that were made on their behalf."""
    ended: float = 0.0
    """When the last answer came."""

    def answered(self, started: float) -> None:
        """Take down that the answer to a hover at ``started`` has just come."""
        self.ended = perf_counter()
        self.latencies.append(self.ended - started)


@dataclass(frozen=True, slots=True)
class Replay:
    """What all readers of one run saw together."""

    wall_seconds: float
    latencies: Sequence[float]
    calls: Sequence[Call]


def call_directly(_key: Hashable, fn: Callable[[], str]) -> str:
    """Do without a coalescer."""
    return fn()


async def call_directly_async(_key: Hashable, fn: Callable[[], Awaitable[str]]) -> str:
    """Do without a coalescer."""
    return await fn()


def replay_in_threads(
    hovers: Iterable[Hover],
    *,
    explain: Callable[[str], str],
    share: Share,
    answered: Callable[[], None],
) -> Replay:
    """Let a thread for each user hover as ``hovers`` says.

    Args:
        hovers: The trace.
        explain: Asks upstream for a term.
        share: ``get_or_call`` of a coalescer, or ``call_directly``.
        answered: Called after each hover that was answered, from the thread that hovered.

    Raises:
        Exception: What the first reader to fail got from ``share``; the others stop.
    """
    run = _ThreadedRun(explain, share, answered)
    readers = [
        threading.Thread(target=run.read, args=(plan,), name=f"reader-{user}", daemon=True)
        for user, plan in _by_user(hovers).items()
    ]
    try:
        for reader in readers:
            reader.start()
        return _together([run.next_log() for _ in readers], run.begin)
    finally:
        run.stop.set()
        rest_until = perf_counter() + _REST_SECONDS
        for reader in readers:
            if reader.is_alive():
                reader.join(max(0.0, rest_until - perf_counter()))


class _ThreadedRun:
    """What the threads of one run share."""

    def __init__(self, explain: Callable[[str], str], share: Share, answered: Callable[[], None]) -> None:
        self._explain = explain
        self._share = share
        self._answered = answered
        self._results: queue.SimpleQueue[Log | Exception] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.begin = perf_counter() + _HEAD_START_SECONDS

    def read(self, plan: Iterable[Hover]) -> None:
        """Hover as one user does, and hand in a log or the error that ended it."""
        log = Log()
        try:
            for hover in plan:
                if self.stop.wait(max(0.0, self.begin + hover.at_seconds - perf_counter())):
                    break
                self._hover_once(hover.term, log)
        except Exception as error:  # noqa: BLE001 - the main thread raises it, whatever it is
            self.stop.set()
            self._results.put(error)
        else:
            self._results.put(log)

    def next_log(self) -> Log:
        """Wait for the next reader to end; raise its error if it has one."""
        while True:
            with contextlib.suppress(queue.Empty):
                result = self._results.get(timeout=_WAIT_SLICE_SECONDS)
                if isinstance(result, Exception):
                    raise result
                return result

    def _hover_once(self, term: str, log: Log) -> None:
        def call() -> str:
            started = perf_counter()
            text = self._explain(term)
            log.calls.append(Call(term, started, perf_counter()))
            return text

        started = perf_counter()
        self._share(term, call)
        log.answered(started)
        self._answered()


async def replay_in_tasks(
    hovers: Iterable[Hover],
    *,
    explain: Callable[[str], Awaitable[str]],
    share: AsyncShare,
    answered: Callable[[], None],
) -> Replay:
    """Let a task for each user hover as ``hovers`` says.

    Args:
        hovers: The trace.
        explain: Asks upstream for a term.
        share: ``get_or_call`` of a coalescer, or ``call_directly_async``.
        answered: Called after each hover that was answered.

    Raises:
        Exception: What the first reader to fail got from ``share``; the others are cancelled.
    """
    begin = perf_counter() + _HEAD_START_SECONDS

    async def hover_once(term: str, log: Log) -> None:
        async def call() -> str:
            started = perf_counter()
            text = await explain(term)
            log.calls.append(Call(term, started, perf_counter()))
            return text

        started = perf_counter()
        await share(term, call)
        log.answered(started)
        answered()

    async def read(plan: Iterable[Hover]) -> Log:
        log = Log()
        for hover in plan:
            await asyncio.sleep(begin + hover.at_seconds - perf_counter())
            await hover_once(hover.term, log)
        return log

    try:
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(plan)) for plan in _by_user(hovers).values()]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return _together([reader.result() for reader in readers], begin)


def _by_user(hovers: Iterable[Hover]) -> dict[int, list[Hover]]:
    plans: defaultdict[int, list[Hover]] = defaultdict(list)
    for hover in hovers:
        plans[hover.user].append(hover)
    return plans


def _together(logs: Sequence[Log], begin: float) -> Replay:
    return Replay(
        wall_seconds=max(log.ended for log in logs) - begin,
        latencies=[latency for log in logs for latency in log.latencies],
        calls=[call for log in logs for call in log.calls],
    )

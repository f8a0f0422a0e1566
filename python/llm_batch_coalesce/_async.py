"""The coalescer of tasks, on any number of event loops.

The leader does not run the call itself: the call has a task of its own, so that a cancelled caller takes nobody with
it. These are the rules.

1. Whoever is cancelled, leader or waiter, leaves alone; the call goes on for the others.
2. When the last caller has left, the call's task is cancelled, and from that moment nobody can join it.
3. When the call's task is cancelled from outside, or its loop ends, the callers on that loop are cancelled with it;
   the first waiter on another loop leads anew.
4. An `Exception` is for everybody, the original for the leader and a copy for each other. Any other
   `BaseException` is for the leader alone, and the next waiter leads; with the leader gone it is raised on in the
   call's task.
5. A waiter's future carries no outcome, only that there is one; the outcome is read from the flight. So nothing is
   ever "never retrieved".
6. To lead is offered, not ordered: a task that was cancelled meanwhile passes the offer on, and one whose loop does
   not run loses it after a second.
"""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from inspect import isawaitable
from types import CoroutineType
from typing import Any, TypeVar
from weakref import ReferenceType

from llm_batch_coalesce._core import Coalescer, Ticket, Token
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._sharing import shown

T = TypeVar("T")
_CallTask = asyncio.Task[BaseException | None]


class AsyncBatchCoalescer(Coalescer):
    """Shares one call among all tasks that ask for the same key at the same time, whatever loops they run on.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too. A coalescer is bound to no
    event loop and may be made outside of any.

    Args:
        ttl_seconds: How long a value is retained after its call has completed, in seconds. 0 retains nothing;
            `math.inf` retains until `clear()`.
        error_ttl_seconds: The same for an `Exception` that the call raised. None takes `ttl_seconds`; 0 lets the
            next caller try anew.

    Raises:
        TypeError: If an argument is no number (a bool is none).
        ValueError: If an argument is negative or NaN.

    Example:
        >>> async def define(term: str) -> str:
        ...     return f"what {term} means"
        >>> async def main() -> str:
        ...     coalescer = AsyncBatchCoalescer(ttl_seconds=5.0)
        ...     return await coalescer.get_or_call(key="define:alpha", fn=lambda: define("alpha"))
        >>> asyncio.run(main())
        'what alpha means'
    """

    __slots__ = ("_prune_at", "_tasks")

    _tasks: set[_CallTask]
    _prune_at: int

    def __init__(self, ttl_seconds: float = 5.0, error_ttl_seconds: float | None = None) -> None:  # noqa: ARG002
        # Arguments are checked and kept by the core's `__new__`. A task that nobody holds is collected in mid-call.
        self._tasks = set()
        self._prune_at = 64

    async def get_or_call(self, key: Hashable, fn: Callable[[], Awaitable[T]]) -> T:
        """Return the outcome of `key`: the one retained, that of the call under way, or that of awaiting `fn()`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Called without arguments by the one caller that leads; returns an awaitable. It runs in a task of
                its own, in a copy of the leader's context.

        Returns:
            What the call's awaitable returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the leader, a copy for everybody else.
            asyncio.CancelledError: If this caller, or the call's own task, was cancelled.
            RecursiveCallError: If the call that computes this key asks for it.
            CallResultError: If `fn()` returns something that cannot be awaited. It is a TypeError.
            TypeError: If the key is unhashable or `fn` is not callable.
        """
        while True:
            found = self._begin(key, fn)
            if type(found) is not Ticket:
                return found  # type: ignore[no-any-return]
            future = found.future
            if future is not None:
                try:
                    await future
                except BaseException:
                    found.leave()
                    raise
                outcome = found.outcome()
                if outcome is not found:
                    return outcome  # type: ignore[no-any-return]
            if found.leads:
                return await self._lead(found, fn)

    async def _lead(self, ticket: Ticket, fn: Callable[[], Awaitable[T]]) -> T:
        loop = asyncio.get_running_loop()
        token = ticket.token(self)
        task = _start(_call(token, fn), loop)
        if not task.done():
            token.led_by(task)
            task.add_done_callback(token.task_done)
            self._hold(task)
            future = loop.create_future()
            if ticket.wait_with(loop, future):
                try:
                    await future
                except BaseException:
                    ticket.leave()
                    # The call may have ended in the very moment; what is no Exception must not be lost (rule 4).
                    error = _error_of(task)
                    if isinstance(error, Exception | None):
                        raise
                    try:
                        raise error from None
                    finally:
                        del error, task
        error = _error_of(task)
        if error is not None:
            ticket.leave()
            try:
                raise error
            finally:
                # The error's traceback holds this frame.
                del error, task
        return ticket.outcome()  # type: ignore[no-any-return]

    def _hold(self, task: _CallTask) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if len(self._tasks) >= self._prune_at:
            # Tasks of closed loops never end.
            self._tasks.difference_update([held for held in list(self._tasks) if held.get_loop().is_closed()])
            self._prune_at = 2 * max(32, len(self._tasks))


if sys.version_info >= (3, 12):

    def _start(call: Coroutine[Any, Any, BaseException | None], loop: asyncio.AbstractEventLoop) -> _CallTask:
        return asyncio.Task(call, loop=loop, eager_start=True)

else:

    def _start(call: Coroutine[Any, Any, BaseException | None], loop: asyncio.AbstractEventLoop) -> _CallTask:
        return loop.create_task(call)


async def _call(token: Token, fn: Callable[[], Awaitable[Any]]) -> BaseException | None:
    """Run a call and end its flight. Returns the error that the leader's own caller raises."""
    try:
        token.enter()
        awaitable = fn()
        if type(awaitable) is not CoroutineType and not isawaitable(awaitable):
            msg = f"fn must return an awaitable, not {shown(awaitable)}; use BatchCoalescer for plain functions"
            raise CallResultError(msg)  # noqa: TRY301 - it is shared like any error of the call
        value = await awaitable
    except asyncio.CancelledError:
        token.lose_loop()
        raise
    except BaseException as error:
        if not token.fail(error) and not isinstance(error, Exception):
            raise
        return error
    token.complete(value)
    return None


def _error_of(task: _CallTask) -> BaseException | None:
    return task.result() if task.done() and not task.cancelled() else None


def cancel_call(reference: ReferenceType[_CallTask]) -> None:
    """Cancel a call's task on its own loop; called in any thread when the last caller has left."""
    task = reference()
    if task is None:
        return
    loop = task.get_loop()
    if loop is _running_loop():
        task.cancel()
        return
    # A closed loop has nothing left to cancel.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(task.cancel)


def call_is_lost(reference: ReferenceType[_CallTask]) -> bool:
    """Tell whether a call can never finish, because its loop is closed or its task is gone."""
    task = reference()
    return task is None or task.get_loop().is_closed()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

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
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload
from weakref import ReferenceType

from llm_batch_coalesce._core import Coalescer, Retain, Ticket, Token
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._face import Face
from llm_batch_coalesce._reports import Outcome
from llm_batch_coalesce._sharing import shown

if TYPE_CHECKING:
    from llm_batch_coalesce._sync import BatchCoalescer

T = TypeVar("T")
_CallTask = asyncio.Task[BaseException | None]


class AsyncBatchCoalescer(Face):
    """Shares one call among all tasks that ask for the same key at the same time, whatever loops they run on.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too. A coalescer is bound to no
    event loop and may be made outside of any.

    Args:
        ttl_seconds: How long a value is retained after its call has completed, in seconds. 0 retains nothing;
            `math.inf` retains until it is forgotten.
        error_ttl_seconds: The same for an `Exception` that the call raised. None takes the TTL of values; 0 lets the
            next caller try anew. A callable gets the exception and returns seconds, or None for the TTL of values:
            retain a 429 until its retry-after, a 400 for long, a 503 not at all. If it fails, that is logged and the
            error is not retained.
        private_errors: Classes of exceptions that concern one caller only, such as the error of its own rate limit or
            budget: the leader gets it, and the next waiter makes the call with its own callable.
        max_flight_seconds: From this age in seconds on, a flight is no longer joined: the next caller leads a new one,
            and the present waiters keep theirs. It is logged once (logger `llm_batch_coalesce`) with its key's type
            and digest. None sets no limit.
        max_retained: How many outcomes are retained at most, give or take one for each shard of the map; the oldest
            leave first. None sets no limit.
        on_abandoned: What becomes of a call when its last caller was cancelled: `"cancel"` cancels it, `"finish"` lets
            it run on and retains its outcome.
        name: What errors, the log and `repr` call this coalescer.

    Raises:
        TypeError: If an argument has the wrong type (a bool is no number).
        ValueError: If an argument has no sensible value: negative or NaN seconds, `max_retained` below 1, another
            word for `on_abandoned`.

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

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        ttl_seconds: float = 5.0,
        *,
        error_ttl_seconds: float | Callable[[Any], float | None] | None = None,
        private_errors: type[BaseException] | Iterable[type[BaseException]] = (),
        max_flight_seconds: float | None = None,
        max_retained: int | None = None,
        on_abandoned: Literal["cancel", "finish"] = "cancel",
        name: str | None = None,
    ) -> None:
        super().__init__(
            ttl_seconds,
            error_ttl_seconds=error_ttl_seconds,
            private_errors=private_errors,
            max_flight_seconds=max_flight_seconds,
            max_retained=max_retained,
            on_abandoned=on_abandoned,
            name=name,
        )
        self._begin_holding()

    @classmethod
    def _on(cls, other: Coalescer, on_abandoned: Literal["cancel", "finish"]) -> Self:
        """Make another face of a coalescer."""
        face = cls.__new__(cls)
        face._face_of(other, on_abandoned)  # noqa: SLF001 - it is one of this class
        face._begin_holding()  # noqa: SLF001
        return face

    def _begin_holding(self) -> None:
        # A task that nobody holds is collected in mid-call.
        self._tasks = set()
        self._prune_at = 64

    @overload
    async def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T: ...
    @overload
    async def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[T | Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T: ...
    async def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[T | Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T:
        """Return the outcome of `key`: the one retained, that of the call under way, or that of awaiting `fn()`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Called without arguments by the one caller that leads; returns an awaitable. It runs in a task of
                its own, in a copy of the leader's context. The awaitable may give `Retain(value, ttl_seconds)` to set
                the TTL by its result.
            timeout: How long this caller waits for another's call, in seconds; 0 does not wait. It never bounds the
                call: a caller that leads has no timeout.
            ttl_seconds: The TTL in seconds of the outcome that this caller leads, instead of the coalescer's.

        Returns:
            What the call's awaitable returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the leader, a copy for everybody else.
            TimeoutError: If `timeout` passed. Only for this caller.
            asyncio.CancelledError: If this caller, the key or the call's own task was cancelled.
            RecursiveCallError: If the call that computes this key asks for it.
            DeadlockError: If that call waits, in the end, for this caller.
            CallResultError: If `fn()` returns something that cannot be awaited. It is a TypeError.
            TypeError: If the key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN.
        """
        if timeout is None and ttl_seconds is None:
            # A hit needs to know no global name. (One whose value is `fn` goes the long way.)
            found = self._hit(key, fn)
            if found is not fn:
                return found  # type: ignore[no-any-return]
        found = self._begin(key, fn, timeout, ttl_seconds)
        if type(found) is not Ticket:
            return found  # type: ignore[no-any-return]
        # What most callers do is done here, since each coroutine in between costs when a thousand tasks wake.
        future = found.future
        if future is not None and timeout is None:
            try:
                await future
            except BaseException:
                found.leave()
                raise
            outcome = found.outcome()
            if outcome is not found:
                return outcome  # type: ignore[no-any-return]
            if not found.leads:
                found = self._begin(key, fn, timeout, ttl_seconds)
        return await self._follow(found, key, fn, timeout, ttl_seconds)  # type: ignore[no-any-return]

    @overload
    async def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]: ...
    @overload
    async def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[T | Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]: ...
    async def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[T | Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]:
        """Return the same as `get_or_call`, with this caller's role and what is known of the flight.

        Args:
            key: As in `get_or_call`.
            fn: As in `get_or_call`.
            timeout: As in `get_or_call`, in seconds.
            ttl_seconds: As in `get_or_call`, in seconds.

        Returns:
            The value, whether this caller led, waited or was served what is retained, how many waited, and how long
            the call took in seconds.

        Raises:
            Exception: As in `get_or_call`.
        """
        found = self._begin(key, fn, timeout, ttl_seconds, detailed=True)
        follow = self._follow(found, key, fn, timeout, ttl_seconds, detailed=True)
        return await follow  # type: ignore[no-any-return]

    async def _follow(  # noqa: PLR0913 - all that the request was made of
        self,
        found: Any,  # noqa: ANN401 - a ticket, or what the caller gets
        key: Hashable,
        fn: Callable[[], Awaitable[Any]],
        timeout: float | None,
        ttl_seconds: float | None,
        *,
        detailed: bool = False,
    ) -> Any:  # noqa: ANN401 - a value or an `Outcome`
        """Do what a ticket tells, until there is an outcome."""
        until: float | None = None
        while type(found) is Ticket:
            if found.leads:
                return await self._lead(found, fn)
            future: Any = found.future
            limit = found.limit
            timed_out = False
            try:
                if limit is None:
                    await future
                else:
                    until = until or asyncio.get_running_loop().time() + limit
                    async with asyncio.timeout_at(until):
                        await future
            except TimeoutError:
                timed_out = True
            except BaseException:
                found.leave()
                raise
            if timed_out:
                found.time_out(timeout)
            outcome = found.outcome()
            if outcome is not found:
                return outcome
            if not found.leads:
                found = self._begin(key, fn, timeout, ttl_seconds, detailed=detailed)
        return found

    async def _lead(self, ticket: Ticket, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as above
        loop = asyncio.get_running_loop()
        token = ticket.token(self)
        task = _start(_call(token, fn), loop)
        if not task.done():
            token.led_by(task, asyncio.current_task(loop) or task)
            task.add_done_callback(token.task_done)
            self._hold(task)
            future = loop.create_future()
            if ticket.wait_with(loop, future):
                try:
                    await future
                except BaseException:
                    ticket.leave()
                    # The call may have ended in the very moment; what is no Exception must not be lost (rule 4).
                    if isinstance(_error_of(task), Exception | None):
                        raise
        error = _error_of(task)
        if error is not None:
            ticket.leave()
            try:
                raise error
            finally:
                # The error's traceback holds this frame.
                del error, task
        return ticket.outcome()

    def as_sync(self) -> "BatchCoalescer":
        """Return a coalescer of threads on the same keys: a thread and a task that ask for one share one call.

        A thread that would block the very event loop that computes its key gets `DeadlockError`.

        Returns:
            A new face of this coalescer, with the same options. It keeps this one alive.
        """
        from llm_batch_coalesce._sync import BatchCoalescer  # noqa: PLC0415 - the two refer to each other

        face = BatchCoalescer.__new__(BatchCoalescer)
        face._face_of(self, "cancel")  # noqa: SLF001 - the two are one
        return face

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

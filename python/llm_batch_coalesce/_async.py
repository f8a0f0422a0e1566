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
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from llm_batch_coalesce._core import Coalescer, Retain, Ticket, Token
from llm_batch_coalesce._face import Face
from llm_batch_coalesce._many import gather, lead_many, single_async
from llm_batch_coalesce._reports import Outcome
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._store import AsyncStore, MappingStore, TtlStore, checked, through_store
from llm_batch_coalesce._streams import MAX_BUFFERED, pull_in_thread, pump
from llm_batch_coalesce._tasks import CallTask, error_of, start
from llm_batch_coalesce._warm import check, in_tasks

if TYPE_CHECKING:
    from llm_batch_coalesce._sync import BatchCoalescer

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


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
        store: A cache behind this one that the leader asks before it calls and tells when its call has succeeded: a
            mapping (a dict, or a cache of cachetools, cachebox or diskcache), or an object with `get(key)` and
            `set(key, value, ttl_seconds)`, plain or async. A plain one blocks the event loop while it works. What is
            not retained is not written; a store that raises is logged, counted, and taken for a miss. `forget()` and
            `clear()` do not reach it.

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

    _tasks: set[CallTask]
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
        store: MappingStore[Any] | TtlStore[Any] | AsyncStore[Any] | None = None,
    ) -> None:
        super().__init__(
            ttl_seconds,
            error_ttl_seconds=error_ttl_seconds,
            private_errors=private_errors,
            max_flight_seconds=max_flight_seconds,
            max_retained=max_retained,
            on_abandoned=on_abandoned,
            name=name,
            store=store,
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
        until: float | None = None,
    ) -> Any:  # noqa: ANN401 - a value or an `Outcome`
        """Do what a ticket tells, until there is an outcome. `until`, a time of the loop, is where a limit ends."""
        while type(found) is Ticket:
            if found.leads:
                return await self._lead(found, key, fn)
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

    async def _lead(self, ticket: Ticket, key: Hashable, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as above
        loop = asyncio.get_running_loop()
        token = ticket.token(self)
        if self._store is not None:
            fn = partial(through_store, self, token, key, fn)
        task = start(_call(token, fn), loop)
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
                    if isinstance(error_of(task), Exception | None):
                        raise
        error = error_of(task)
        if error is not None:
            ticket.leave()
            try:
                raise error
            finally:
                # The error's traceback holds this frame.
                del error, task
        return ticket.outcome()

    @overload
    async def get_or_call_many(
        self,
        keys: Iterable[K],
        fn: Callable[[list[K]], Awaitable[Mapping[K, Retain[T]] | Sequence[Retain[T]]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[K, T]: ...
    @overload
    async def get_or_call_many(
        self,
        keys: Iterable[K],
        fn: Callable[[list[K]], Awaitable[Mapping[K, T | Retain[T]] | Sequence[T | Retain[T]]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[K, T]: ...
    async def get_or_call_many(
        self,
        keys: Iterable[K],
        fn: Callable[[list[K]], Awaitable[Mapping[K, T | Retain[T]] | Sequence[T | Retain[T]]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[K, T]:
        """Return the outcomes of many keys; those that are neither retained nor in flight are led in one call.

        What this caller leads has ended before it waits for others, so callers whose keys overlap never wait for each
        other in a circle. Where a call of others ends in a way that is not shared, `fn` is called with that key alone.

        Args:
            keys: Any hashable objects; duplicates do no harm.
            fn: Called with the list of the keys that this caller leads, in their order; returns an awaitable of a
                mapping, or of a sequence in the order of that list. Values may be `Retain(value, ttl_seconds)`.
            timeout: How long this caller waits for others' calls in all, in seconds; 0 does not wait.
            ttl_seconds: The TTL in seconds of the outcomes that this caller leads, instead of the coalescer's.

        Returns:
            The value of each key, in the order of `keys`.

        Raises:
            MissingKeysError: If a call gave no value for some of these keys. Its `values` has those of the others. It
                is not retained.
            Exception: What a call raised; the first one in the order of `keys` that is no `MissingKeysError`.
            TimeoutError: If `timeout` passed. Only for this caller.
            asyncio.CancelledError: If this caller, one of the keys or the call's own task was cancelled.
            RecursiveCallError: If the call that computes one of the keys asks for it.
            DeadlockError: If a call waits, in the end, for this caller.
            CallResultError: If `fn` returns something else. It is a TypeError.
            TypeError: If a key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN.
        """
        wanted = list(dict.fromkeys(keys))
        values: dict[Hashable, Any] = {}
        errors: dict[Hashable, BaseException] = {}
        tickets: dict[K, Ticket] = {}
        try:
            admitted = self._admit(wanted, fn, timeout, ttl_seconds)
            for key, (ticket, value, error) in zip(wanted, admitted, strict=True):
                if ticket is not None:
                    tickets[key] = ticket
                elif error is not None:
                    errors[key] = error
                else:
                    values[key] = value
            del admitted
            led = {key: ticket.token(self) for key, ticket in tickets.items() if ticket.leads}
            if led:
                await lead_many(self, led, fn, values, errors)
            until: float | None = None
            for key, ticket in tickets.items():
                if key in led:
                    continue
                one = single_async(fn, key)
                if until is None and ticket.limit is not None:
                    until = asyncio.get_running_loop().time() + ticket.limit
                try:
                    ticket.begin_waiting(self)
                    values[key] = await self._follow(ticket, key, one, timeout, ttl_seconds, until=until)
                except Exception as error:  # noqa: BLE001 - raised when all are in
                    errors[key] = error
        finally:
            for ticket in tickets.values():
                ticket.leave()
        return gather(wanted, values, errors)  # type: ignore[return-value,arg-type]

    async def warm(
        self,
        items: Mapping[K, Callable[[], Awaitable[Any]]],
        *,
        concurrency: int = 4,
        progress: Callable[[int, int], object] | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[K, Exception]:
        """Fill keys ahead of their callers, through ordinary flights: callers that come meanwhile join them.

        Args:
            items: For each key the callable that a leader would run; as `fn` in `get_or_call`.
            concurrency: How many calls run at once.
            progress: Called after each key with how many are done, and how many there are.
            ttl_seconds: The TTL in seconds of what is filled, instead of the coalescer's.

        Returns:
            The errors of the keys that failed; the other keys were filled all the same.

        Raises:
            TypeError: If an argument has the wrong type, or a callable is none.
            ValueError: If `concurrency` is below 1, or a number of seconds is negative or NaN.

        Example:
            >>> async def define(term: str) -> str:
            ...     return f"what {term} means"
            >>> coalescer = AsyncBatchCoalescer()
            >>> asyncio.run(coalescer.warm({term: partial(define, term) for term in ("alpha", "beta")}))
            {}
            >>> coalescer.peek("beta")
            'what beta means'
        """
        check(items, concurrency, progress)
        self._check_ttl(ttl_seconds)
        return await in_tasks(self, items, concurrency, progress or _no_progress, ttl_seconds)

    def stream(
        self,
        key: Hashable,
        fn: Callable[[], AsyncIterator[T] | Awaitable[AsyncIterator[T]]],
        *,
        ttl_seconds: float | None = None,
        max_buffered: int | None = MAX_BUFFERED,
    ) -> AsyncGenerator[T, None]:
        """Iterate over the items of one upstream that all readers of the key share.

        Every reader gets every item in order from the first, also one that joins late or while the stream is retained;
        it joins when it asks for its first item. A task of its own pumps upstream, and no reader holds it up. When the
        last reader has left (by `aclose()`, by cancellation, or by dropping the iterator), upstream is closed, unless
        `on_abandoned` is `"finish"`. Streams have keys of their own beside those of `get_or_call`.

        Args:
            key: Any hashable object.
            fn: Called without arguments by the one reader that leads; returns an async iterator or generator, or an
                awaitable of one, as the SDKs of providers do. It runs in a copy of the leader's context.
            ttl_seconds: How long the whole stream is retained after its end, in seconds, instead of the coalescer's
                TTL.
            max_buffered: How many items the log holds at most; None sets no limit. Beyond it nobody joins any more
                (later readers lead a stream of their own), what all readers have passed is dropped, and a reader that
                is farther behind gets `StreamLagError`. The leader's number counts.

        Yields:
            The items, the same objects for every reader.

        Raises:
            Exception: What upstream raised, after the items that came before: the original for the reader that leads,
                a copy for everybody else.
            StreamLagError: If this reader is too far behind. Only for this reader.
            SharedCallError: If the stream ended, after its first item, in a way that is not shared: with a private
                error, or with its event loop. Readers without an item start over.
            RecursiveCallError: If the call that yields this stream reads it.
            DeadlockError: If that call waits, in the end, for this reader.
            CallResultError: If `fn()` returns no async iterator. It is a TypeError.
            TypeError: If the key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN, or `max_buffered` below 1.
        """
        self._check_stream(key, fn, ttl_seconds, max_buffered)
        return self._read(key, fn, ttl_seconds, max_buffered)

    async def _read(
        self,
        key: Hashable,
        fn: Callable[[], AsyncIterator[Any] | Awaitable[AsyncIterator[Any]]],
        ttl_seconds: float | None,
        max_buffered: int | None,
    ) -> AsyncGenerator[Any, None]:
        loop = asyncio.get_running_loop()
        do: Any = "again"
        while do == "again":
            reader = self._open(key, ttl_seconds, max_buffered, True)  # noqa: FBT003 - compiled, by position
            try:
                if reader.leads:
                    source = reader.source()
                    task = start(pump(source, fn, max_buffered), loop)
                    if not task.done():
                        source.led_by(task, asyncio.current_task(loop) or task)
                        self._hold(task)
                    # Its end, and with it that of a pump which never began, must not depend on this reader.
                    del source, task
                while True:
                    do = reader.take(loop)
                    if type(do) is list:
                        for item in do:
                            yield item
                    elif type(do) is not str:
                        await do
                    elif do == "pull":
                        # Threads lead it, and none of them goes on.
                        await pull_in_thread(reader.pull, fn)
                    else:
                        break
            finally:
                reader.leave()

    def as_sync(self) -> "BatchCoalescer":
        """Return a coalescer of threads on the same keys: a thread and a task that ask for one share one call.

        A thread that would block the very event loop that computes its key gets `DeadlockError`.

        Returns:
            A new face of this coalescer, with the same options. It keeps this one alive.

        Raises:
            TypeError: If the store is async.
        """
        from llm_batch_coalesce._sync import BatchCoalescer  # noqa: PLC0415 - the two refer to each other

        if self._store is not None and self._store.is_async:
            raise TypeError(f"threads cannot await the store of {shown(self)}")
        face = BatchCoalescer.__new__(BatchCoalescer)
        face._face_of(self, "cancel")  # noqa: SLF001 - the two are one
        return face

    def _hold(self, task: CallTask) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if len(self._tasks) >= self._prune_at:
            # Tasks of closed loops never end.
            self._tasks.difference_update([held for held in list(self._tasks) if held.get_loop().is_closed()])
            self._prune_at = 2 * max(32, len(self._tasks))


async def _call(token: Token, fn: Callable[[], Awaitable[Any]]) -> BaseException | None:
    """Run a call and end its flight. Returns the error that the leader's own caller raises."""
    try:
        token.enter()
        value = await checked(fn())
    except asyncio.CancelledError:
        token.lose_loop()
        raise
    except BaseException as error:
        if not token.fail(error) and not isinstance(error, Exception):
            raise
        return error
    token.complete(value)
    return None


def _no_progress(done: int, of: int) -> None:
    """Tell nobody."""

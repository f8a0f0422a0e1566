"""The compiled core. Public names are re-exported by the package; the rest is for the package alone."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import Context
from types import GenericAlias, TracebackType
from typing import Any, Final, Generic, Literal, Self, TypeVar, final, overload
from weakref import ReferenceType

from typing_extensions import disjoint_base

from llm_batch_coalesce._many import Part
from llm_batch_coalesce._reports import Outcome
from llm_batch_coalesce._store import AsyncStore, MappingStore, Store, TtlStore

__all__ = [
    "Coalescer",
    "Retain",
    "Signal",
    "StreamReader",
    "StreamSource",
    "ThreadCoalescer",
    "ThreadStream",
    "Ticket",
    "Token",
    "__version__",
    "_advance_clock",
    "_carry_calls",
    "_check_seconds",
    "_install",
    "_retain_of_call",
    "_stop_sweeper",
]

_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)
_T_co = TypeVar("_T_co", covariant=True)

__version__: Final[str]

@disjoint_base
class Coalescer:
    """What both kinds of coalescer have: the map, the options, and the questions about them."""

    def __init__(
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
    ) -> None: ...
    @property
    def name(self) -> str | None:
        """The name given to the constructor."""

    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __contains__(self, key: object, /) -> bool: ...
    def peek(self, key: Hashable, default: Any = None) -> Any:
        """Return the retained value of a key, or the default. Never calls, never waits, and is no request.

        Args:
            key: Any hashable object.
            default: What to return if no value is retained: the key is unknown, in flight, or an error is retained.

        Raises:
            TypeError: If the key is unhashable.
        """

    def put(self, key: Hashable, value: object, ttl_seconds: float | None = None) -> None:
        """Retain a value as if a call had just returned it.

        A flight of the key under way is forgotten: its waiters keep waiting for it, and its outcome is not retained.

        Args:
            key: Any hashable object.
            value: What later callers get.
            ttl_seconds: How long it is retained, in seconds; None takes the coalescer's TTL, 0 only forgets the key.

        Raises:
            TypeError: If the key is unhashable, the TTL is no number, or the value is a `Retain`.
            ValueError: If the TTL is negative or NaN.
        """

    def forget(self, key: Hashable) -> bool:
        """Drop a key, so that its next caller leads a call of its own.

        A retained outcome is dropped. Those who wait for a flight under way keep waiting, and its outcome is not
        retained.

        Args:
            key: Any hashable object.

        Returns:
            Whether the key was retained or in flight.

        Raises:
            TypeError: If the key is unhashable.
        """

    def cancel(self, key: Hashable) -> bool:
        """Wake all who wait for a key's call with a CancelledError, and drop the key.

        Threads get `concurrent.futures.CancelledError`, tasks `asyncio.CancelledError`. The caller that runs the call
        still gets its result; a call of a task whose caller has gone is cancelled.

        Args:
            key: Any hashable object.

        Returns:
            Whether the key was in flight. A retained outcome stays.

        Raises:
            TypeError: If the key is unhashable.
        """

    def clear(self) -> None:
        """Drop all retained outcomes and disown the flights under way.

        Their callers still get the outcome, but the next caller of the key leads a call of its own.
        """

    def reset_stats(self) -> None:
        """Count from zero. `in_flight` and `retained` are no counts and stay as they are."""

    def _face_of(self, other: Coalescer, on_abandoned: Literal["cancel", "finish"]) -> None: ...
    def _stats(self) -> list[int]: ...
    @property
    def _store(self) -> Store | None: ...
    def _store_failed(self, key: Hashable, verb: str, error: Exception) -> None: ...
    def _check_ttl(self, ttl_seconds: float | None, /) -> None: ...
    def _flights(
        self,
    ) -> list[
        tuple[
            Hashable,
            float,
            int,
            int | None,
            ReferenceType[asyncio.Task[Any]] | None,
            ReferenceType[asyncio.Task[Any]] | None,
            bool,
        ]
    ]: ...
    def _hit(self, key: Hashable, missing: object, /) -> Any: ...
    def _begin(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[Any]],
        timeout: float | None,
        ttl_seconds: float | None,
        /,
        *,
        detailed: bool = False,
    ) -> Any: ...
    def _admit(
        self,
        keys: list[Any],
        fn: Callable[[list[Any]], Awaitable[Any]],
        timeout: float | None,
        ttl_seconds: float | None,
        /,
    ) -> list[tuple[Ticket | None, Any, BaseException | None]]: ...
    def _waiters(self, key: Hashable) -> int: ...
    def _readers(self, key: Hashable) -> tuple[int, int]: ...
    def _check_stream(
        self, key: Hashable, fn: Callable[[], Any], ttl_seconds: float | None, max_buffered: int | None, /
    ) -> None: ...
    def _open(
        self, key: Hashable, ttl_seconds: float | None, max_buffered: int | None, pumped: bool, /
    ) -> StreamReader: ...

class ThreadCoalescer(Coalescer):
    """The coalescer of threads."""

    def __init__(
        self,
        ttl_seconds: float = 5.0,
        *,
        error_ttl_seconds: float | Callable[[Any], float | None] | None = None,
        private_errors: type[BaseException] | Iterable[type[BaseException]] = (),
        max_flight_seconds: float | None = None,
        max_retained: int | None = None,
        name: str | None = None,
        store: MappingStore[Any] | TtlStore[Any] | None = None,
    ) -> None: ...
    @overload
    def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], Retain[_T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> _T: ...
    @overload
    def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], _T | Retain[_T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> _T:
        """Return the outcome of `key`: the one retained, that of the call under way, or that of calling `fn()`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Called without arguments, in this thread, if this caller leads. It may return
                `Retain(value, ttl_seconds)` to set the TTL by its result.
            timeout: How long this caller waits for another's call, in seconds; 0 does not wait. It never bounds the
                call: a caller that leads has no timeout.
            ttl_seconds: The TTL in seconds of the outcome that this caller leads, instead of the coalescer's.

        Returns:
            What the call returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the leader, a copy for everybody else.
            TimeoutError: If `timeout` passed. Only for this caller.
            concurrent.futures.CancelledError: If the key was cancelled.
            RecursiveCallError: If the call that computes this key asks for it.
            DeadlockError: If that call waits, in the end, for this caller.
            CallResultError: If `fn()` returns a coroutine. It is a TypeError.
            TypeError: If the key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN.
        """

    @overload
    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Retain[_T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[_T]: ...
    @overload
    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], _T | Retain[_T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[_T]:
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

    @overload
    def get_or_call_many(
        self,
        keys: Iterable[_K],
        fn: Callable[[list[_K]], Mapping[_K, Retain[_T]] | Sequence[Retain[_T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[_K, _T]: ...
    @overload
    def get_or_call_many(
        self,
        keys: Iterable[_K],
        fn: Callable[[list[_K]], Mapping[_K, _T | Retain[_T]] | Sequence[_T | Retain[_T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[_K, _T]:
        """Return the outcomes of many keys; those that are neither retained nor in flight are led in one call.

        What this caller leads has ended before it waits for others, so callers whose keys overlap never wait for each
        other in a circle. Where a call of others ends in a way that is not shared, `fn` is called with that key alone.

        Args:
            keys: Any hashable objects; duplicates do no harm.
            fn: Called in this thread with the list of the keys that this caller leads, in their order; returns a
                mapping, or a sequence in the order of that list. Values may be `Retain(value, ttl_seconds)`.
            timeout: How long this caller waits for others' calls in all, in seconds; 0 does not wait.
            ttl_seconds: The TTL in seconds of the outcomes that this caller leads, instead of the coalescer's.

        Returns:
            The value of each key, in the order of `keys`.

        Raises:
            MissingKeysError: If a call gave no value for some of these keys. Its `values` has those of the others. It
                is not retained.
            Exception: What a call raised; the first one in the order of `keys` that is no `MissingKeysError`.
            TimeoutError: If `timeout` passed. Only for this caller.
            concurrent.futures.CancelledError: If one of the keys was cancelled.
            RecursiveCallError: If the call that computes one of the keys asks for it.
            DeadlockError: If a call waits, in the end, for this caller.
            CallResultError: If `fn` returns something else. It is a TypeError.
            TypeError: If a key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN.
        """

    def stream(
        self,
        key: Hashable,
        fn: Callable[[], Iterable[_T]],
        *,
        ttl_seconds: float | None = None,
        max_buffered: int | None = 65_536,
    ) -> ThreadStream[_T]:
        """Iterate over the items of one upstream that all readers of the key share.

        Every reader gets every item in order from the first, also one that joins late or while the stream is retained;
        it joins when it asks for its first item. Whichever reader is at the front pulls the next item for all, and the
        others wait; no slow reader holds up another. When the last reader has left (by `close()`, by leaving its `with`
        block, or by dropping the iterator), upstream is closed. Streams have keys of their own beside those of
        `get_or_call`.

        Args:
            key: Any hashable object.
            fn: Called without arguments by the one reader that leads; returns an iterator, a generator or another
                iterable.
            ttl_seconds: How long the whole stream is retained after its end, in seconds, instead of the coalescer's
                TTL.
            max_buffered: How many items the log holds at most; None sets no limit. Beyond it nobody joins any more
                (later readers lead a stream of their own), what all readers have passed is dropped, and a reader that
                is farther behind gets `StreamLagError`. The leader's number counts.

        Returns:
            An iterator over the items, the same objects for every reader. It is for one thread at a time, and has the
            `close()` of a generator.

        Raises:
            Exception: What upstream raised, after the items that came before: the original for the reader that pulled,
                a copy for everybody else.
            StreamLagError: If this reader is too far behind. Only for this reader.
            SharedCallError: If the stream ended, after its first item, in a way that is not shared: with a private
                error, or in a thread that was interrupted. Readers without an item start over.
            RecursiveCallError: If the call that yields this stream reads it.
            DeadlockError: If that call waits, in the end, for this reader.
            CallResultError: If `fn()` returns no iterable. It is a TypeError.
            TypeError: If the key is unhashable, `fn` is not callable or a number is none.
            ValueError: If a number of seconds is negative or NaN, or `max_buffered` below 1; if two threads are in one
                iterator at once.
        """

@final
class ThreadStream(Iterator[_T_co]):
    """Iterates over a shared stream."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> _T_co: ...
    def close(self) -> None:
        """Leave the stream; the last reader to go closes upstream, whose errors are raised here."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> GenericAlias: ...

@final
class Signal:
    """A future for many waits, as far as tasks of asyncio need it to be one."""

    _asyncio_future_blocking: bool
    def get_loop(self) -> asyncio.AbstractEventLoop: ...
    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def result(self) -> None: ...
    def cancel(self, msg: object = None) -> bool: ...
    def add_done_callback(self, callback: Callable[[Any], Any], /, *, context: Context | None = None) -> None: ...
    def __await__(self) -> Generator[Any]: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Self: ...

@final
class StreamReader:
    """A reader of a shared stream, as the Python layer holds it. Dropping it leaves the stream."""

    @property
    def leads(self) -> bool: ...
    def source(self) -> StreamSource: ...
    @overload
    def take(self, event_loop: None = None, /) -> list[Any] | Literal["wait", "pull", "again", "end"]: ...
    @overload
    def take(
        self, event_loop: asyncio.AbstractEventLoop, /
    ) -> list[Any] | Signal | Literal["pull", "again", "end"]: ...
    def wait(self, timeout: float | None = None, /) -> bool: ...
    def wait_with(self, event_loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> bool: ...
    def pull(self, fn: Callable[[], Any]) -> None: ...
    def leave(self) -> None: ...

@final
class StreamSource:
    """Where the items of a stream come from that a task or a thread pumps. Dropping it unfinished breaks the stream."""

    def enter(self) -> None: ...
    def led_by(self, task: asyncio.Task[Any], caller: asyncio.Task[Any]) -> None: ...
    def append(self, item: object) -> bool: ...
    def ends(self) -> None: ...
    def see_through(self) -> None: ...
    def close_with(self, closer: object) -> bool: ...
    def finish(self, ttl_seconds: float | None = None) -> None: ...
    def fail(self, error: BaseException, ttl_seconds: float | None = None) -> bool: ...
    def break_off(self, error: BaseException) -> None: ...

@final
class Retain(Generic[_T_co]):
    """A call's result that sets its own TTL: return it from `fn`, and callers get the value.

    Args:
        value: What the callers get.
        ttl_seconds: How long it is retained, in seconds; 0 does not retain it, `math.inf` retains it until it is
            forgotten.

    Raises:
        TypeError: If the TTL is no number.
        ValueError: If the TTL is negative or NaN.
    """

    def __new__(cls, value: _T_co, ttl_seconds: float) -> Self: ...
    @property
    def value(self) -> _T_co: ...
    @property
    def ttl_seconds(self) -> float: ...
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> GenericAlias: ...

@final
class Ticket:
    """A task's place in a flight that it does not find retained."""

    @property
    def leads(self) -> bool: ...
    @property
    def future(self) -> Signal | None: ...
    @property
    def limit(self) -> float | None: ...
    def token(self, coalescer: Coalescer) -> Token: ...
    def wait_with(self, event_loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> bool: ...
    def outcome(self) -> Any: ...
    def begin_waiting(self, coalescer: Coalescer) -> None: ...
    def leave(self) -> None: ...
    def time_out(self, timeout: float | None) -> None: ...

@final
class Token:
    """The lead of a flight whose call runs in a task."""

    def enter(self) -> None: ...
    @staticmethod
    def enter_all(tokens: list[Token]) -> None: ...
    def led_by(self, task: asyncio.Task[Any] | Part, caller: asyncio.Task[Any]) -> None: ...
    def complete(self, value: object) -> Any: ...
    def retained_for(self, value: object) -> float: ...
    def count_store_hit(self) -> None: ...
    def fail(self, error: BaseException) -> bool: ...
    def lose_loop(self) -> None: ...
    def task_done(self, task: asyncio.Task[Any]) -> None: ...

def _install(**hooks: Callable[..., Any]) -> None: ...
def _stop_sweeper() -> None: ...
def _advance_clock(seconds: float) -> None: ...
def _carry_calls() -> None: ...
def _check_seconds(name: str, value: object, /) -> float: ...
def _retain_of_call(value: _T, ttl_seconds: float, call_seconds: float, /) -> Retain[_T]: ...

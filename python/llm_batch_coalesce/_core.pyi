"""The compiled core. Public names are re-exported by the package; the rest is for the package alone."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable
from types import GenericAlias
from typing import Any, Final, Generic, Literal, Self, TypeVar, final, overload
from weakref import ReferenceType

from typing_extensions import disjoint_base

from llm_batch_coalesce._reports import Outcome

__all__ = [
    "Coalescer",
    "Retain",
    "ThreadCoalescer",
    "Ticket",
    "Token",
    "__version__",
    "_advance_clock",
    "_check_seconds",
    "_install",
    "_stop_sweeper",
]

_T = TypeVar("_T")
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
    def _stats(self) -> tuple[int, int, int, int, int, int, int, int, int, int]: ...
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
    def _waiters(self, key: Hashable) -> int: ...

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
    def future(self) -> asyncio.Future[None] | None: ...
    @property
    def limit(self) -> float | None: ...
    def token(self, coalescer: Coalescer) -> Token: ...
    def wait_with(self, event_loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> bool: ...
    def outcome(self) -> Any: ...
    def leave(self) -> None: ...
    def time_out(self, timeout: float | None) -> None: ...

@final
class Token:
    """The lead of a flight whose call runs in a task."""

    def enter(self) -> None: ...
    def led_by(self, task: asyncio.Task[Any], caller: asyncio.Task[Any]) -> None: ...
    def complete(self, value: object) -> None: ...
    def fail(self, error: BaseException) -> bool: ...
    def lose_loop(self) -> None: ...
    def task_done(self, task: asyncio.Task[Any]) -> None: ...

def _install(**hooks: Callable[..., Any]) -> None: ...
def _stop_sweeper() -> None: ...
def _advance_clock(seconds: float) -> None: ...
def _check_seconds(name: str, value: object, /) -> float: ...

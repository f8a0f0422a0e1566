"""The compiled core. Public names are re-exported by the package; the rest is for the package alone."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, Final, Self, TypeVar, final
from weakref import ReferenceType

from typing_extensions import disjoint_base

__all__ = [
    "Coalescer",
    "ThreadCoalescer",
    "Ticket",
    "Token",
    "__version__",
    "_advance_clock",
    "_install",
    "_stop_sweeper",
]

_T = TypeVar("_T")

__version__: Final[str]

@disjoint_base
class Coalescer:
    """What both kinds of coalescer have: the map, the options, and the questions about them."""

    def __new__(cls, ttl_seconds: float = 5.0, error_ttl_seconds: float | None = None) -> Self: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __contains__(self, key: object, /) -> bool: ...
    def clear(self) -> None:
        """Drop all retained outcomes and disown the flights under way.

        Their callers still get the outcome, but the next caller of the key leads a call of its own.
        """

    def _begin(self, key: Hashable, fn: Callable[[], Awaitable[Any]]) -> Any: ...
    def _waiters(self, key: Hashable) -> int: ...

class ThreadCoalescer(Coalescer):
    """The coalescer of threads."""

    def __new__(cls, ttl_seconds: float = 5.0, error_ttl_seconds: float | None = None) -> Self: ...
    def get_or_call(self, key: Hashable, fn: Callable[[], _T]) -> _T:
        """Return the outcome of `key`: the one retained, that of the call under way, or that of calling `fn()`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Called without arguments, in this thread, if this caller leads.

        Returns:
            What the call returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the leader, a copy for everybody else.
            RecursiveCallError: If the call that computes this key asks for it.
            CallResultError: If `fn()` returns a coroutine. It is a TypeError.
            TypeError: If the key is unhashable or `fn` is not callable.
        """

@final
class Ticket:
    """A task's place in a flight that it does not find retained."""

    @property
    def leads(self) -> bool: ...
    @property
    def future(self) -> asyncio.Future[None] | None: ...
    def token(self, coalescer: Coalescer) -> Token: ...
    def wait_with(self, event_loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> bool: ...
    def outcome(self) -> Any: ...
    def leave(self) -> None: ...

@final
class Token:
    """The lead of a flight whose call runs in a task."""

    def enter(self) -> None: ...
    def led_by(self, task: asyncio.Task[Any]) -> None: ...
    def complete(self, value: object) -> None: ...
    def fail(self, error: BaseException) -> bool: ...
    def lose_loop(self) -> None: ...
    def task_done(self, task: asyncio.Task[Any]) -> None: ...

def _install(
    *,
    refuse: Callable[[Callable[[], Any], Coroutine[Any, Any, Any]], Exception],
    settle: Callable[[Coalescer, BaseException], tuple[Exception, bool] | None],
    copy_error: Callable[[Exception], Exception],
    recursive_error: Callable[[Hashable], Exception],
    cancel_call: Callable[[ReferenceType[Any]], None],
    call_is_lost: Callable[[ReferenceType[Any]], bool],
) -> None: ...
def _stop_sweeper() -> None: ...
def _advance_clock(seconds: float) -> None: ...

"""What both kinds of coalescer have that is written in Python."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from llm_batch_coalesce._core import Coalescer
from llm_batch_coalesce._decorator import coalesced
from llm_batch_coalesce._reports import FlightInfo, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from llm_batch_coalesce._async import AsyncBatchCoalescer
    from llm_batch_coalesce._decorator import Decorator
    from llm_batch_coalesce._sync import BatchCoalescer


class Face(Coalescer):
    """Reports and the decorator."""

    __slots__ = ()

    def stats(self) -> Stats:
        """Return the counters."""
        return Stats(*self._stats())

    def flights(self) -> list[FlightInfo]:
        """Return the flights under way, forgotten ones too, oldest first."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        flights = []
        for key, age, waiters, thread, caller, call, is_stream in self._flights():
            task = (caller and caller()) or (call and call())
            leader = task.get_name() if task else None if thread is None else names.get(thread, f"thread {thread}")
            flights.append(FlightInfo(key, age, waiters, leader, is_stream))
        return sorted(flights, key=lambda flight: -flight.age_seconds)

    def coalesced(self, key: Callable[..., Hashable] | None = None) -> Decorator:
        """Make a decorator: calls of the function with the same key share one call.

        A plain function is shared among threads and a coroutine function among tasks, on the same keys whichever kind
        of coalescer decorates. The result is a function with the same signature and has `.coalescer` (the face in
        use), `.key_for(...)` and `.forget(...)`, which take the function's arguments; those of a method take the
        instance first, those of a class method the class. Below `@classmethod` and `@staticmethod` it works as well.

        Args:
            key: Makes the key of the call's arguments; what it returns is the key as it is. By default the key is the
                function's module, its qualified name and its arguments with their defaults, so that `f(1)` and
                `f(x=1)` are one; arguments must be hashable then, and those of a method include the instance, which
                a retained outcome keeps alive. Functions that share a name (closures, lambdas) share no key. Where
                another decorator stands below, its wrapper's own parameters count: `f(1)` and `f(x=1)` are two if
                those are `*args, **kwargs`.

        Returns:
            The decorator.

        Raises:
            TypeError: If `key` is not a plain function. The decorator raises it for what is no function, for a
                generator function, and for a classmethod or staticmethod, which must stand above it.
        """
        return coalesced(cast("BatchCoalescer | AsyncBatchCoalescer", self), key)

"""The coalescer of threads. Its `get_or_call` is compiled: a hit enters no Python frame."""

from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Literal

from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._core import ThreadCoalescer
from llm_batch_coalesce._decorator import Decorator, coalesced
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._reports import Reporting
from llm_batch_coalesce._sharing import shown


class BatchCoalescer(ThreadCoalescer, Reporting):
    """Shares one call among all threads that ask for the same key at the same time.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too.

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
        name: What errors, the log and `repr` call this coalescer.

    Raises:
        TypeError: If an argument has the wrong type (a bool is no number).
        ValueError: If an argument has no sensible value: negative or NaN seconds, `max_retained` below 1.

    Example:
        >>> coalescer = BatchCoalescer(ttl_seconds=5.0)
        >>> coalescer.get_or_call(key="define:alpha", fn=lambda: "return beyond the benchmark's")
        "return beyond the benchmark's"
    """

    __slots__ = ()

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
                a retained outcome keeps alive. Functions that share a name (closures, lambdas) share no key.

        Returns:
            The decorator.

        Raises:
            TypeError: If `key` is not a plain function. The decorator raises it for what is no function, for a
                generator function, and for a classmethod or staticmethod, which must stand above it.
        """
        return coalesced(self, key)

    def as_async(self, *, on_abandoned: Literal["cancel", "finish"] = "cancel") -> AsyncBatchCoalescer:
        """Return a coalescer of tasks on the same keys: a thread and a task that ask for one share one call.

        Args:
            on_abandoned: What becomes of a call that a task leads when its last caller was cancelled: `"cancel"`
                cancels it, `"finish"` lets it run on and retains its outcome.

        Returns:
            A new face of this coalescer, with the same options. It keeps this one alive.

        Raises:
            ValueError: If `on_abandoned` is another word.
        """
        face = AsyncBatchCoalescer.__new__(AsyncBatchCoalescer, on_abandoned=on_abandoned, face_of=self)  # type: ignore[call-arg]
        AsyncBatchCoalescer.__init__(face)
        return face


def refuse(fn: Callable[[], Any], coroutine: Coroutine[Any, Any, Any]) -> CallResultError:
    """Make the error of a callable that returned a coroutine, and close that."""
    coroutine.close()
    return CallResultError(
        f"fn returned a coroutine, which threads cannot share; use AsyncBatchCoalescer for {shown(fn)}"
    )

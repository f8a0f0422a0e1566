"""The coalescer of threads. Its `get_or_call` is compiled: a hit enters no Python frame."""

from collections.abc import Callable, Coroutine, Hashable, Mapping
from typing import Any, Literal, TypeVar

from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._core import ThreadCoalescer
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._face import Face
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._warm import check, in_threads

K = TypeVar("K", bound=Hashable)


class BatchCoalescer(ThreadCoalescer, Face):
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
        store: A cache behind this one that the leader asks before it calls and tells when its call has succeeded: a
            mapping (a dict, or a cache of cachetools, cachebox or diskcache), or an object with `get(key)` and
            `set(key, value, ttl_seconds)`. Threads use it at the same time: put a lock around one that is not made for
            that. What is not retained is not written; a store that raises is logged, counted, and taken for a miss.
            `forget()` and `clear()` do not reach it.

    Raises:
        TypeError: If an argument has the wrong type (a bool is no number).
        ValueError: If an argument has no sensible value: negative or NaN seconds, `max_retained` below 1.

    Example:
        >>> coalescer = BatchCoalescer(ttl_seconds=5.0)
        >>> coalescer.get_or_call(key="define:alpha", fn=lambda: "return beyond the benchmark's")
        "return beyond the benchmark's"
    """

    __slots__ = ()

    def warm(
        self,
        items: Mapping[K, Callable[[], Any]],
        *,
        concurrency: int = 4,
        progress: Callable[[int, int], object] | None = None,
        ttl_seconds: float | None = None,
    ) -> dict[K, Exception]:
        """Fill keys ahead of their callers, through ordinary flights: callers that come meanwhile join them.

        If it is interrupted, or `progress` fails, it begins no more calls and waits for those under way.

        Args:
            items: For each key the callable that a leader would run; as `fn` in `get_or_call`.
            concurrency: How many calls run at once, each in a thread of a pool.
            progress: Called in this thread after each key with how many are done, and how many there are.
            ttl_seconds: The TTL in seconds of what is filled, instead of the coalescer's.

        Returns:
            The errors of the keys that failed; the other keys were filled all the same.

        Raises:
            TypeError: If an argument has the wrong type, or a callable is none.
            ValueError: If `concurrency` is below 1, or a number of seconds is negative or NaN.

        Example:
            >>> coalescer = BatchCoalescer()
            >>> coalescer.warm({"alpha": lambda: "one", "beta": lambda: "two"})
            {}
            >>> coalescer.peek("beta")
            'two'
        """
        check(items, concurrency, progress)
        self._check_ttl(ttl_seconds)
        return in_threads(self, items, concurrency, progress or _no_progress, ttl_seconds)

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
        return AsyncBatchCoalescer._on(self, on_abandoned)  # noqa: SLF001 - the two are one


def _no_progress(done: int, of: int) -> None:
    """Tell nobody."""


def refuse(fn: Callable[[], Any], coroutine: Coroutine[Any, Any, Any]) -> CallResultError:
    """Make the error of a callable that returned a coroutine, and close that."""
    coroutine.close()
    return CallResultError(
        f"fn returned a coroutine, which threads cannot share; use AsyncBatchCoalescer for {shown(fn)}"
    )

"""The coalescer of threads. Its `get_or_call` is compiled: a hit enters no Python frame."""

from collections.abc import Callable, Coroutine
from typing import Any

from llm_batch_coalesce._core import ThreadCoalescer
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._sharing import shown


class BatchCoalescer(ThreadCoalescer):
    """Shares one call among all threads that ask for the same key at the same time.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too.

    Args:
        ttl_seconds: How long a value is retained after its call has completed, in seconds. 0 retains nothing;
            `math.inf` retains until `clear()`.
        error_ttl_seconds: The same for an `Exception` that the call raised. None takes `ttl_seconds`; 0 lets the
            next caller try anew.

    Raises:
        TypeError: If an argument is no number (a bool is none).
        ValueError: If an argument is negative or NaN.

    Example:
        >>> coalescer = BatchCoalescer(ttl_seconds=5.0)
        >>> coalescer.get_or_call(key="define:alpha", fn=lambda: "return beyond the benchmark's")
        "return beyond the benchmark's"
    """

    __slots__ = ()


def refuse(fn: Callable[[], Any], coroutine: Coroutine[Any, Any, Any]) -> CallResultError:
    """Make the error of a callable that returned a coroutine, and close that."""
    coroutine.close()
    return CallResultError(
        f"fn returned a coroutine, which threads cannot share; use AsyncBatchCoalescer for {shown(fn)}"
    )

"""Shapes that coalescers are published in, over the same core; whoever uses one can change to it as it is.

None retains anything: callers share a call only while it is under way.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._requests import plain, render
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._sync import BatchCoalescer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class CoalescerStats:
    """The counters of a `RequestCoalescer` or an `AsyncRequestCoalescer`, as `stats()` reads them.

    Attributes:
        inflight_count: Calls under way that a caller of the same key would join.
        coalesced_calls: Callers that joined a call instead of making one, those that were cancelled in it too.
        underlying_calls: Calls that were made, failed ones too.
    """

    inflight_count: int
    coalesced_calls: int
    underlying_calls: int


class RequestCoalescer:
    """Shares one call among all threads that ask for the same key while it is under way. Nothing is retained.

    Example:
        >>> RequestCoalescer().call("add:1:2", lambda a, b: a + b, 1, b=2)
        3
    """

    def __init__(self) -> None:
        self._coalescer = BatchCoalescer(ttl_seconds=0)

    def call(self, key: Hashable, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the outcome of the call of `key` that is under way, or that of calling `fn`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Called in this thread if this caller makes the call.
            *args: Handed to `fn`.
            **kwargs: Handed to `fn`.

        Returns:
            What the call returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the caller that made it, a copy for everybody else.
            concurrent.futures.CancelledError: If the call was cancelled while this caller waited for it.
            RecursiveCallError: If the call that computes this key asks for it.
            DeadlockError: If to wait would close a circle of calls that wait for each other.
            CallResultError: If `fn` returns a coroutine. It is a TypeError.
            TypeError: If the key is unhashable or `fn` is not callable.
        """
        return self._coalescer.get_or_call(key, functools.partial(_checked("fn", fn), *args, **kwargs))

    def cancel(self, key: Hashable) -> bool:
        """Wake the callers that wait for the call of `key` with CancelledError, and let the next caller make a new one.

        The call itself goes on, and the caller that made it gets its outcome.

        Returns:
            Whether there was such a call.

        Raises:
            TypeError: If the key is unhashable.
        """
        return self._coalescer.cancel(key)

    def stats(self) -> CoalescerStats:
        """Read the counters; they are exact while nobody calls."""
        return _stats(self._coalescer)

    def reset_stats(self) -> None:
        """Count coalesced and underlying calls from zero again; calls under way stay counted as in flight."""
        self._coalescer.reset_stats()


class AsyncRequestCoalescer:
    """Shares one call among all tasks that ask for the same key while it is under way. Nothing is retained.

    It is bound to no event loop. The call runs in a task of its own, which is cancelled when its last caller has gone.

    Example:
        >>> import asyncio
        >>> async def add(a: int, b: int) -> int:
        ...     return a + b
        >>> asyncio.run(AsyncRequestCoalescer().call("add:1:2", add, 1, b=2))
        3
    """

    def __init__(self) -> None:
        self._coalescer = AsyncBatchCoalescer(ttl_seconds=0)

    async def call(self, key: Hashable, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the outcome of the call of `key` that is under way, or that of awaiting `fn(*args, **kwargs)`.

        Args:
            key: Any hashable object; keys that are equal as in a dict are one.
            fn: Returns an awaitable; called if this caller makes the call.
            *args: Handed to `fn`.
            **kwargs: Handed to `fn`.

        Returns:
            What the call's awaitable returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the caller that made it, a copy for everybody else.
            asyncio.CancelledError: If this caller was cancelled, or the call while this caller waited for it.
            RecursiveCallError: If the call that computes this key asks for it.
            DeadlockError: If to wait would close a circle of calls that wait for each other.
            CallResultError: If `fn` returns something that cannot be awaited. It is a TypeError.
            TypeError: If the key is unhashable or `fn` is not callable.
        """
        return await self._coalescer.get_or_call(key, functools.partial(_checked("fn", fn), *args, **kwargs))

    async def cancel(self, key: Hashable) -> bool:
        """Wake the callers that wait for the call of `key` with CancelledError, and let the next caller make a new one.

        The call itself goes on, and the caller that made it gets its outcome.

        Returns:
            Whether there was such a call.

        Raises:
            TypeError: If the key is unhashable.
        """
        return self._coalescer.cancel(key)

    def stats(self) -> CoalescerStats:
        """Read the counters; they are exact while nobody calls."""
        return _stats(self._coalescer)

    def reset_stats(self) -> None:
        """Count coalesced and underlying calls from zero again; calls under way stay counted as in flight."""
        self._coalescer.reset_stats()


class BatchCoalesce:
    """Shares one call to a model among all threads that make the same request while it is under way.

    The request is the key: messages, model and extras, but not the function. Use one `BatchCoalesce` for each function
    that answers requests in its own way.

    Example:
        >>> def call_llm(messages: list[dict[str, str]], model: str) -> str:
        ...     return f"{model} answers {messages[0]['content']}"
        >>> BatchCoalesce().get_or_call([{"role": "user", "content": "hello"}], call_llm, model="small")
        'small answers hello'
    """

    def __init__(self) -> None:
        self._coalescer = BatchCoalescer(ttl_seconds=0)

    def get_or_call(
        self, messages: Sequence[Mapping[str, Any]], call_fn: Callable[..., T], model: str = "", **extras: object
    ) -> T:
        """Return the outcome of the same request under way, or that of `call_fn(messages, model=model, **extras)`.

        Args:
            messages: What is asked: lists (or tuples), dicts, strings, numbers, booleans and None, as in JSON.
            call_fn: Called in this thread if this caller makes the call; without `model` if that is empty.
            model: Name of the model.
            **extras: Further options of the request, of the same types; handed to `call_fn`.

        Returns:
            What the call returned, the same object for every caller.

        Raises:
            Exception: What the call raised: the original for the caller that made it, a copy for everybody else.
            TypeError: If `call_fn` is not callable, or the request is not JSON; it names the place that is not.
            RecursiveCallError: If the call asks for the same request.
            DeadlockError: If to wait would close a circle of calls that wait for each other.
            CallResultError: If `call_fn` returns a coroutine. It is a TypeError.
        """
        return self._share(call_fn, messages, model, extras)

    def wrap(self, model: str = "") -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Make a decorator: the function takes `(messages, **extras)` then, and shares its calls as in `get_or_call`.

        Args:
            model: Name of the model for calls that give none by `model=`.

        Raises:
            TypeError: If `model` is no string, as when the decorator stands without parentheses.
        """
        if not isinstance(model, str):
            raise TypeError(f"model must be a string, not {shown(model)}; without a model, write .wrap()")

        def decorate(call_fn: Callable[..., T]) -> Callable[..., T]:
            @functools.wraps(call_fn)
            def call(messages: Sequence[Mapping[str, Any]], *, model: str = model, **extras: object) -> T:
                return self._share(call_fn, messages, model, extras)

            return call

        return decorate

    @property
    def call_count(self) -> int:
        """Calls that were made, failed ones too."""
        return _stats(self._coalescer).underlying_calls

    @property
    def coalesced_count(self) -> int:
        """Callers that joined a call instead of making one."""
        return _stats(self._coalescer).coalesced_calls

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return _stats(self._coalescer).inflight_count

    def stats(self) -> dict[str, int]:
        """Read `call_count`, `coalesced_count` and `in_flight`; they are exact while nobody calls."""
        stats = _stats(self._coalescer)
        return {
            "call_count": stats.underlying_calls,
            "coalesced_count": stats.coalesced_calls,
            "in_flight": stats.inflight_count,
        }

    def reset_stats(self) -> None:
        """Count calls and coalesced ones from zero again; calls under way stay counted as in flight."""
        self._coalescer.reset_stats()

    def _share(
        self,
        call_fn: Callable[..., T],
        messages: Sequence[Mapping[str, Any]],
        model: str,
        extras: dict[str, object],
    ) -> T:
        # No extra can have one of these names, for they are parameters.
        key = _digest({"messages": messages, "model": model, **extras})
        options = {"model": model, **extras} if model else extras
        return self._coalescer.get_or_call(key, functools.partial(_checked("call_fn", call_fn), messages, **options))


def _checked(name: str, fn: Callable[P, T]) -> Callable[P, T]:
    if not callable(fn):
        raise TypeError(f"{name} must be callable, not {shown(fn)}")
    return fn


def _stats(coalescer: BatchCoalescer | AsyncBatchCoalescer) -> CoalescerStats:
    stats = coalescer.stats()
    return CoalescerStats(
        # A cancelled call may still run, but nobody can join it.
        inflight_count=len(coalescer),
        # Who was cancelled while waiting had joined.
        coalesced_calls=stats.joined + stats.cancelled,
        underlying_calls=stats.calls,
    )


def _digest(request: dict[str, object]) -> str:
    """Return the SHA-256 of a request as sorted JSON, the same for two requests only if they are one as JSON."""
    return hashlib.sha256(render({name: plain(value, name) for name, value in request.items()})).hexdigest()

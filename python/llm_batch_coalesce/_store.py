"""Stores beside a coalescer: what the leader asks before it calls, and tells when its call has succeeded."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Hashable
from inspect import isawaitable
from types import CoroutineType
from typing import Any, Protocol, TypeVar

from llm_batch_coalesce._core import Coalescer, Retain, Token
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._reports import digest, in_coalescer, logger
from llm_batch_coalesce._shown import shown

_Key_contra = TypeVar("_Key_contra", contravariant=True)


class MappingStore(Protocol[_Key_contra]):
    """A store like a mapping: a dict, or a cache of cachetools, cachebox or diskcache.

    It is never told a TTL, and keeps values by its own rules, also those of a `Retain`. What has `__setitem__` is one,
    though it may have `set`, too. What a store has served is retained for the coalescer's TTL anew.
    """

    def get(self, key: _Key_contra, default: Any, /) -> Any:  # noqa: ANN401 - whatever is stored
        """Return the value of a key, or the default."""

    def __setitem__(self, key: _Key_contra, value: Any, /) -> None:  # noqa: ANN401 - as above
        """Keep a value."""


class TtlStore(Protocol[_Key_contra]):
    """A store that is told how long a value is good."""

    def get(self, key: _Key_contra, /) -> Any:  # noqa: ANN401 - as above
        """Return the value of a key, or None."""

    def set(self, key: _Key_contra, value: Any, ttl_seconds: float, /) -> Any:  # noqa: ANN401 - as above
        """Keep a value for so many seconds, which may be `math.inf`."""


class AsyncStore(Protocol[_Key_contra]):
    """A store whose `get` and `set` are awaited."""

    def get(self, key: _Key_contra, /) -> Awaitable[Any]:
        """Return the value of a key, or None."""

    def set(self, key: _Key_contra, value: Any, ttl_seconds: float, /) -> Awaitable[Any]:  # noqa: ANN401 - as above
        """Keep a value for so many seconds, which may be `math.inf`."""


class Store:
    """One interface for all kinds of store. `get` returns the store itself for what it does not have."""

    __slots__ = ("_default", "_get", "_set", "is_async")

    is_async: bool
    _get: Callable[..., Any]
    _set: Callable[[Hashable, Any, float], Any]

    def __init__(self, store: Any) -> None:  # noqa: ANN401 - anything that has the methods
        get, set_item, set_ = (getattr(store, name, None) for name in ("get", "__setitem__", "set"))
        if not callable(get) or not (callable(set_item) or callable(set_)):
            raise TypeError(
                f"store must have get() and __setitem__(), or get() and set(key, value, ttl_seconds): {shown(store)}"
            )
        self._get = get
        self._default = _takes_default(get, is_mapping=callable(set_item))
        self._set = (lambda key, value, _: set_item(key, value)) if callable(set_item) else set_  # type: ignore[assignment]
        self.is_async = inspect.iscoroutinefunction(get) or inspect.iscoroutinefunction(set_)

    def get(self, key: Hashable) -> Any:  # noqa: ANN401 - the value
        """Return the value of a key, or this store if there is none."""
        return self._found(_plain(self._ask(key)))

    def set(self, key: Hashable, value: Any, ttl_seconds: float) -> None:  # noqa: ANN401 - as above
        """Keep a value."""
        _plain(self._set(key, value, ttl_seconds))

    async def aget(self, key: Hashable) -> Any:  # noqa: ANN401 - as above
        """Return the same as `get`, of a store that may have to be awaited."""
        value = self._ask(key)
        return self._found(await value if isawaitable(value) else value)

    async def aset(self, key: Hashable, value: Any, ttl_seconds: float) -> None:  # noqa: ANN401 - as above
        """Do the same as `set`, with a store that may have to be awaited."""
        done = self._set(key, value, ttl_seconds)
        if isawaitable(done):
            await done

    def _ask(self, key: Hashable) -> Any:  # noqa: ANN401 - as above
        if self._default == "none":
            return self._get(key)
        return self._get(key, self) if self._default == "position" else self._get(key, default=self)

    def _found(self, value: Any) -> Any:  # noqa: ANN401 - as above
        return self if value is None and self._default == "none" else value


async def through_store(coalescer: Coalescer, token: Token, key: Hashable, fn: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - as above
    """Get the value of a key from the store, or else from the callable."""
    store = coalescer._store  # noqa: SLF001 - this is a part of it
    if store is not None:
        found = await ask_store(coalescer, store, key)
        if found is not store:
            token.count_store_hit()
            return found
    value = await checked(fn())
    await tell_store(coalescer, token, key, value)
    return value


async def ask_store(coalescer: Coalescer, store: Store, key: Hashable) -> Any:  # noqa: ANN401 - as above
    """Return the value of a key, or the store if it has none; one that fails has nothing."""
    try:
        return await store.aget(key)
    except Exception as error:  # noqa: BLE001 - it is the user's, and reported
        coalescer._store_failed(key, "get", error)  # noqa: SLF001
    return store


async def tell_store(coalescer: Coalescer, token: Token, key: Hashable, value: Any) -> None:  # noqa: ANN401 - as above
    """Give a value that is about to be retained to the store, if there is one."""
    store = coalescer._store  # noqa: SLF001
    seconds = 0 if store is None else token.retained_for(value)
    if store is None or seconds == 0:
        return
    try:
        await store.aset(key, value.value if type(value) is Retain else value, seconds)
    except Exception as error:  # noqa: BLE001 - as above
        coalescer._store_failed(key, "set", error)  # noqa: SLF001


def checked(awaitable: Any) -> Awaitable[Any]:  # noqa: ANN401 - whatever a callable has returned
    """Refuse what cannot be awaited."""
    if type(awaitable) is not CoroutineType and not isawaitable(awaitable):
        msg = f"fn must return an awaitable, not {shown(awaitable)}; use BatchCoalescer for plain functions"
        raise CallResultError(msg)
    return awaitable


def adapt_store(store: object, for_tasks: bool) -> Store:  # noqa: FBT001 - called by the core
    """Check a store, and give it the one interface."""
    adapted = Store(store)
    if adapted.is_async and not for_tasks:
        raise TypeError(f"store must not be async for threads, which cannot await it: {shown(store)}")
    return adapted


def report_store_error(error: Exception, verb: str, key: Hashable, name: str | None) -> None:
    """Log a store that has failed. Keys may hold prompts, so a digest stands for the content."""
    logger.warning(
        "the store%s failed to %s a key of type %s with digest %s, which counts as a miss: %s",
        in_coalescer(name),
        verb,
        type(key).__qualname__,
        digest(key),
        shown(error),
        exc_info=error,
    )


def _takes_default(get: Callable[..., Any], *, is_mapping: bool) -> str:
    try:
        parameters = list(inspect.signature(get).parameters.values())
    except (TypeError, ValueError):
        # Compiled, and silent about itself: as mappings have it.
        return "position" if is_mapping else "none"
    for number, parameter in enumerate(parameters):
        if parameter.name == "default":
            by_position = number == 1 and parameter.kind is not parameter.KEYWORD_ONLY
            return "position" if by_position else "keyword"
        if is_mapping and parameter.kind is parameter.VAR_POSITIONAL:
            return "position"
    return "none"


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a store has returned
    if not isawaitable(value):
        return value
    if asyncio.iscoroutine(value):
        value.close()
    raise TypeError(f"threads cannot await what the store returned: {shown(value)}")

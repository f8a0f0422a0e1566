"""The coalescer of a fleet for tasks."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

import redis.asyncio

from llm_batch_coalesce import _redis_tasks
from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._core import Retain
from llm_batch_coalesce._fleet_flight import BackendTroubleError, WaitTimeoutError
from llm_batch_coalesce._fleet_options import OnBackendError
from llm_batch_coalesce._fleet_wire import Serializer
from llm_batch_coalesce._redis_member import Made, Member
from llm_batch_coalesce._reports import Outcome
from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterable

T = TypeVar("T")


class AsyncDistributedBatchCoalescer(Member):
    """Shares one call among all tasks of all processes of a fleet that ask for the same key at the same time.

    It is bound to the event loop of its first use. Everything else is as in `DistributedBatchCoalescer`; `get_or_call`,
    `outcome`, `peek`, `forget` and `close` are awaited.

    Args:
        client: A client of redis-py's asyncio: `redis.asyncio.Redis`, also of a Sentinel, or
            `redis.asyncio.RedisCluster`.
        ttl_seconds: As in `DistributedBatchCoalescer`, in seconds.
        error_ttl_seconds: As in `DistributedBatchCoalescer`, in seconds.
        private_errors: As in `DistributedBatchCoalescer`.
        max_retained: As in `DistributedBatchCoalescer`.
        on_abandoned: What becomes of a call when its last caller in this process was cancelled: `"cancel"` cancels it,
            and one waiter in the fleet takes over; `"finish"` lets it run on.
        name: As in `DistributedBatchCoalescer`.
        namespace: As in `DistributedBatchCoalescer`.
        lease_seconds: As in `DistributedBatchCoalescer`, in seconds.
        serializer: As in `DistributedBatchCoalescer`.
        key_encoder: As in `DistributedBatchCoalescer`.
        on_backend_error: As in `DistributedBatchCoalescer`.
        backend_timeout_seconds: As in `DistributedBatchCoalescer`, in seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has no sensible value.
    """

    # Public names read as they are imported.
    __module__ = "llm_batch_coalesce.redis"

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster,
        ttl_seconds: float = 5.0,
        *,
        error_ttl_seconds: float | Callable[[Any], float | None] | None = None,
        private_errors: type[BaseException] | Iterable[type[BaseException]] = (),
        max_retained: int | None = None,
        on_abandoned: Literal["cancel", "finish"] = "cancel",
        name: str | None = None,
        namespace: str = "llm_batch_coalesce",
        lease_seconds: float = 10.0,
        serializer: Serializer | None = None,
        key_encoder: Callable[[Any], str | bytes] | None = None,
        on_backend_error: OnBackendError = "call",
        backend_timeout_seconds: float = 1.0,
    ) -> None:
        super().__init__(
            client,
            (redis.asyncio.Redis, redis.asyncio.RedisCluster),
            "a redis.asyncio.Redis or redis.asyncio.RedisCluster",
            blocks=False,
            ttl_seconds=ttl_seconds,
            error_ttl_seconds=error_ttl_seconds,
            private_errors=private_errors,
            name=name,
            namespace=namespace,
            lease_seconds=lease_seconds,
            serializer=serializer,
            key_encoder=key_encoder,
            on_backend_error=on_backend_error,
            backend_timeout_seconds=backend_timeout_seconds,
        )
        self._local: AsyncBatchCoalescer = AsyncBatchCoalescer(
            ttl_seconds, on_abandoned=on_abandoned, **self._local_options(max_retained)
        )
        self._server: _redis_tasks.Server | None = None
        self._closing: asyncio.Task[None] | None = None

    def _connected(self) -> _redis_tasks.Server:
        if self._closed:
            raise RuntimeError(f"{shown(self)} is closed")
        if self._process != os.getpid():
            self._server, self._process = None, os.getpid()
            self._fleet.begin_process()
        if self._server is None:
            self._server = _redis_tasks.Server(self._client, self._fleet, self._forgetter())
            weakref.finalize(self, self._server.stop).atexit = False
        elif self._server.loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{shown(self)} is bound to another event loop, that of its first use")
        return self._server

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
        """Return the outcome of `key`: the one retained, that of the call under way in the fleet, or that of `fn()`.

        Args:
            key: As in `DistributedBatchCoalescer.get_or_call`.
            fn: Called without arguments if this caller leads in the whole fleet; returns an awaitable.
            timeout: How long this caller waits for another's call, in seconds; 0 does not wait.
            ttl_seconds: The TTL in seconds of the outcome that this caller leads, instead of the coalescer's.

        Raises:
            Exception: As in `DistributedBatchCoalescer.get_or_call`. Circles and recursions that pass through the
                server are not seen here, either.
            asyncio.CancelledError: If this caller was cancelled.
            RuntimeError: If the coalescer is closed, or bound to another event loop.
        """
        self._connected()
        fleet_key = self._key(key)
        call = _AsyncMade(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            return await self._local.get_or_call(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)
        except WaitTimeoutError:
            raise call.timeout_error() from None

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
        """Return the same as `get_or_call`, with this caller's role in the fleet and what is known of the flight.

        Its `waiters` are those of this process; its `duration_seconds` are those of the call, wherever it was made.

        Args:
            key: As in `get_or_call`.
            fn: As in `get_or_call`.
            timeout: As in `get_or_call`, in seconds.
            ttl_seconds: As in `get_or_call`, in seconds.

        Raises:
            Exception: As in `get_or_call`.
        """
        self._connected()
        fleet_key = self._key(key)
        call = _AsyncMade(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            outcome = await self._local.outcome(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)
        except WaitTimeoutError:
            raise call.timeout_error() from None
        return call.in_fleet(outcome)

    async def peek(self, key: Hashable, default: Any = None) -> Any:  # noqa: ANN401 - whatever was retained
        """Return the retained value of a key, here or on the server, or the default; as in `DistributedBatchCoalescer`.

        Args:
            key: As in `get_or_call`.
            default: What to return if no value is retained, or the server cannot be used.

        Raises:
            BackendError: As in `get_or_call`.
        """
        server, fleet_key, missing = self._connected(), self._key(key), object()
        found = self._local.peek(fleet_key, missing)
        if found is not missing:
            return found
        try:
            payload = await server.ask(self._peek(fleet_key))
        except BackendTroubleError as trouble:
            self._trouble(trouble)
            return default
        return self._peeked(payload, default)

    async def forget(self, key: Hashable) -> bool:
        """Drop a key in the whole fleet; as in `DistributedBatchCoalescer`.

        Args:
            key: As in `get_or_call`.

        Returns:
            Whether the key was retained or in flight, in this process or on the server; if the server cannot be used,
            in this process, which alone forgets it then. False may be wrong if the connection to the server was cut
            meanwhile.

        Raises:
            BackendError: As in `get_or_call`; this process has forgotten the key all the same.
        """
        server, fleet_key = self._connected(), self._key(key)
        there = self._local.forget(fleet_key)
        try:
            return bool(await server.ask(self._forget(fleet_key))) or there
        except BackendTroubleError as trouble:
            self._trouble(trouble)
            return there

    async def close(self) -> None:
        """End the coalescer's tasks and connections; the client stays open. It cannot be used after that.

        A call under way still shares its outcome, but its lease is no longer renewed.
        """
        self._closed = True
        server, self._server = self._server, None
        if server is not None and self._process == os.getpid():
            # A task of its own: whoever is cancelled here may come again.
            self._closing = asyncio.create_task(server.close())
        closing = self._closing
        if closing is not None and closing.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([closing])
            if not closing.cancelled():
                closing.result()

    async def __aenter__(self) -> Self:
        """Return the coalescer."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()


class _AsyncMade(Made):
    _member: AsyncDistributedBatchCoalescer

    async def __call__(self) -> Any:  # noqa: ANN401 - the user's value
        server = self._member._connected()  # noqa: SLF001 - this is a part of it
        return await server.run(self._key.digest, self._steps(), self._fn)

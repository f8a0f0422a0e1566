"""Coalescing across processes and machines, on a Redis or Valkey server: one call in the whole fleet.

    from redis import Redis

    from llm_batch_coalesce.redis import DistributedBatchCoalescer

    coalescer = DistributedBatchCoalescer(Redis.from_url("rediss://..."), ttl_seconds=5.0)
    coalescer.get_or_call(key=f"define:{term}", fn=lambda: call_llm(f"Define '{term}' in one sentence."))

Callers of one process coalesce on its own map; for each flight one of them talks to the server. Needs the extra
`redis`.

An ACL user needs, for a namespace NAME and a database 0:

    ~NAME:* &NAME:0:* +evalsha +eval +get +set +del +rename +pttl +pexpire +hget +hmget +hset +hdel +hkeys +publish
    +subscribe +ping, +info to tell of an old server or a replica, +select for another database, and for clusters
    +cluster|slots +command
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar

import redis
import redis.asyncio

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce import _redis_tasks, _redis_threads
from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._core import Retain
from llm_batch_coalesce._decorator import coalesced
from llm_batch_coalesce._errors import BackendError, CallResultError, RemoteCallError, SerializationError
from llm_batch_coalesce._fleet_flight import Ask, BackendTroubleError, WaitTimeoutError, flight
from llm_batch_coalesce._fleet_keys import FleetKey, fleet_key
from llm_batch_coalesce._fleet_options import Fleet, FleetStats, OnBackendError
from llm_batch_coalesce._fleet_wire import DamagedError, JsonSerializer, Serializer, unpack
from llm_batch_coalesce._redis_clients import check_client, database_of, is_copied
from llm_batch_coalesce._reports import FlightInfo, Outcome
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._sync import BatchCoalescer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Iterable

__all__ = [
    "AsyncDistributedBatchCoalescer",
    "BackendError",
    "DistributedBatchCoalescer",
    "FleetStats",
    "JsonSerializer",
    "RemoteCallError",
    "SerializationError",
    "Serializer",
]

T = TypeVar("T")


class _Member:
    """What both classes have: options, and the keys."""

    _fleet: Fleet
    _local: BatchCoalescer | AsyncBatchCoalescer

    def _key(self, key: Hashable) -> FleetKey:
        return fleet_key(key, self._fleet.key_encoder)

    @property
    def name(self) -> str | None:
        """The name given to the constructor."""
        return self._fleet.name

    def stats(self) -> FleetStats:
        """Return the counters of this process."""
        return self._fleet.stats(self._local.stats())

    def coalesced(self, key: Callable[..., Hashable] | None = None) -> Any:  # noqa: ANN401 - a decorator
        """Make a decorator: calls of the function with the same key share one call in the fleet.

        Threads' coalescers decorate plain functions, tasks' coroutine functions. Otherwise it is as `coalesced` of
        `BatchCoalescer`; of a coroutine function, the result's `forget` is awaited.

        Args:
            key: Makes the key of the call's arguments; by default of the function's name and all of them, which must be
                of types that the fleet knows then.

        Returns:
            The decorator.

        Raises:
            TypeError: As in `BatchCoalescer.coalesced`; the decorator, for a function of the other kind.
        """
        return coalesced(self, key)  # type: ignore[arg-type]

    def reset_stats(self) -> None:
        """Count from zero. `in_flight` and `retained` are no counts and stay as they are."""
        self._local.reset_stats()
        self._fleet.reset()

    def flights(self) -> list[FlightInfo]:
        """Return this process's flights under way, oldest first: those that it leads, and those that it waits for."""
        flights = self._local.flights()
        return [
            dataclasses.replace(flight, key=flight.key.key) if isinstance(flight.key, FleetKey) else flight
            for flight in flights
        ]

    def __len__(self) -> int:
        """Return how many keys are retained or in flight in this process."""
        return len(self._local)

    def __bool__(self) -> bool:
        """Return True: an empty coalescer is one, too."""
        return True

    def __contains__(self, key: Hashable) -> bool:
        """Tell whether a key is retained or in flight in this process."""
        return self._key(key) in self._local

    def __repr__(self) -> str:
        """Show the name and the counters."""
        stats = self.stats()
        name = "" if self.name is None else f" {self.name!r}"
        return (
            f"<{type(self).__name__}{name} ttl_seconds={self._fleet.ttl_seconds} in_flight={stats.in_flight} "
            f"retained={stats.retained} calls={stats.calls} joined={stats.joined} hits={stats.hits} "
            f"errors={stats.errors}>"
        )


def _forgetter(local: BatchCoalescer | AsyncBatchCoalescer) -> Callable[[str | None], None]:
    """Make what drops a digest, or everything, from a local map, which it does not keep alive."""
    reference = weakref.ref(local)

    def forget(digest: str | None) -> None:
        held = reference()
        if held is None:
            return
        if digest is None:
            held.clear()
        else:
            held.forget(FleetKey(digest, digest))

    return forget


class _Connections:
    """The server as one process sees it, once that has used it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: _redis_threads.Server | None = None


class DistributedBatchCoalescer(_Member):
    """Shares one call among all threads of all processes of a fleet that ask for the same key at the same time.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too, wherever they are.
    Threads and tasks (`AsyncDistributedBatchCoalescer`) of different processes share flights.

    Args:
        client: A client of redis-py: `redis.Redis`, also of a Sentinel, or `redis.RedisCluster`. The coalescer makes
            connections of its own to the same server, so the client stays yours. One of a cluster, or with a pool class
            of your own, is used as it is, and needs a `socket_timeout` and no `decode_responses`.
        ttl_seconds: How long a value is retained after its call has completed, in seconds; finite.
        error_ttl_seconds: The same for an `Exception`; as in `BatchCoalescer`.
        private_errors: Classes of exceptions that concern one caller only; as in `BatchCoalescer`.
        max_retained: How many outcomes this process retains at most; the server keeps them by its own rules.
        name: What errors, the log and `repr` call this coalescer.
        namespace: What the names of its keys and channels on the server begin with. Fleets of different namespaces or
            databases never share.
        lease_seconds: How long a key stays taken when its leader dies, in seconds. It is renewed at a third of that for
            as long as the callable runs.
        serializer: An object with `dumps` and `loads`; None takes JSON, as the standard `json` has it. Do not take
            pickle unless everybody who can write to the server may run code in your processes.
        key_encoder: Makes str or bytes of keys that are no str, bytes, int, float, bool, None or tuple of them.
        on_backend_error: What to do while the server is down, slow or refuses: `"call"` coalesces in this process
            alone, `"raise"` raises `BackendError`. It recovers by itself.
        backend_timeout_seconds: How long the server may take for an answer, in seconds.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has no sensible value.
    """

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        client: redis.Redis | redis.RedisCluster,
        ttl_seconds: float = 5.0,
        *,
        error_ttl_seconds: float | Callable[[Any], float | None] | None = None,
        private_errors: type[BaseException] | Iterable[type[BaseException]] = (),
        max_retained: int | None = None,
        name: str | None = None,
        namespace: str = "llm_batch_coalesce",
        lease_seconds: float = 10.0,
        serializer: Serializer | None = None,
        key_encoder: Callable[[Any], str | bytes] | None = None,
        on_backend_error: OnBackendError = "call",
        backend_timeout_seconds: float = 1.0,
    ) -> None:
        kinds = (redis.Redis, redis.RedisCluster)
        copied = is_copied(client)
        check_client(client, kinds, "a redis.Redis or redis.RedisCluster", copied=copied, blocks=True)
        fleet = Fleet(
            ttl_seconds=ttl_seconds,
            error_ttl_seconds=error_ttl_seconds,
            private_errors=private_errors,
            name=name,
            namespace=namespace,
            database=database_of(client),
            lease_seconds=lease_seconds,
            serializer=serializer,
            key_encoder=key_encoder,
            on_backend_error=on_backend_error,
            backend_timeout_seconds=backend_timeout_seconds,
        )
        self._fleet = fleet
        self._client = client
        self._local: BatchCoalescer = BatchCoalescer(
            ttl_seconds,
            error_ttl_seconds=fleet.local_error_ttl,
            private_errors=(*fleet.private_errors, WaitTimeoutError),
            max_retained=max_retained,
            name=name,
        )
        # By process: the child of a fork has threads and connections of its own, and locks that no thread holds which
        # stayed behind.
        self._process = os.getpid()
        self._connections: dict[int, _Connections] = {self._process: _Connections()}
        self._closed = False

    def _connected(self) -> _redis_threads.Server:
        process = os.getpid()
        connections = self._connections.get(process) or self._connections.setdefault(process, _Connections())
        with connections.lock:
            if self._closed:
                raise RuntimeError(f"{shown(self)} is closed")
            if connections.server is None:
                if self._process != process:
                    self._connections.pop(self._process, None)
                    self._process = process
                    self._fleet.begin_process()
                connections.server = _redis_threads.Server(self._client, self._fleet, _forgetter(self._local))
                weakref.finalize(self, connections.server.stop).atexit = False
            return connections.server

    def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], T | Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T:
        """Return the outcome of `key`: the one retained, that of the call under way in the fleet, or that of `fn()`.

        Args:
            key: A str, bytes, int, float, bool, None, a tuple of these, or what `key_encoder` takes.
            fn: Called without arguments, in this thread, if this caller leads in the whole fleet. It may return
                `Retain(value, ttl_seconds)`.
            timeout: How long this caller waits for another's call, in seconds; 0 does not wait. It never bounds
                the call.
            ttl_seconds: The TTL in seconds of the outcome that this caller leads, instead of the coalescer's.

        Returns:
            What the call returned. In the process that made the call it is the same object for every caller; elsewhere
            what its serializer makes of it.

        Raises:
            Exception: What the call raised, if it was made in this process; as in `BatchCoalescer`.
            RemoteCallError: If a call of another process failed.
            SerializationError: If a call of another process returned what the serializer does not take.
            BackendError: If the server cannot be used, and `on_backend_error` is `"raise"`; and at the first contact,
                if it refuses the client, is too old, or is a read-only replica.
            TimeoutError: If `timeout` passed. Only for this caller.
            RecursiveCallError: If the call that computes this key asks for it, in this process.
            DeadlockError: If that call waits, in the end, for this caller, in this process.
            TypeError: If the key is of another type and there is no `key_encoder`, or an argument is of a wrong type.
            ValueError: If a number of seconds is negative, infinite or NaN.
            RuntimeError: If the coalescer is closed.
        """
        self._connected()
        fleet_key = self._key(key)
        call = _Made(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            return self._local.get_or_call(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)  # type: ignore[no-any-return]
        except WaitTimeoutError as error:
            raise TimeoutError(*error.args) from None

    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], T | Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]:
        """Return the same as `get_or_call`, with this caller's role in the fleet and what is known of the flight.

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
        call = _Made(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            outcome = self._local.outcome(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)
        except WaitTimeoutError as error:
            raise TimeoutError(*error.args) from None
        return (
            outcome if call.role is None or outcome.role != "leader" else dataclasses.replace(outcome, role=call.role)
        )

    def peek(self, key: Hashable, default: Any = None) -> Any:  # noqa: ANN401 - whatever was retained
        """Return the retained value of a key, here or on the server, or the default. Never calls, never waits.

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
            payload = server.ask(Ask(scripts.PEEK, [self._fleet.names.outcome(fleet_key.digest)], []))
        except BackendTroubleError as trouble:
            _trouble(self._fleet, trouble)
            return default
        return _peeked(self._fleet, payload, default)

    def forget(self, key: Hashable) -> bool:
        """Drop a key in the whole fleet, so that its next caller leads a call of its own.

        Other processes are told by a message: in that moment, each may serve the old outcome once more.

        Args:
            key: As in `get_or_call`.

        Returns:
            Whether the key was retained or in flight, in this process or on the server. False may be wrong if the
            connection to the server was cut meanwhile.

        Raises:
            BackendError: As in `get_or_call`.
        """
        server, fleet_key = self._connected(), self._key(key)
        there = self._local.forget(fleet_key)
        try:
            return bool(server.ask(_forget(self._fleet, fleet_key))) or there
        except BackendTroubleError as trouble:
            _trouble(self._fleet, trouble)
            return there

    def close(self) -> None:
        """End the coalescer's threads and connections; the client stays open. It cannot be used after that."""
        self._closed = True
        connections = self._connections.pop(os.getpid(), None)
        if connections is not None:
            # A thread that is about to make them does so first.
            with connections.lock:
                server = connections.server
            if server is not None:
                server.close()

    def __enter__(self) -> Self:
        """Return the coalescer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class _Made:
    """The call of a process's own leader: a flight of the fleet."""

    def __init__(
        self,
        coalescer: DistributedBatchCoalescer,
        key: FleetKey,
        fn: Callable[[], Any],
        timeout: float | None,
        ttl_seconds: float | None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {shown(fn)}")
        if ttl_seconds == math.inf:
            raise ValueError("ttl_seconds must be finite, since everything on the server has a lifetime, not inf")
        self._coalescer, self._key, self._fn = coalescer, key, fn
        self._timeout, self._ttl_seconds = timeout, ttl_seconds
        self.role: Any = None

    def __call__(self) -> Any:  # noqa: ANN401 - the user's value
        fleet = self._coalescer._fleet  # noqa: SLF001 - this is a part of it
        server = self._coalescer._connected()  # noqa: SLF001
        steps = flight(fleet, self._key, self._ttl_seconds, self._timeout, self._note)
        return server.run(self._key.digest, steps, self._call)

    def _note(self, role: str) -> None:
        self.role = role

    def _call(self) -> Any:  # noqa: ANN401 - as above
        value = self._fn()
        if asyncio.iscoroutine(value):
            value.close()
            raise CallResultError(
                f"fn returned a coroutine, which threads cannot share; use AsyncDistributedBatchCoalescer for "
                f"{shown(self._fn)}"
            )
        return value


class AsyncDistributedBatchCoalescer(_Member):
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

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster,
        ttl_seconds: float = 5.0,
        *,
        error_ttl_seconds: float | Callable[[Any], float | None] | None = None,
        private_errors: type[BaseException] | Iterable[type[BaseException]] = (),
        max_retained: int | None = None,
        on_abandoned: Any = "cancel",  # noqa: ANN401 - checked by the local map
        name: str | None = None,
        namespace: str = "llm_batch_coalesce",
        lease_seconds: float = 10.0,
        serializer: Serializer | None = None,
        key_encoder: Callable[[Any], str | bytes] | None = None,
        on_backend_error: OnBackendError = "call",
        backend_timeout_seconds: float = 1.0,
    ) -> None:
        kinds = (redis.asyncio.Redis, redis.asyncio.RedisCluster)
        copied = is_copied(client)
        wanted = "a redis.asyncio.Redis or redis.asyncio.RedisCluster"
        check_client(client, kinds, wanted, copied=copied, blocks=False)
        fleet = Fleet(
            ttl_seconds=ttl_seconds,
            error_ttl_seconds=error_ttl_seconds,
            private_errors=private_errors,
            name=name,
            namespace=namespace,
            database=database_of(client),
            lease_seconds=lease_seconds,
            serializer=serializer,
            key_encoder=key_encoder,
            on_backend_error=on_backend_error,
            backend_timeout_seconds=backend_timeout_seconds,
        )
        self._fleet = fleet
        self._client = client
        self._local: AsyncBatchCoalescer = AsyncBatchCoalescer(
            ttl_seconds,
            error_ttl_seconds=fleet.local_error_ttl,
            private_errors=(*fleet.private_errors, WaitTimeoutError),
            max_retained=max_retained,
            on_abandoned=on_abandoned,
            name=name,
        )
        self._server: _redis_tasks.Server | None = None
        self._process = os.getpid()
        self._closed = False

    def _connected(self) -> _redis_tasks.Server:
        if self._closed:
            raise RuntimeError(f"{shown(self)} is closed")
        if self._process != os.getpid():
            self._server, self._process = None, os.getpid()
            self._fleet.begin_process()
        if self._server is None:
            self._server = _redis_tasks.Server(self._client, self._fleet, _forgetter(self._local))
            weakref.finalize(self, self._server.stop).atexit = False
        elif self._server.loop is not asyncio.get_running_loop():
            raise RuntimeError(f"{shown(self)} is bound to another event loop, that of its first use")
        return self._server

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
            Exception: As in `DistributedBatchCoalescer.get_or_call`.
            asyncio.CancelledError: If this caller was cancelled.
            RuntimeError: If the coalescer is closed, or bound to another event loop.
        """
        self._connected()
        fleet_key = self._key(key)
        call = _AsyncMade(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            return await self._local.get_or_call(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)
        except WaitTimeoutError as error:
            raise TimeoutError(*error.args) from None

    async def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Awaitable[T | Retain[T]]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]:
        """Return the same as `get_or_call`, with this caller's role in the fleet and what is known of the flight.

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
        except WaitTimeoutError as error:
            raise TimeoutError(*error.args) from None
        return (
            outcome if call.role is None or outcome.role != "leader" else dataclasses.replace(outcome, role=call.role)
        )

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
            payload = await server.ask(Ask(scripts.PEEK, [self._fleet.names.outcome(fleet_key.digest)], []))
        except BackendTroubleError as trouble:
            _trouble(self._fleet, trouble)
            return default
        return _peeked(self._fleet, payload, default)

    async def forget(self, key: Hashable) -> bool:
        """Drop a key in the whole fleet; as in `DistributedBatchCoalescer`.

        Args:
            key: As in `get_or_call`.

        Returns:
            Whether the key was retained or in flight, in this process or on the server. False may be wrong if the
            connection to the server was cut meanwhile.

        Raises:
            BackendError: As in `get_or_call`.
        """
        server, fleet_key = self._connected(), self._key(key)
        there = self._local.forget(fleet_key)
        try:
            return bool(await server.ask(_forget(self._fleet, fleet_key))) or there
        except BackendTroubleError as trouble:
            _trouble(self._fleet, trouble)
            return there

    async def close(self) -> None:
        """End the coalescer's tasks and connections; the client stays open. It cannot be used after that."""
        self._closed = True
        server, self._server = self._server, None
        if server is not None and self._process == os.getpid():
            await server.close()

    async def __aenter__(self) -> Self:
        """Return the coalescer."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()


class _AsyncMade:
    """The call of a process's own leader: a flight of the fleet."""

    def __init__(
        self,
        coalescer: AsyncDistributedBatchCoalescer,
        key: FleetKey,
        fn: Callable[[], Awaitable[Any]],
        timeout: float | None,
        ttl_seconds: float | None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {shown(fn)}")
        if ttl_seconds == math.inf:
            raise ValueError("ttl_seconds must be finite, since everything on the server has a lifetime, not inf")
        self._coalescer, self._key, self._fn = coalescer, key, fn
        self._timeout, self._ttl_seconds = timeout, ttl_seconds
        self.role: Any = None

    async def __call__(self) -> Any:  # noqa: ANN401 - the user's value
        fleet = self._coalescer._fleet  # noqa: SLF001 - this is a part of it
        server = self._coalescer._connected()  # noqa: SLF001
        steps = flight(fleet, self._key, self._ttl_seconds, self._timeout, self._note)
        return await server.run(self._key.digest, steps, self._fn)

    def _note(self, role: str) -> None:
        self.role = role


def _forget(fleet: Fleet, key: FleetKey) -> Ask:
    names, digest = fleet.names, key.digest
    keys = [names.flight(digest), names.outcome(digest)]
    return Ask(scripts.FORGET, keys, [names.forgotten(digest, ""), names.everybody(), digest])


def _trouble(fleet: Fleet, trouble: BackendTroubleError) -> None:
    fleet.note_trouble(trouble)
    if fleet.on_backend_error == "raise":
        raise BackendError(f"the server cannot be used: {trouble}") from trouble


def _peeked(fleet: Fleet, payload: object, default: Any) -> Any:  # noqa: ANN401 - whatever was retained
    if payload is not None:
        with contextlib.suppress(DamagedError):
            landed = unpack(fleet.serializer, payload)
            if landed.error is None:
                return landed.value
    return default

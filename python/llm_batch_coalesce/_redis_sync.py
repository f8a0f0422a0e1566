"""The coalescer of a fleet for threads."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

import redis

from llm_batch_coalesce import _redis_threads
from llm_batch_coalesce._core import Retain
from llm_batch_coalesce._errors import CallResultError
from llm_batch_coalesce._fleet_flight import BackendTroubleError, WaitTimeoutError
from llm_batch_coalesce._fleet_options import OnBackendError
from llm_batch_coalesce._fleet_wire import Serializer
from llm_batch_coalesce._redis_member import Made, Member
from llm_batch_coalesce._reports import Outcome
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._sync import BatchCoalescer

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

T = TypeVar("T")


class _Connections:
    """The server as one process sees it, once that has used it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.server: _redis_threads.Server | None = None


class DistributedBatchCoalescer(Member):
    """Shares one call among all threads of all processes of a fleet that ask for the same key at the same time.

    For `ttl_seconds` after the call completes, later callers are served its outcome, too, wherever they are.
    Threads and tasks (`AsyncDistributedBatchCoalescer`) of different processes share flights.

    Args:
        client: A client of redis-py: `redis.Redis`, also of a Sentinel, or `redis.RedisCluster`. The coalescer makes
            connections of its own to the same server, so the client stays yours. One of a cluster, or with a pool class
            of your own, is used as it is, and needs a `socket_timeout`, two connections and no `decode_responses`.
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

    # Public names read as they are imported.
    __module__ = "llm_batch_coalesce.redis"

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
        super().__init__(
            client,
            (redis.Redis, redis.RedisCluster),
            "a redis.Redis or redis.RedisCluster",
            blocks=True,
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
        self._local: BatchCoalescer = BatchCoalescer(ttl_seconds, **self._local_options(max_retained))
        # By process: the child of a fork has threads and connections of its own, and locks that no thread holds which
        # stayed behind.
        self._connections: dict[int, _Connections] = {self._process: _Connections()}

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
                connections.server = _redis_threads.Server(self._client, self._fleet, self._forgetter())
                weakref.finalize(self, _stop_elsewhere, connections.server).atexit = False
            return connections.server

    @overload
    def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T: ...
    @overload
    def get_or_call(
        self,
        key: Hashable,
        fn: Callable[[], T | Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> T: ...
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
            RecursiveCallError: If the call that computes this key asks for it, with this coalescer and in this process.
            DeadlockError: If that call waits, in the end, for this caller, and nobody in that circle waits for the
                server. What passes through it is not seen, also between two coalescers of one process: give calls
                inside calls a `timeout`.
            TypeError: If the key is of another type and there is no `key_encoder`, or an argument is of a wrong type.
            ValueError: If a number of seconds is negative, infinite or NaN.
            RuntimeError: If the coalescer is closed.
        """
        self._connected()
        fleet_key = self._key(key)
        call = _Made(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            return self._local.get_or_call(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)  # type: ignore[no-any-return]
        except WaitTimeoutError:
            raise call.timeout_error() from None

    @overload
    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]: ...
    @overload
    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], T | Retain[T]],
        *,
        timeout: float | None = None,
        ttl_seconds: float | None = None,
    ) -> Outcome[T]: ...
    def outcome(
        self,
        key: Hashable,
        fn: Callable[[], T | Retain[T]],
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
        call = _Made(self, fleet_key, fn, timeout, ttl_seconds)
        try:
            outcome = self._local.outcome(fleet_key, call, timeout=timeout, ttl_seconds=ttl_seconds)
        except WaitTimeoutError:
            raise call.timeout_error() from None
        return call.in_fleet(outcome)

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
            payload = server.ask(self._peek(fleet_key))
        except BackendTroubleError as trouble:
            self._trouble(trouble)
            return default
        return self._peeked(payload, default)

    def forget(self, key: Hashable) -> bool:
        """Drop a key in the whole fleet, so that its next caller leads a call of its own.

        Other processes are told by a message: in that moment, each may serve the old outcome once more. While the
        server cannot be used, only this process forgets.

        Args:
            key: As in `get_or_call`.

        Returns:
            Whether the key was retained or in flight, in this process or on the server; if the server cannot be used,
            in this process. False may be wrong if the connection to the server was cut meanwhile.

        Raises:
            BackendError: As in `get_or_call`; this process has forgotten the key all the same.
        """
        server, fleet_key = self._connected(), self._key(key)
        there = self._local.forget(fleet_key)
        try:
            return bool(server.ask(self._forget(fleet_key))) or there
        except BackendTroubleError as trouble:
            self._trouble(trouble)
            return there

    def close(self) -> None:
        """End the coalescer's threads and connections; the client stays open. It cannot be used after that.

        A call under way still shares its outcome, but its lease is no longer renewed: if it takes longer than that,
        another process makes a call of its own.
        """
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


def _stop_elsewhere(server: _redis_threads.Server) -> None:
    # A collection may come anywhere, also where the server's own threads hold the locks that this needs.
    with contextlib.suppress(RuntimeError):
        _thread.start_new_thread(server.stop, ())


class _Made(Made):
    _member: DistributedBatchCoalescer

    def __call__(self) -> Any:  # noqa: ANN401 - the user's value
        server = self._member._connected()  # noqa: SLF001 - this is a part of it
        return server.run(self._key.digest, self._steps(), self._call)

    def _call(self) -> Any:  # noqa: ANN401 - as above
        value = self._fn()
        if asyncio.iscoroutine(value):
            value.close()
            raise CallResultError(
                f"fn returned a coroutine, which threads cannot share; use AsyncDistributedBatchCoalescer for "
                f"{shown(self._fn)}"
            )
        return value

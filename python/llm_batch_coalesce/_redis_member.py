"""What the coalescers of a fleet for threads and for tasks have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, cast

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._decorator import coalesced
from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._fleet_flight import Ask, BackendTroubleError, WaitTimeoutError, flight
from llm_batch_coalesce._fleet_keys import FleetKey, fleet_key
from llm_batch_coalesce._fleet_options import Fleet, FleetStats
from llm_batch_coalesce._fleet_wire import DamagedError, unpack
from llm_batch_coalesce._redis_clients import check_client, database_of, is_copied
from llm_batch_coalesce._reports import FlightInfo, Outcome
from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable

    from llm_batch_coalesce._async import AsyncBatchCoalescer
    from llm_batch_coalesce._decorator import FleetDecorator
    from llm_batch_coalesce._fleet_flight import Step
    from llm_batch_coalesce._sync import BatchCoalescer

T = TypeVar("T")


class Member:
    """What both classes have: options, keys, reports, and what is asked of the server and made of its answers."""

    _fleet: Fleet
    _local: BatchCoalescer | AsyncBatchCoalescer

    def __init__(
        self,
        client: Any,  # noqa: ANN401 - whatever was given
        kinds: tuple[type, ...],
        wanted: str,
        *,
        blocks: bool,
        **options: Any,  # noqa: ANN401 - those of `Fleet`, which checks them
    ) -> None:
        check_client(client, kinds, wanted, copied=is_copied(client), blocks=blocks)
        self._client = client
        self._fleet = Fleet(database=database_of(client), **options)
        self._process = os.getpid()
        self._closed = False

    def _local_options(self, max_retained: int | None) -> dict[str, Any]:
        """Return the options of the process's own map, but for the TTL."""
        fleet = self._fleet
        return {
            "error_ttl_seconds": fleet.local_error_ttl,
            "private_errors": (*fleet.private_errors, WaitTimeoutError),
            "max_retained": max_retained,
            "name": fleet.name,
        }

    def _forgetter(self) -> Callable[[str | None], None]:
        """Make what drops a digest, or everything, from the process's own map, which it does not keep alive."""
        reference = weakref.ref(self._local)

        def forget(digest: str | None) -> None:
            held = reference()
            if held is None:
                return
            if digest is None:
                held.clear()
            else:
                held.forget(FleetKey(digest, digest))

        return forget

    def _key(self, key: Hashable) -> FleetKey:
        return fleet_key(key, self._fleet.key_encoder)

    def _peek(self, key: FleetKey) -> Ask:
        return Ask(scripts.PEEK, [self._fleet.names.outcome(key.digest)], [])

    def _peeked(self, payload: object, default: Any) -> Any:  # noqa: ANN401 - whatever was retained
        if payload is not None:
            with contextlib.suppress(DamagedError):
                landed = unpack(self._fleet.serializer, payload)
                if landed.error is None:
                    return landed.value
        return default

    def _forget(self, key: FleetKey) -> Ask:
        names, digest = self._fleet.names, key.digest
        keys = [names.flight(digest), names.outcome(digest)]
        return Ask(scripts.FORGET, keys, [names.forgotten(digest, ""), names.everybody(), digest])

    def _trouble(self, trouble: BackendTroubleError) -> None:
        """Count trouble with the server, and raise it if it is to be raised."""
        self._fleet.note_trouble(trouble)
        if self._fleet.on_backend_error == "raise":
            raise BackendError(f"the server cannot be used: {trouble}") from trouble

    @property
    def name(self) -> str | None:
        """The name given to the constructor."""
        return self._fleet.name

    def stats(self) -> FleetStats:
        """Return the counters of this process."""
        return self._fleet.stats(self._local.stats())

    def coalesced(self, key: Callable[..., Hashable] | None = None) -> FleetDecorator:
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
        return cast("FleetDecorator", coalesced(self, key))  # type: ignore[arg-type]

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


class Made:
    """The call of a process's own leader: a flight of the fleet."""

    _member: Member

    def __init__(
        self,
        member: Member,
        key: FleetKey,
        fn: Callable[[], Any],
        timeout: float | None,
        ttl_seconds: float | None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {shown(fn)}")
        if ttl_seconds == math.inf:
            raise ValueError("ttl_seconds must be finite, since everything on the server has a lifetime, not inf")
        self._member, self._key, self._fn = member, key, fn
        self._timeout, self._ttl_seconds = timeout, ttl_seconds
        self._began = time.monotonic()
        self._role: Any = None

    def _steps(self) -> Generator[Step, Any, Any]:
        fleet = self._member._fleet  # noqa: SLF001 - this is a part of it
        # Others of this process may have been waited for first.
        until = None if self._timeout is None else self._began + self._timeout
        return flight(fleet, self._key, self._ttl_seconds, until, self._note)

    def _note(self, role: str) -> None:
        self._role = role

    def timeout_error(self) -> TimeoutError:
        """Make what a caller gets of a `WaitTimeoutError`, which the process's own map has to tell from others."""
        return TimeoutError(f"the call of another process was not done within {self._timeout} seconds")

    def in_fleet(self, outcome: Outcome[T]) -> Outcome[T]:
        """Give an outcome the caller's role in the fleet: who leads in this process may have waited for another."""
        if self._role is None or outcome.role != "leader":
            return outcome
        return dataclasses.replace(outcome, role=self._role)

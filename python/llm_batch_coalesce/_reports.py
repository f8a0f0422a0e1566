"""What a coalescer tells of itself: outcomes with their flights, counters, flights under way, and the log."""

import hashlib
import logging
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

logger = logging.getLogger("llm_batch_coalesce")


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What `outcome()` returns: a value, and how this caller came by it.

    Attributes:
        value: What the call returned.
        role: `"leader"` for the caller that ran the callable, `"waiter"` for one that waited for it, `"hit"` for one
            that was served a retained outcome.
        waiters: How many callers joined the flight, those that gave up waiting too, without the leader; a hit tells
            those of its flight.
        duration_seconds: How long the underlying call took, in seconds; 0.0 for what `put()` has primed.
    """

    value: T
    role: Literal["leader", "waiter", "hit"]
    waiters: int
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a coalescer since its start or `reset_stats()`; exact while nobody calls.

    Every request is counted once: in `calls`, `joined`, `hits`, `timeouts` or `cancelled`. Those that were refused (bad
    arguments, recursion, a deadlock) are none.

    Attributes:
        calls: Requests that led: how often a callable was run.
        joined: Requests that got the outcome of a call that they waited for, errors included.
        hits: Requests served from a retained outcome, errors included.
        errors: Calls that failed, with private errors too.
        timeouts: Waiters whose `timeout` passed.
        cancelled: Waiters that were cancelled or interrupted.
        handed_over: Waiters that took over a flight and led; they are among the calls.
        evicted: Outcomes dropped because of `max_retained`.
        in_flight: Flights under way now, forgotten ones too.
        retained: Outcomes retained now.
        store_hits: Requests that were to lead, but were served by the `store`; they are among the hits.
        store_errors: How often the `store` failed.
    """

    calls: int
    joined: int
    hits: int
    errors: int
    timeouts: int
    cancelled: int
    handed_over: int
    evicted: int
    in_flight: int
    retained: int
    store_hits: int = 0
    store_errors: int = 0

    @property
    def saved(self) -> int:
        """Requests that were served without a call of their own."""
        return self.joined + self.hits

    @property
    def saved_ratio(self) -> float:
        """The part of the served requests that needed no call of their own, from 0.0 to 1.0."""
        served = self.calls + self.saved
        return self.saved / served if served else 0.0


@dataclass(frozen=True, slots=True)
class FlightInfo:
    """A flight under way.

    Attributes:
        key: Its key.
        age_seconds: How long its call, or the present attempt at it, has been under way, in seconds.
        waiters: How many callers wait for it, without the leader.
        leader: Name of the thread or task that leads; None while the lead is being handed over.
        is_stream: Whether it is a shared stream; its waiters are the readers besides the one that led.
    """

    key: Hashable
    age_seconds: float
    waiters: int
    leader: str | None
    is_stream: bool = False


def report_over_age(key: Hashable, name: str | None, age_seconds: float) -> None:
    """Log a flight that is over age. Keys may hold prompts, so a digest stands for the content."""
    logger.warning(
        "the call of a key of type %s with digest %s%s has been under way for %.1f seconds; new callers no longer wait",
        type(key).__qualname__,
        digest(key),
        in_coalescer(name),
        age_seconds,
    )


def digest(key: Hashable) -> str:
    """Return 16 hexadecimal digits of the BLAKE2b digest of a key: of a str in UTF-8, of bytes, or of the `repr`."""
    try:
        content = key if isinstance(key, bytes) else (key if isinstance(key, str) else repr(key)).encode()
    except Exception:  # noqa: BLE001 - a broken `__repr__`, or a text that is none
        return "unknown"
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def in_coalescer(name: str | None) -> str:
    """Return where something happened, for messages."""
    return "" if name is None else f" in coalescer {name!r}"

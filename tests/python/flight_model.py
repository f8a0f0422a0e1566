"""What a coalescer has to do, one step at a time and without a thread: the model of the state machine."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Ending:
    """How a call ends: with a value, or with an error."""

    value: Any = None
    error: BaseException | None = None
    private: bool = False
    """Whether only the leader gets the error."""
    retain: float | None = None
    """The TTL that the value brings with it, as a `Retain`."""
    never_retained: bool = False
    """Whether the error is not retained, whatever the options say."""


@dataclass(frozen=True)
class Result:
    """What a caller gets."""

    kind: str
    """Of "value", "original" (of an error), "copy", "timeout", "cancelled", "recursive"."""
    ending: Ending | None = None
    role: str = ""
    waiters: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Request:
    """A caller and its callable."""

    name: str
    key: Any
    loop: int | None = None
    """The event loop on which it asks; None in a thread."""
    finishes: bool = False
    """Whether the call that it leads on a loop goes on when all callers have left."""
    ttl: float | None = None
    prepared: Ending | None = None
    """How its call ends at once; None if it is held until it is told."""
    result: Result | None = None
    flight: "Flight | None" = None
    """That it leads, though it may have left it."""
    led: bool = False
    """Whether its callable has been run."""


@dataclass(eq=False)
class Flight:
    key: Any
    leader: Request
    since: float
    attempt: int
    caller: Request | None = None
    """The leader, as long as it wants the outcome."""
    waiters: list[Request] = field(default_factory=list)
    owned: bool = True
    """Whether its outcome is retained."""
    joined: int = 0


@dataclass(eq=False)
class Retained:
    ending: Ending
    until: float
    waiters: int = 0
    seconds: float = 0.0


class Model:
    def __init__(self, ttl: float, error_ttl: Any = None, max_flight: float = math.inf) -> None:
        self._ttl, self._error_ttl, self._max_flight = ttl, error_ttl, max_flight
        self.now = 0.0
        self.table: dict[Any, Flight | Retained] = {}
        self.flights: list[Flight] = []
        self.counts: Counter[str] = Counter()
        self._attempts = 0

    # What a caller does.

    def ask(self, request: Request, timeout: float | None = None, inside: Request | None = None) -> None:
        """Ask for a key; `inside` leads the flight that the asking callable computes. A timeout passes at once."""
        found = self._find(request.key)
        if isinstance(found, Retained):
            self.counts["hits"] += 1
            role = ("hit", found.waiters, found.seconds)
            request.result = Result("copy" if found.ending.error else "value", found.ending, *role)
        elif found is None or self.now >= found.since + self._max_flight:
            self.forget(request.key)
            flight = Flight(request.key, request, self.now, 0)
            self.table[request.key] = flight
            self.flights.append(flight)
            self._lead(flight, request)
        elif inside is not None and inside.flight is found:
            request.result = Result("recursive")
        else:
            if timeout != 0:
                found.joined += 1
            if timeout is None:
                found.waiters.append(request)
            else:
                self.counts["timeouts"] += 1
                request.result = Result("timeout")
                self._look_after(found)

    def end(self, leader: Request, ending: Ending) -> None:
        """The call that this caller leads ends."""
        flight = leader.flight
        assert flight is not None
        leader.flight = None
        self.counts["errors"] += ending.error is not None
        if flight.caller is not None and ending.error is not None:
            leader.result = Result("original", ending)
        if ending.private:
            self._hand_over(flight)
            return
        seconds = self.now - flight.since
        if flight.caller is not None and ending.error is None:
            leader.result = Result("value", ending, "leader", flight.joined, seconds)
        self.counts["joined"] += len(flight.waiters)
        for waiter in flight.waiters:
            kind = "copy" if ending.error else "value"
            waiter.result = Result(kind, ending, "waiter", flight.joined, seconds)
        ttl = self._ttl_of(leader, ending)
        self._over(flight)
        if flight.owned and ttl > 0:
            self.table[flight.key] = Retained(ending, self.now + ttl, flight.joined, seconds)

    def leave(self, caller: Request) -> None:
        """The task of a caller is cancelled; the call goes on if anybody else wants it."""
        flight = next(flight for flight in self.flights if caller in (flight.caller, *flight.waiters))
        caller.result = Result("cancelled")
        if caller is flight.caller:
            flight.caller = None
        else:
            self._cancel_waiter(flight, caller)
        self._look_after(flight)

    def kill(self, leader: Request) -> None:
        """The task of a call is cancelled, and with it who waits on its loop."""
        flight = leader.flight
        assert flight is not None
        leader.flight = None
        if flight.caller is not None:
            leader.result = Result("cancelled")
        for waiter in [waiter for waiter in flight.waiters if waiter.loop == leader.loop]:
            self._cancel_waiter(flight, waiter)
        self._hand_over(flight)

    # What is done to a key.

    def forget(self, key: Any) -> bool:
        found = self._find(key)
        self.table.pop(key, None)
        if isinstance(found, Flight):
            found.owned = False
        return found is not None

    def cancel(self, key: Any) -> bool:
        flight = self._find(key)
        if not isinstance(flight, Flight):
            return False
        self.forget(key)
        for waiter in list(flight.waiters):
            self._cancel_waiter(flight, waiter)
        self._look_after(flight)
        return True

    def put(self, key: Any, ending: Ending, ttl: float | None) -> None:
        self.forget(key)
        ttl = self._ttl if ttl is None else ttl
        if ttl > 0:
            self.table[key] = Retained(ending, self.now + ttl)

    def peek(self, key: Any) -> Any:
        found = self._find(key)
        return found.ending if isinstance(found, Retained) and found.ending.error is None else None

    def clear(self) -> None:
        for key in list(self.table):
            self.forget(key)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for key in list(self.table):
            self._find(key)

    # What there is to compare.

    def stats(self) -> dict[str, int]:
        names = ("calls", "joined", "hits", "errors", "timeouts", "cancelled", "handed_over", "evicted")
        retained = sum(isinstance(found, Retained) for found in self.table.values())
        return {name: self.counts[name] for name in names} | {"in_flight": len(self.flights), "retained": retained}

    def oldest_first(self) -> list[Flight]:
        return sorted(self.flights, key=lambda flight: flight.attempt)

    def waiters(self, key: Any) -> int:
        found = self.table.get(key)
        return len(found.waiters) if isinstance(found, Flight) else 0

    def _find(self, key: Any) -> Flight | Retained | None:
        found = self.table.get(key)
        if isinstance(found, Retained) and self.now >= found.until:
            del self.table[key]
            return None
        return found

    def _ttl_of(self, leader: Request, ending: Ending) -> float:
        usual = self._ttl if leader.ttl is None else leader.ttl
        if ending.error is None:
            return usual if ending.retain is None else ending.retain
        if ending.never_retained:
            return 0
        if callable(self._error_ttl):
            try:
                answer = self._error_ttl(ending.error)
            except AttributeError:
                return 0
            sensible = answer is None or (isinstance(answer, (int, float)) and answer >= 0)
            return (usual if answer is None else answer) if sensible else 0
        return usual if self._error_ttl is None else self._error_ttl

    def _lead(self, flight: Flight, request: Request) -> None:
        self._attempts += 1
        flight.since, flight.attempt = self.now, self._attempts
        flight.leader = flight.caller = request
        request.flight, request.led = flight, True
        self.counts["calls"] += 1
        if request.prepared is not None:
            self.end(request, request.prepared)

    def _hand_over(self, flight: Flight) -> None:
        if not flight.waiters:
            self._over(flight)
            return
        flight.joined -= 1
        self.counts["handed_over"] += 1
        self._lead(flight, flight.waiters.pop(0))

    def _cancel_waiter(self, flight: Flight, waiter: Request) -> None:
        flight.waiters.remove(waiter)
        waiter.result = Result("cancelled")
        self.counts["cancelled"] += 1

    def _look_after(self, flight: Flight) -> None:
        """Somebody has left: a call on a loop that nobody wants any more is cancelled."""
        leader = flight.leader
        unwanted = flight.caller is None and not flight.waiters
        if unwanted and leader.loop is not None and not leader.finishes:
            leader.flight = None
            self._over(flight)

    def _over(self, flight: Flight) -> None:
        self.flights.remove(flight)
        if self.table.get(flight.key) is flight:
            del self.table[flight.key]

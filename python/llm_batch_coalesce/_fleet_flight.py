"""A flight as a fleet shares it: what a process does for one key, step by step, without doing any of it.

`flight` is a generator. It yields what is to be done (ask the server, wait for a message, run the callable), and is
sent what came of it; a driver for threads and one for tasks do these things. So both speak one protocol.

1. A process claims. It is told the outcome that is retained, that it leads, or which flight is under way and for how
   long the lease of its leader holds.
2. Who leads runs the callable, while its lease is renewed, and completes with the token of its claim. A process that
   was paused past its lease is refused: its own callers have their result, and nobody else.
3. Who waits is told by a message to its process's inbox, with the outcome unless that is long: then it claims again,
   which tells it. Messages may be lost: when the lease as it was told has run out, it claims again without one.
4. If the server cannot be used, the process goes on alone, or raises `BackendError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm_batch_coalesce import _core
from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._core import Retain
from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._fleet_wire import (
    About,
    DamagedError,
    message_of,
    pack_error,
    pack_unserializable,
    pack_value,
    unpack,
)
from llm_batch_coalesce._reports import in_coalescer, logger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from llm_batch_coalesce._fleet_keys import FleetKey
    from llm_batch_coalesce._fleet_options import Fleet
    from llm_batch_coalesce._fleet_wire import Landed


# An outcome of up to so many bytes comes with the message, which saves a round trip; a larger one is read once.
_IN_A_MESSAGE = 16_384
# What ends a caller that waits for the server or for others.
_INTERRUPTS = (asyncio.CancelledError, KeyboardInterrupt, SystemExit)


@dataclass(frozen=True, slots=True)
class Ask:
    """Run a script on the server; the answer is what it returns."""

    script: str
    keys: list[str]
    args: list[str | bytes | int]


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for the next message about the key; the answer is it, or None when so many seconds have passed."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """Run the callable; its value is the answer, and its error is thrown in. The lease is renewed meanwhile."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Doubt:
    """A claim was not answered, and may have got the lead: it is to be given up when the server answers again."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to complete a flight."""

    digest: str
    token: str
    flight: str


Step = Ask | Await | Call | Doubt


class BackendTroubleError(Exception):
    """A driver's word for a server that is down, slow or refuses."""


def flight(
    fleet: Fleet,
    key: FleetKey,
    ttl_seconds: float | None,
    until: float | None,
    note_role: Callable[[str], None],
) -> Generator[Step, Any, Any]:
    """Get the value of a key, as the result of a local call: a `Retain` with what is left of its TTL, or an error.

    Whether this process waited for it or found it on the server is noted. Nobody is waited for after `until`.
    """
    digest = key.digest
    damaged: list[bytes] = []
    awaited: str | None = None
    while True:
        token = secrets.token_hex(12)
        lease = Lease(digest, token, awaited or token)
        asked_at = time.monotonic()
        try:
            claimed = _read_claim((yield _claim(fleet, lease, awaited, damaged)))
        except BackendTroubleError as trouble:
            yield Doubt(lease)
            return (yield from _alone(fleet, trouble))
        except _INTERRUPTS:
            # It may have the lead, or be registered, for all that is known.
            yield from _tell(fleet, _release(fleet, lease, fleet.inbox))
            raise
        if claimed.dropped:
            _report_damage(fleet, DamagedError("a key of another type, or without a lifetime"))
        if claimed.word == "lead":
            return (yield from _lead(fleet, Lease(digest, token, claimed.flight), ttl_seconds))
        if claimed.word == "outcome":
            landed = _unpacked(fleet, claimed.content)
            if landed is None:
                damaged = [claimed.content]
                continue
            # Its time on the server has gone on since it was asked.
            left = claimed.seconds - (time.monotonic() - asked_at)
        else:
            awaited = claimed.flight
            message = yield from _wait(fleet, lease, claimed, until)
            landed = _unpacked(fleet, message.payload) if message is not None and message.payload else None
            if message is None or landed is None:
                continue
            left = landed.ttl_seconds if message.place == "key" else 0.0
        fleet.count("fleet_hits" if awaited is None else "fleet_joined")
        note_role("hit" if awaited is None else "waiter")
        return _given(fleet, landed, max(0.0, left))


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim was answered: an outcome with the seconds left of it, or a flight with those of its lease."""

    word: Literal["lead", "outcome", "wait"]
    content: bytes
    seconds: float
    dropped: int

    @property
    def flight(self) -> str:
        """The name of the flight."""
        return self.content.decode("ascii", "replace")


def _claim(fleet: Fleet, lease: Lease, awaited: str | None, damaged: list[bytes]) -> Ask:
    names, digest = fleet.names, lease.digest
    keys = [names.flight(digest), names.outcome(digest)]
    if awaited is not None:
        keys += [names.late(digest, awaited), names.forgotten(digest, awaited)]
    return Ask(scripts.CLAIM, keys, [lease.token, fleet.lease_ms, fleet.inbox, awaited or "", *damaged])


def _read_claim(answer: Any) -> Claimed:  # noqa: ANN401 - whatever the server says
    try:
        word, content, left, dropped = answer
        claimed = Claimed(word.decode(), content, int(left) / 1000, int(dropped))
    except (AttributeError, TypeError, ValueError) as error:
        raise BackendTroubleError(f"the server answered {answer!r} to a claim") from error
    if claimed.word not in {"lead", "outcome", "wait"} or not isinstance(content, bytes):
        raise BackendTroubleError(f"the server answered {answer!r} to a claim")
    return claimed


def _wait(fleet: Fleet, lease: Lease, claimed: Claimed, until: float | None) -> Generator[Step, Any, Message | None]:
    """Wait for what is said of a flight. None if there is another reason to claim again."""
    end = time.monotonic() + max(0.001, claimed.seconds)
    if until is not None:
        end = min(end, until)
    try:
        message = yield from _message(claimed.flight, end)
    except _INTERRUPTS:
        yield from _tell(fleet, _release(fleet, lease, fleet.inbox, claimed.flight))
        raise
    if message is None and until is not None and time.monotonic() >= until:
        fleet.count("timeouts")
        yield from _tell(fleet, _release(fleet, lease, fleet.inbox, claimed.flight))
        raise WaitTimeoutError
    return message


def _message(awaited: str, end: float) -> Generator[Step, Any, Message | None]:
    while True:
        message: Message | None = yield Await(max(0.0, end - time.monotonic()))
        if message is None or time.monotonic() > end:
            # A process that was paused does not know how old the message is.
            return None
        # What a flight that was forgotten has to say is not for those who came later.
        if message.flight == awaited:
            return message


def _unpacked(fleet: Fleet, payload: bytes) -> Landed | None:
    try:
        return unpack(fleet.serializer, payload)
    except DamagedError as damage:
        _report_damage(fleet, damage)
        return None


def _given(fleet: Fleet, landed: Landed, left_seconds: float) -> Any:  # noqa: ANN401 - the user's value
    """Return or raise an outcome of the fleet, with the TTL that is left of it."""
    if landed.error is None:
        return _core._retain_of_call(landed.value, left_seconds, max(0.0, landed.seconds))  # noqa: SLF001 - a part of it
    fleet.note_ttl(landed.error, left_seconds)
    fleet.count("remote_errors")
    raise landed.error


def _lead(fleet: Fleet, lease: Lease, ttl_seconds: float | None) -> Generator[Step, Any, Any]:
    began = time.monotonic()
    # Whether the server is being told what has become of the call: `_tell` does so whatever comes.
    told = False
    try:
        try:
            value, ttl = _kept(fleet, (yield Call(lease)), ttl_seconds)
        except BaseException as error:
            if isinstance(error, GeneratorExit) or fleet.is_private(error):
                raise
            seconds = fleet.error_ttl(error, ttl_seconds)
            payload = pack_error(error, About(time.monotonic() - began, seconds, fleet.leader))
            told = True
            kept = yield from _complete(fleet, lease, payload, seconds)
            fleet.note_ttl(error, seconds if kept else 0.0)
            raise
        seconds = time.monotonic() - began
        payload, ttl = _packed(fleet, value, seconds, ttl)
        told = True
        kept = yield from _complete(fleet, lease, payload, ttl)
        return _core._retain_of_call(value, ttl if kept else 0.0, seconds)  # noqa: SLF001 - a part of it
    except GeneratorExit:
        raise
    except BaseException:
        if not told:
            yield from _tell(fleet, _release(fleet, lease))
        raise


def _packed(fleet: Fleet, value: Any, elapsed: float, ttl: float) -> tuple[bytes, float]:  # noqa: ANN401 - the user's
    """Return the payload of a value, and for how long it is retained."""
    try:
        return pack_value(fleet.serializer, value, About(elapsed, ttl, fleet.leader)), ttl
    except Exception as reason:  # noqa: BLE001 - it is the serializer's
        logger.warning(
            "a value of type %s%s cannot be shared with other processes: %s",
            type(value).__qualname__,
            in_coalescer(fleet.name),
            message_of(reason),
        )
        return pack_unserializable(value, reason, About(elapsed, 0.0, fleet.leader)), 0.0


def _kept(fleet: Fleet, value: Any, ttl_seconds: float | None) -> tuple[Any, float]:  # noqa: ANN401 - the user's value
    """Take a call's result apart into the value and its TTL."""
    if type(value) is not Retain:
        return value, fleet.ttl_seconds if ttl_seconds is None else ttl_seconds
    if math.isinf(value.ttl_seconds):
        raise ValueError("the ttl_seconds of a Retain must be finite, since everything on the server has a lifetime")
    return value.value, value.ttl_seconds


def _complete(fleet: Fleet, lease: Lease, payload: bytes, ttl_seconds: float) -> Generator[Step, Any, bool]:
    """Share a payload. False if the lease was lost or the key forgotten: then it is not to be retained here, either."""
    names, digest, token, name = fleet.names, lease.digest, lease.token, lease.flight
    keys = [*_flights(fleet, lease), names.outcome(digest), names.late(digest, name)]
    ttl = _milliseconds(ttl_seconds)
    args: list[str | bytes | int] = [token, payload, ttl, fleet.lease_ms, digest, name, _IN_A_MESSAGE]
    answer = yield from _tell(fleet, Ask(scripts.COMPLETE, keys, args))
    if answer == 0:
        fleet.count("leases_lost")
        logger.warning("a call%s outlived its lease: its result is for its own callers only", in_coalescer(fleet.name))
    # If the server could not be told, this process keeps what it has.
    return answer in (None, 1)


def _release(fleet: Fleet, lease: Lease, inbox: str = "", awaited: str = "") -> Ask:
    """Give up the lead, and the wait of an inbox, for a flight of that name only if one is given."""
    return Ask(scripts.RELEASE, _flights(fleet, lease), [lease.token, fleet.lease_ms, lease.digest, inbox, awaited])


def settlement(fleet: Fleet, doubt: Doubt, *, waits: bool) -> Ask:
    """Give up what a claim may have got; not the wait if others of this process wait, too."""
    return _release(fleet, doubt.lease, "" if waits else fleet.inbox)


def renewal(fleet: Fleet, lease: Lease) -> Ask:
    """Make the lease last."""
    return Ask(scripts.RENEW, _flights(fleet, lease), [lease.token, fleet.lease_ms])


def _flights(fleet: Fleet, lease: Lease) -> list[str]:
    return [fleet.names.flight(lease.digest), fleet.names.forgotten(lease.digest, lease.flight)]


def _tell(fleet: Fleet, ask: Ask) -> Generator[Step, Any, Any]:
    """Tell the server something that the caller does not depend on."""
    try:
        return (yield ask)
    except BackendTroubleError as trouble:
        fleet.note_trouble(trouble)
    except RuntimeError as error:
        # Closed meanwhile: the caller has its result all the same, and others wait for the lease to run out.
        logger.debug("the server%s was not told: %s", in_coalescer(fleet.name), error)
    except _INTERRUPTS:
        # Or others would wait for the lease to run out. To be told twice does no harm.
        with contextlib.suppress(BackendTroubleError, RuntimeError):
            yield ask
        raise
    return None


def _alone(fleet: Fleet, trouble: BackendTroubleError) -> Generator[Step, Any, Any]:
    """Go on without the server."""
    fleet.note_trouble(trouble)
    if fleet.on_backend_error == "raise":
        raise BackendError(f"the server cannot be used: {trouble}") from trouble
    return (yield Call(Lease("", "", "")))


def _report_damage(fleet: Fleet, damage: DamagedError) -> None:
    fleet.count("damaged")
    logger.warning("an outcome on the server%s is damaged and will be replaced: %s", in_coalescer(fleet.name), damage)


def _milliseconds(seconds: float) -> int:
    return 0 if seconds <= 0 else max(1, min(round(seconds * 1000), 2**53))


class WaitTimeoutError(TimeoutError):
    """The timeout of the caller that waits for another process on behalf of its own: private to it."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message about a flight."""

    word: Literal["done", "free"]
    flight: str
    place: str
    payload: bytes


def parse_message(content: object) -> tuple[str, Message | None] | None:
    """Read a message: its digest, and the message itself, or None for a key to forget. None if it is none of ours."""
    if not isinstance(content, bytes):
        return None
    word, *rest = content.split(b" ", 4)
    parts = [part.decode("ascii", "replace") for part in rest[:3]]
    if word == b"forget" and len(rest) == 1:
        return parts[0], None
    if word == b"done" and len(rest) == 4:  # noqa: PLR2004
        return parts[0], Message("done", parts[1], parts[2], rest[3])
    if word == b"free" and len(rest) == 2:  # noqa: PLR2004
        return parts[0], Message("free", parts[1], "", b"")
    return None

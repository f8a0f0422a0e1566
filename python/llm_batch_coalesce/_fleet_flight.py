"""A flight as a fleet shares it: what a process does for one key, step by step, without doing any of it.

`flight` is a generator. It yields what is to be done (ask the server, wait for a message, run the callable), and is sent what
came of it; a driver for threads and one for tasks do these things. So both speak one protocol.

1. A process claims. It is told the outcome that is retained, that it leads, or who leads and for how long the lease holds.
2. Who leads runs the callable, while its lease is renewed, and completes with the token of its claim. A process that was
   paused past its lease is refused: its own callers have their result, and nobody else.
3. Who waits is told by a message to its process's inbox, and reads the outcome. Messages may be lost: when the lease as
   it was told has run out, it claims again, which tells the same.
4. If the server cannot be used, the process goes on alone, or raises `BackendError`.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._core import Retain
from llm_batch_coalesce._errors import BackendError, RemoteCallError, SerializationError
from llm_batch_coalesce._fleet_wire import About, DamagedError, pack_error, pack_unserializable, pack_value, unpack
from llm_batch_coalesce._reports import in_coalescer, logger

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from llm_batch_coalesce._fleet_keys import FleetKey
    from llm_batch_coalesce._fleet_options import Fleet
    from llm_batch_coalesce._fleet_wire import Landed


# An outcome of up to so many bytes comes with the message, which saves a round trip; a larger one is read once.
_IN_A_MESSAGE = 16_384


@dataclass(frozen=True, slots=True)
class Ask:
    """Run a script on the server; the answer is what it returns."""

    script: str
    keys: list[str]
    args: list[str | bytes | int]


@dataclass(frozen=True, slots=True)
class Read:
    """Read a string from the server; the answer is bytes or None."""

    key: str


@dataclass(frozen=True, slots=True)
class Watch:
    """Collect messages about a digest from now on."""

    digest: str


@dataclass(frozen=True, slots=True)
class Await:
    """Wait for the next message about a digest; the answer is it, or None when so many seconds have passed."""

    digest: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """Run the callable; its value is the answer, and its error is thrown in. The lease is renewed meanwhile."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to complete a flight."""

    digest: str
    token: str
    flight: str


Step = Ask | Read | Watch | Await | Call


class BackendTroubleError(Exception):
    """A driver's word for a server that is down, slow or refuses."""


def flight(
    fleet: Fleet,
    key: FleetKey,
    ttl_seconds: float | None,
    timeout: float | None,
    note_role: Callable[[str], None],
) -> Generator[Step, Any, Any]:
    """Get the value of a key, as the result of a local call: a `Retain` with what is left of its TTL, or an error.

    Whether this process waited for it or found it on the server is noted.
    """
    names, digest = fleet.names, key.digest
    until = None if timeout is None else time.monotonic() + timeout
    damaged: list[bytes] = []
    awaited: str | None = None
    joined = False
    yield Watch(digest)
    while True:
        token = secrets.token_hex(12)
        late = [] if awaited is None else [names.late(digest, awaited)]
        keys = [names.flight(digest), names.outcome(digest), *late]
        try:
            answer = yield Ask(scripts.CLAIM, keys, [token, fleet.lease_ms, fleet.inbox, *damaged])
            word, *rest = _checked(answer)
        except BackendTroubleError as trouble:
            return (yield from _alone(fleet, trouble))
        if word == "lead":
            return (yield from _lead(fleet, Lease(digest, token, rest[0].decode()), ttl_seconds))
        if word == "outcome":
            try:
                landed = unpack(fleet.serializer, rest[0])
            except DamagedError as damage:
                _report_damage(fleet, damage)
                damaged = [rest[0]]
                continue
            fleet.count("fleet_joined" if joined else "fleet_hits")
            note_role("waiter" if joined else "hit")
            return _given(fleet, landed, rest[1] / 1000)
        joined = True
        awaited = rest[0].decode()
        lapse = time.monotonic() + rest[1] / 1000
        message = yield from _message(fleet, digest, lapse, until, timeout)
        # What a flight that was forgotten has to say is not for those who came later.
        while message is not None and message.flight != awaited:
            message = yield from _message(fleet, digest, lapse, until, timeout)
        if message is not None and message.word == "done":
            landed_now = yield from _read(fleet, key, message)
            if landed_now is not None:
                fleet.count("fleet_joined")
                note_role("waiter")
                left = landed_now.ttl_seconds if message.place == "key" else 0.0
                return _given(fleet, landed_now, left)


def _checked(answer: Any) -> tuple[Any, ...]:  # noqa: ANN401 - whatever the server says
    try:
        word = answer[0].decode()
        if word == "lead":
            return (word, answer[1])
        if word in {"outcome", "wait"}:
            return (word, answer[1], int(answer[2]))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise BackendTroubleError(f"the server answered {answer!r} to a claim") from error
    raise BackendTroubleError(f"the server answered {answer!r} to a claim")


def _message(
    fleet: Fleet, digest: str, lapse: float, until: float | None, timeout: float | None
) -> Generator[Step, Any, Message | None]:
    end = lapse if until is None else min(lapse, until)
    message = yield Await(digest, max(0.001, end - time.monotonic()))
    if message is None and until is not None and time.monotonic() >= until:
        fleet.count("timeouts")
        raise WaitTimeoutError(f"the call of another process was not done within {timeout} seconds")
    return message  # type: ignore[no-any-return]


def _read(fleet: Fleet, key: FleetKey, message: Message) -> Generator[Step, Any, Landed | None]:
    """Read what a message tells of. None if it is gone, or damaged: claim again."""
    names, digest = fleet.names, key.digest
    place = names.outcome(digest) if message.place == "key" else names.late(digest, message.flight)
    payload: bytes | None = message.payload
    if not payload:
        try:
            payload = yield Read(place)
        except BackendTroubleError:
            return None
    if payload is None:
        return None
    try:
        return unpack(fleet.serializer, payload)
    except DamagedError as damage:
        _report_damage(fleet, damage)
        return None


def _given(fleet: Fleet, landed: Landed, left_seconds: float) -> Any:  # noqa: ANN401 - the user's value
    """Return or raise an outcome of the fleet, with the TTL that is left of it."""
    if landed.error is None:
        return Retain(landed.value, left_seconds)
    error = landed.error
    fleet.set_ttl(error, left_seconds)
    fleet.count("remote_errors")
    raise error


def _lead(fleet: Fleet, lease: Lease, ttl_seconds: float | None) -> Generator[Step, Any, Any]:
    began = time.monotonic()
    try:
        value = yield Call(lease)
    except GeneratorExit:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) or isinstance(error, fleet.private_errors):
            yield from _tell(fleet, _release(fleet, lease))
            raise
        seconds = fleet.error_ttl(error, ttl_seconds)
        payload = pack_error(error, About(time.monotonic() - began, seconds, fleet.leader))
        yield from _complete(fleet, lease, payload, seconds)
        raise
    ttl = fleet.ttl_seconds if ttl_seconds is None else ttl_seconds
    if type(value) is Retain:
        value, ttl = value.value, value.ttl_seconds
    elapsed = time.monotonic() - began
    try:
        payload = pack_value(fleet.serializer, value, About(elapsed, ttl, fleet.leader))
    except Exception as reason:  # noqa: BLE001 - it is the serializer's
        logger.warning(
            "a value of type %s%s cannot be shared with other processes: %s",
            type(value).__qualname__,
            in_coalescer(fleet.name),
            reason,
        )
        ttl = 0.0
        payload = pack_unserializable(value, reason, About(elapsed, ttl, fleet.leader))
    kept = yield from _complete(fleet, lease, payload, ttl)
    return Retain(value, ttl if kept else 0.0)


def _complete(fleet: Fleet, lease: Lease, payload: bytes, ttl_seconds: float) -> Generator[Step, Any, bool]:
    """Share a payload. False if the lease was lost, so that it is not to be retained here, either."""
    names, digest, token = fleet.names, lease.digest, lease.token
    late = names.late(digest, lease.flight)
    keys = [names.flight(digest), names.forgotten(digest, token), names.outcome(digest), late]
    ttl = _milliseconds(ttl_seconds)
    args: list[str | bytes | int] = [token, payload, ttl, fleet.lease_ms, digest, lease.flight, _IN_A_MESSAGE]
    answer = yield from _tell(fleet, Ask(scripts.COMPLETE, keys, args))
    if answer == 0:
        fleet.count("leases_lost")
        logger.warning("a call%s outlived its lease: its result is for its own callers only", in_coalescer(fleet.name))
    # If the server could not be told, this process keeps what it has.
    return bool(answer != 0)


def _release(fleet: Fleet, lease: Lease) -> Ask:
    names, digest, token = fleet.names, lease.digest, lease.token
    return Ask(
        scripts.RELEASE,
        [names.flight(digest), names.forgotten(digest, token)],
        [token, fleet.lease_ms, digest, lease.flight],
    )


def _tell(fleet: Fleet, ask: Ask) -> Generator[Step, Any, Any]:
    """Tell the server something that the caller does not depend on."""
    try:
        return (yield ask)
    except BackendTroubleError as trouble:
        fleet.note_trouble(trouble)
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


SHARED_ERRORS = (RemoteCallError, SerializationError)

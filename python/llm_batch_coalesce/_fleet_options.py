"""What the members of a fleet have in common: options, names on the server, counters."""

from __future__ import annotations

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm_batch_coalesce import _core
from llm_batch_coalesce._errors import BackendError, CallResultError, MissingKeysError
from llm_batch_coalesce._fleet_wire import JsonSerializer
from llm_batch_coalesce._reports import Stats, in_coalescer, logger
from llm_batch_coalesce._sharing import PRIVATE
from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from llm_batch_coalesce._fleet_wire import Serializer

OnBackendError = Literal["call", "raise"]
# Trouble with the server is logged at most so often, in seconds.
_LOG_EVERY = 60.0


_REPORTED = ("fleet_hits", "fleet_joined", "backend_errors", "leases_lost", "damaged")


@dataclass(frozen=True, slots=True)
class FleetStats(Stats):
    """Counters of this process, as in `Stats`; a flight that another process led is none of its `calls`.

    Attributes:
        fleet_hits: Requests served from an outcome that was retained on the server; they are among the hits.
        fleet_joined: Requests that waited for the call of another process; they are among the joined.
        backend_errors: How often the server could not be used.
        leases_lost: Calls of this process that outlived their lease, so that their results were refused.
        damaged: Outcomes on the server that could not be read.
    """

    fleet_hits: int = 0
    fleet_joined: int = 0
    backend_errors: int = 0
    leases_lost: int = 0
    damaged: int = 0


class Names:
    """Names of keys and channels. Pub/sub knows no databases, so channels carry theirs."""

    def __init__(self, namespace: str, database: int) -> None:
        self._keys = namespace
        self._channels = f"{namespace}:{database}"

    def flight(self, digest: str) -> str:
        """Name the flight of a key."""
        return f"{self._keys}:{{{digest}}}:flight"

    def outcome(self, digest: str) -> str:
        """Name the outcome that is retained for a key."""
        return f"{self._keys}:{{{digest}}}:outcome"

    def late(self, digest: str, token: str) -> str:
        """Name the outcome of one flight, for those that have waited for it."""
        return f"{self._keys}:{{{digest}}}:outcome:{token}"

    def forgotten(self, digest: str, token: str) -> str:
        """Name a flight that was forgotten while under way."""
        return f"{self._keys}:{{{digest}}}:flight:{token}"

    def inbox(self, member: str) -> str:
        """Name the channel of one process."""
        return f"{self._channels}:inbox:{member}"

    def everybody(self) -> str:
        """Name the channel of all processes."""
        return f"{self._channels}:all"


class Fleet:
    """The options of one coalescer, checked, and its counters."""

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        *,
        ttl_seconds: float,
        error_ttl_seconds: float | Callable[[Any], float | None] | None,
        private_errors: type[BaseException] | Iterable[type[BaseException]],
        name: str | None,
        namespace: str,
        database: int,
        lease_seconds: float,
        serializer: Serializer | None,
        key_encoder: Callable[[Any], str | bytes] | None,
        on_backend_error: OnBackendError,
        backend_timeout_seconds: float,
    ) -> None:
        self.ttl_seconds = _finite("ttl_seconds", ttl_seconds)
        if error_ttl_seconds is not None and not callable(error_ttl_seconds):
            _finite("error_ttl_seconds", error_ttl_seconds)
        self._error_ttl = error_ttl_seconds
        self.private_errors = _classes(private_errors)
        self.name = name
        if not isinstance(namespace, str) or not namespace or set(namespace) & set("{} \r\n"):
            raise ValueError(f"namespace must be a str without braces, blanks and line ends, not {shown(namespace)}")
        self.names = Names(namespace, database)
        lease = _finite("lease_seconds", lease_seconds)
        if lease < 0.1:  # noqa: PLR2004 - three renewals in it, each a round trip
            raise ValueError(f"lease_seconds must be 0.1 or more seconds, not {shown(lease_seconds)}")
        self.lease_seconds = lease
        self.lease_ms = round(lease * 1000)
        self.serializer = JsonSerializer() if serializer is None else serializer
        for part in ("dumps", "loads"):
            if not callable(getattr(self.serializer, part, None)):
                raise TypeError(f"serializer must have dumps() and loads(), not {shown(serializer)}")
        if key_encoder is not None and not callable(key_encoder):
            raise TypeError(f"key_encoder must be callable, not {shown(key_encoder)}")
        self.key_encoder = key_encoder
        if on_backend_error not in ("call", "raise"):
            raise ValueError(f"on_backend_error must be 'call' or 'raise', not {shown(on_backend_error)}")
        self.on_backend_error = on_backend_error
        self.backend_timeout = _finite("backend_timeout_seconds", backend_timeout_seconds)
        if self.backend_timeout == 0:
            raise ValueError("backend_timeout_seconds must be more than 0 seconds, not 0")
        self._logged_at = -math.inf
        self.begin_process()

    def begin_process(self) -> None:
        """Take a name of this process's own; called again in the child of a fork."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._counts = dict.fromkeys((*_REPORTED, "remote_errors", "timeouts"), 0)
        # By id; the errors are held, so that no other gets the id.
        self._ttls: dict[int, tuple[BaseException, float]] = {}
        self.leader = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self.inbox = self.names.inbox(secrets.token_hex(8))

    def count(self, counter: str) -> None:
        """Count one."""
        with self._lock:
            self._counts[counter] += 1

    def stats(self, local: Stats) -> FleetStats:
        """Return the counters, with those of the process's own map."""
        if self._process != os.getpid():
            self.begin_process()
        with self._lock:
            counts = dict(self._counts)
        fields = {name: getattr(local, name) for name in Stats.__dataclass_fields__}
        # The process's own map takes what came from elsewhere for calls.
        elsewhere = counts["fleet_hits"] + counts["fleet_joined"] + counts["timeouts"]
        # Some may have been under way at a `reset_stats`.
        fields["calls"] = max(0, fields["calls"] - elsewhere)
        fields["errors"] = max(0, fields["errors"] - counts["remote_errors"] - counts["timeouts"])
        fields["hits"] += counts["fleet_hits"]
        fields["joined"] += counts["fleet_joined"]
        fields["timeouts"] += counts["timeouts"]
        return FleetStats(**fields, **{name: counts[name] for name in _REPORTED})

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            self._counts = dict.fromkeys(self._counts, 0)

    def note_trouble(self, trouble: Exception) -> None:
        """Count, and now and then log, a server that cannot be used."""
        self.count("backend_errors")
        now = time.monotonic()
        with self._lock:
            due = now - self._logged_at >= _LOG_EVERY
            if due:
                self._logged_at = now
        if due:
            logger.warning(
                "the server%s cannot be used, and this process %s: %s",
                in_coalescer(self.name),
                "goes on alone" if self.on_backend_error == "call" else "raises BackendError",
                trouble,
            )

    def error_ttl(self, error: BaseException, ttl_seconds: float | None) -> float:
        """Tell how long an error of this process is retained on the server, in seconds."""
        if isinstance(error, CallResultError | MissingKeysError):
            return 0.0
        seconds: Any = self._error_ttl
        if callable(seconds):
            try:
                seconds = seconds(error)
                if seconds is not None:
                    _finite("its answer", seconds)
            except Exception:  # noqa: BLE001 - it is the user's
                failed = type(error).__qualname__
                logger.exception(
                    "error_ttl_seconds failed for %s%s, which is not retained", failed, in_coalescer(self.name)
                )
                return 0.0
        if seconds is None:
            seconds = self.ttl_seconds if ttl_seconds is None else ttl_seconds
        return float(seconds)

    def is_private(self, error: BaseException) -> bool:
        """Tell whether an error concerns its caller only, as for the process's own map."""
        return not isinstance(error, Exception) or isinstance(error, (*PRIVATE, *self.private_errors))

    def note_ttl(self, error: BaseException, seconds: float) -> None:
        """Tell the process's own map how long it is to retain an error that it is about to get."""
        if not self.is_private(error) and not isinstance(error, CallResultError | MissingKeysError):
            with self._lock:
                self._ttls[id(error)] = (error, seconds)

    def local_error_ttl(self, error: BaseException) -> float | None:
        """Tell how long the process's own map retains an error."""
        with self._lock:
            _, noted = self._ttls.pop(id(error), (None, None))
        if noted is not None:
            return noted
        if isinstance(error, BackendError):
            return 0.0
        return self._error_ttl(error) if callable(self._error_ttl) else self._error_ttl


def _classes(private_errors: Any) -> tuple[type[BaseException], ...]:  # noqa: ANN401 - anything
    given = (private_errors,) if isinstance(private_errors, type) else private_errors
    classes = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (None,)
    if not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
        raise TypeError(f"private_errors must be classes of exceptions, not {shown(private_errors)}")
    return classes


def _finite(name: str, seconds: float) -> float:
    number = _core._check_seconds(name, seconds)  # noqa: SLF001 - this is a part of it
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, since everything on the server has a lifetime, not {shown(seconds)}")
    return number

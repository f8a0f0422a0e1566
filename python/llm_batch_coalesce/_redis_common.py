"""What the drivers for threads and for tasks have in common: what is asked of servers and subscriptions."""

from __future__ import annotations

import hashlib
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import redis.exceptions as errors

from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._fleet_flight import BackendTroubleError
from llm_batch_coalesce._fleet_scripts import COMPLETE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llm_batch_coalesce._fleet_flight import Ask

# What is tested: what the scripts need has been there for longer.
_OLDEST = {"redis": (6, 2), "valkey": (7, 2)}
# A client that is wrong, and not only unlucky: told at the first contact, whatever is to be done about trouble later.
_WRONG = (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError, errors.ReadOnlyError)
# What servers say, old ones and new ones, if it is a script that may not do something.
_DENIED = ("ACL failure in script", "The user executing the script can't")
# An error of clusters is none of the client library's own. EOFError: what the event loop's streams say.
TROUBLE = (errors.RedisError, errors.RedisClusterException, OSError, EOFError)
# How long a subscriber waits for a message before it looks whether it is still wanted, in seconds.
LOOK = 1.0
# How long nothing has to come before the subscriber asks whether its connection still lives, in seconds.
PING_EVERY = 5.0
# How long it waits between attempts to subscribe, in seconds, unless somebody needs it.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0


@cache
def sha_of(script: str) -> str:
    """Return what `EVALSHA` calls a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def packed(words: tuple[str | bytes | int, ...]) -> bytes:
    """Return a command as it is sent (https://redis.io/docs/latest/develop/reference/protocol-spec/).

    The client's own packer takes three times as long, which is a tenth of a round trip.
    """
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        content = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(content), content))
    return b"".join(parts)


def check_server(info: Any) -> None:  # noqa: ANN401 - what INFO says
    """Refuse a server that cannot do.

    Raises:
        BackendError: If it is too old, or a read-only replica.
    """
    if not isinstance(info, dict):
        return
    if "redis_version" in info:
        _check_version(info)
        if info.get("role") == "slave" and str(info.get("slave_read_only", "1")) == "1":
            raise BackendError("the server is a read-only replica; the client must lead to a primary")
        return
    # A cluster's answer may be one for each node, and some of those may well be replicas.
    for node in info.values():
        if isinstance(node, dict) and "redis_version" in node:
            _check_version(node)


def _check_version(info: dict[str, Any]) -> None:
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version", info["redis_version"]))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        raise BackendError(f"the server is {kind} {version}; {oldest} or newer is needed")


def described(error: BaseException) -> str:
    """Return one line about an error of the client library."""
    return f"{type(error).__qualname__}: {error}" if str(error) else type(error).__qualname__


def told(error: BaseException, *, first: bool) -> BackendError | BackendTroubleError:
    """Say what an error of the client library is: at the first contact the client may be wrong, later it is trouble."""
    wrong = (
        isinstance(error, _WRONG) or isinstance(error.__cause__, _WRONG) or any(part in str(error) for part in _DENIED)
    )
    if first and wrong:
        return BackendError(f"the server refuses the client: {described(error)}")
    return BackendTroubleError(described(error))


def was_cut(error: BaseException | None) -> bool:
    """Tell whether a connection was cut, perhaps long ago, so that another one may do."""
    if isinstance(error, errors.ConnectionError):
        refused = (errors.AuthenticationError, errors.BusyLoadingError, errors.MaxConnectionsError)
        return not isinstance(error, refused)
    # A transport of asyncio's that is closed may raise one of the last two: https://github.com/python/cpython/issues/136234
    return isinstance(error, ConnectionError | EOFError | AttributeError | TypeError)


def was_demoted(error: BaseException) -> bool:
    """Tell whether the server has become a replica, so that its name may lead to another one now."""
    return "READONLY" in str(error) or isinstance(error, errors.ReadOnlyError)


def second_answer(step: Ask, answer: Any) -> Any:  # noqa: ANN401 - what a script returns
    """Make sense of the answer to a script that may have been run before, unheard. None if it cannot be known."""
    return None if step.script is COMPLETE and answer == 0 else answer


class Subscription:
    """What is known of one subscription: whether it is confirmed, and whether its connection may have died silently."""

    def __init__(self, channels: Iterable[str], timeout: float) -> None:
        self.channels = tuple(channels)
        self._missing = self._all = frozenset(channel.encode() for channel in self.channels)
        self._timeout = timeout
        self._heard_at = self._asked_at = time.monotonic()
        # Something is to come: the confirmation, or the answer to a PING.
        self._asked = True

    def take(self, message: dict[str, Any]) -> bool:
        """Note a message. True if it completes the subscription: for the first time, or again after a reconnect."""
        self._heard_at = time.monotonic()
        if message["type"] != "subscribe":
            # Data may come before the second channel is confirmed.
            self._asked = self._asked and bool(self._missing)
            return False
        channel = message["channel"]
        if channel not in self._missing:
            # The client has reconnected by itself.
            self._missing = self._all
        self._missing -= {channel}
        self._asked = bool(self._missing)
        return not self._missing

    def must_ping(self) -> bool:
        """Tell, when nothing has come for a while, whether to ask for something.

        Raises:
            redis.ConnectionError: If that was done, and nothing has come in time.
        """
        now = time.monotonic()
        if self._asked:
            if now - self._asked_at >= self._timeout:
                raise errors.ConnectionError("nothing comes any more from the inbox's connection")
            return False
        if now - self._heard_at < PING_EVERY:
            return False
        self._asked, self._asked_at = True, now
        return True

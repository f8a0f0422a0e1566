"""What the drivers for threads and for tasks have in common: the scripts' digests, and what is asked of a server."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import redis.exceptions as errors

from llm_batch_coalesce._errors import BackendError
from llm_batch_coalesce._shown import shown

# What the scripts need: `PTTL`, `HSET` with several fields and `EVALSHA` have been there for long; older ones get no tests.
_OLDEST = {"redis": (6, 2), "valkey": (7, 2)}
# A client that is wrong, and not only unlucky: told at the first contact, whatever is to be done about trouble later.
WRONG = (errors.AuthenticationError, errors.AuthorizationError, errors.NoPermissionError, errors.ReadOnlyError)
TROUBLE = (errors.RedisError, OSError)


@cache
def sha_of(script: str) -> str:
    """Return what `EVALSHA` calls a script."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def check_server(info: Any) -> None:  # noqa: ANN401 - what INFO says
    """Refuse a server that cannot do.

    Raises:
        BackendError: If it is too old, or a read-only replica.
    """
    if not isinstance(info, dict) or "redis_version" not in info:
        # A cluster's answer is one for each node.
        nodes = [node for node in (info.values() if isinstance(info, dict) else []) if isinstance(node, dict)]
        for node in nodes:
            check_server(node)
        return
    kind = "valkey" if "valkey_version" in info else "redis"
    version = str(info.get("valkey_version", info["redis_version"]))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST[kind]:
        oldest = ".".join(map(str, _OLDEST[kind]))
        raise BackendError(f"the server is {kind} {version}; {oldest} or newer is needed")
    if info.get("role") == "slave" and str(info.get("slave_read_only", "1")) == "1":
        raise BackendError("the server is a read-only replica; the client must lead to a primary")


def database_of(client: Any) -> int:  # noqa: ANN401 - a client of redis-py, of whatever kind
    """Return the number of the client's database; a cluster has one."""
    pool = getattr(client, "connection_pool", None)
    return int(getattr(pool, "connection_kwargs", {}).get("db") or 0)


def check_client(client: Any, kinds: tuple[type, ...], wanted: str) -> None:  # noqa: ANN401 - anything
    """Refuse what is no client of the kind that is needed.

    Raises:
        TypeError: If it is none, or decodes what it reads.
    """
    if not isinstance(client, kinds):
        raise TypeError(f"client must be {wanted}, not {shown(client)}")


def described(error: BaseException) -> str:
    """Return one line about an error of the client library."""
    return f"{type(error).__qualname__}: {error}" if str(error) else type(error).__qualname__

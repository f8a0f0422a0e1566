"""Clients of redis-py: which are taken, and those that a coalescer makes of them for itself.

Of a client of one server, or of a Sentinel's service, it makes one of its own that gives up in time. Clients of
clusters, and those with a pool of the user's own class, are used as they are.
"""

from __future__ import annotations

import inspect
import secrets
from typing import Any

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.retry
import redis.sentinel
from redis.backoff import NoBackoff

from llm_batch_coalesce._shown import shown

_COPIED = (
    redis.ConnectionPool,
    redis.BlockingConnectionPool,
    redis.sentinel.SentinelConnectionPool,
    redis.asyncio.ConnectionPool,
    redis.asyncio.BlockingConnectionPool,
    redis.asyncio.sentinel.SentinelConnectionPool,
)


def is_copied(client: Any) -> bool:  # noqa: ANN401 - a client of redis-py
    """Tell whether the coalescer makes a client of its own of this one."""
    return type(getattr(client, "connection_pool", None)) in _COPIED


def own_client(client: Any, timeout: float) -> Any:  # noqa: ANN401 - a client of redis-py
    """Make a client of the same server that gives up in time and returns bytes, if that is possible."""
    if not is_copied(client):
        return client
    pool = client.connection_pool
    options = _own_options(pool.connection_kwargs, timeout, redis.retry.Retry(NoBackoff(), 0))
    options |= {"connection_class": pool.connection_class, "max_connections": pool.max_connections}
    if type(pool) is not redis.sentinel.SentinelConnectionPool:
        return redis.Redis.from_pool(redis.ConnectionPool(**options))
    options |= {"is_master": pool.is_master, "check_connection": pool.check_connection}
    return redis.Redis.from_pool(type(pool)(pool.service_name, pool.sentinel_manager, **options))


def own_async_client(client: Any, timeout: float) -> Any:  # noqa: ANN401 - a client of redis-py
    """Make the same for tasks."""
    if not is_copied(client):
        return client
    pool = client.connection_pool
    options = _own_async_options(pool.connection_kwargs, timeout)
    options |= {"connection_class": pool.connection_class, "max_connections": pool.max_connections}
    if type(pool) is not redis.asyncio.sentinel.SentinelConnectionPool:
        return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))
    options |= {"is_master": pool.is_master, "check_connection": pool.check_connection}
    return redis.asyncio.Redis.from_pool(type(pool)(pool.service_name, pool.sentinel_manager, **options))


def own_async_client_of_node(node: Any, timeout: float) -> Any:  # noqa: ANN401 - a node of a cluster's client
    """Make a client of one node of a cluster."""
    options = _own_async_options(node.connection_kwargs, timeout)
    options |= {"host": node.host, "port": node.port, "connection_class": node.connection_class}
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(**options))


def other_primary(client: Any, last: Any) -> Any:  # noqa: ANN401 - a cluster's client, and a node of it or None
    """Choose a node of a cluster for the inbox: by chance, but another one than the last, which was lost."""
    nodes = list(client.get_primaries())
    others = [node for node in nodes if last is None or node.name != last.name]
    return secrets.choice(others or nodes)


def database_of(client: Any) -> int:  # noqa: ANN401 - a client of redis-py, of whatever kind
    """Return the number of the client's database; a cluster has one."""
    pool = getattr(client, "connection_pool", None)
    return int(getattr(pool, "connection_kwargs", {}).get("db") or 0)


def check_client(client: Any, kinds: tuple[type, ...], wanted: str, *, copied: bool, blocks: bool) -> None:  # noqa: ANN401
    """Refuse what is no client of the kind that is needed.

    Args:
        client: Anything.
        kinds: Its possible classes.
        wanted: What they are called.
        copied: Whether the coalescer makes a client of its own of it, so that its options do not matter.
        blocks: Whether its commands hold up a thread.

    Raises:
        TypeError: If it is none, or it is used as it is and decodes what it reads.
        ValueError: If it is used as it is, and may hold up a thread for ever, or has no connection for a command beside
            that for messages.
    """
    if not isinstance(client, kinds):
        raise TypeError(f"client must be {wanted}, not {shown(client)}")
    if copied:
        return
    options = _options_of(client)
    if options.get("decode_responses"):
        raise TypeError(f"client must not have decode_responses=True, since outcomes are bytes: {shown(client)}")
    most = getattr(getattr(client, "connection_pool", None), "max_connections", 2)
    if most < 2:  # noqa: PLR2004 - as above
        raise ValueError(f"client must have a pool of 2 connections or more, one for messages: {shown(client)}")
    default = inspect.signature(redis.Redis).parameters["socket_timeout"].default
    if blocks and options.get("socket_timeout", default) is None:
        raise ValueError(f"client must have a socket_timeout, or a server that hangs holds up threads: {shown(client)}")


def _options_of(client: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    pool = getattr(client, "connection_pool", None)
    if pool is not None:
        return dict(pool.connection_kwargs)
    return dict(client.get_connection_kwargs())


def _own_options(options: dict[str, Any], timeout: float, retry: Any) -> dict[str, Any]:  # noqa: ANN401 - redis-py's
    """Make the options of the coalescer's own connections of the user's: they give up in time, and read bytes."""
    own = dict(options)
    own.update(
        decode_responses=False,
        encoding="utf-8",
        encoding_errors="strict",
        retry=retry,
        retry_on_error=[],
        health_check_interval=0,
        socket_timeout=timeout,
    )
    if "path" not in own:
        own["socket_connect_timeout"] = timeout
    # What ties connections to the user's pool: its cache, and its notes about a server's maintenance, which would also
    # have them wait for longer.
    notes = own.get("maint_notifications_config")
    if notes is not None:
        own["maint_notifications_config"] = type(notes)(enabled=False)
    for tie in (
        "cache",
        "cache_config",
        "connection_pool",
        "himport_registry",
        "maint_notifications_pool_handler",
        "oss_cluster_maint_notifications_handler",
        "orig_host_address",
        "orig_socket_connect_timeout",
        "orig_socket_timeout",
        "retry_on_timeout",
    ):
        own.pop(tie, None)
    return own


def _own_async_options(options: dict[str, Any], timeout: float) -> dict[str, Any]:
    own = _own_options(options, timeout, redis.asyncio.retry.Retry(NoBackoff(), 0))
    # A scope around each command does that. For a limit of its own the client takes `asyncio.wait_for`, which swallows
    # cancellations before Python 3.12.
    own["socket_timeout"] = None
    return own

"""The server that the workers share on: one that is started for the demo, or one that runs already."""

from __future__ import annotations

import contextlib
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import redis

from llm_batch_coalesce._demo.child import running_child
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.upstream import one_line
from llm_batch_coalesce._demo.worker import FLEET
from llm_batch_coalesce.redis import BackendError, DistributedBatchCoalescer

if TYPE_CHECKING:
    from collections.abc import Iterator

_STOP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class FleetServer:
    """A server that can be used."""

    url: str = field(repr=False)
    """With its password."""
    namespace: str
    """Of this demo only, on a server that others may use."""
    description: str


@contextlib.contextmanager
def fleet_server(url: str | None) -> Iterator[FleetServer]:
    """Provide a server while the block lasts, and leave nothing behind on it.

    Args:
        url: Where it is; None starts one.

    Raises:
        DemoError: It did not start, cannot be reached, or refuses.
    """
    # What coalescers log of a server that cannot be used is said by the demo, in its own line.
    logging.getLogger("llm_batch_coalesce").addHandler(logging.NullHandler())
    advice = "check --server"
    with contextlib.ExitStack() as stack:
        if url is None:
            advice = "name another one with --server"
            host = running_child("the Valkey or Redis server", "server_host", patience_seconds=_STOP_SECONDS)
            url = f"redis://127.0.0.1:{stack.enter_context(host).read_port()}"
        namespace = f"llm_batch_coalesce_demo_{secrets.token_hex(6)}"
        try:
            client = stack.enter_context(redis.Redis.from_url(url, socket_timeout=FLEET["backend_timeout_seconds"]))
            coalescer = stack.enter_context(DistributedBatchCoalescer(client, namespace=namespace, **FLEET))
            # At its first contact a coalescer looks at what it needs of a server.
            coalescer.peek("")
            description = f"{_named(client)} at {_shown(url)}"
        except (BackendError, redis.RedisError, OSError, TypeError, ValueError) as error:
            message = f"cannot share on the server at {_shown(url)} ({one_line(error)}); {advice}"
            raise DemoError(message) from None
        try:
            yield FleetServer(url, namespace, description)
        finally:
            # Whatever the TTL was. What a worker held that was stopped in its call has a lease that ends.
            with contextlib.suppress(BackendError):
                for term in load_glossary():
                    coalescer.forget(term)


def _named(client: redis.Redis) -> str:
    try:
        told = client.info("server")
    except redis.RedisError:  # whoever may not ask that may do everything else
        return "a server"
    return f"Valkey {told['valkey_version']}" if "valkey_version" in told else f"Redis {told.get('redis_version', '')}"


def _shown(url: str) -> str:
    """Return a URL without what may hold a password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

"""Connections of a process to one server, for the commands of its threads."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import redis.exceptions

# How many commands may be under way at the same time; others wait for their turn. Each has a connection.
MOST_COMMANDS = 64
# For how long a connection is taken to live without a look, in seconds. A look costs a tenth of a round trip.
_FRESH = 0.01


class Connections:
    """Connections that a client of one server has lent for good, taken in turn by threads.

    What the client does around each command (it looks whether the connection still lives, retries, measures) is a third
    of a round trip on loopback. Here it looks only after a pause, and who asks tries again.
    """

    def __init__(self, client: redis.Redis, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._parsed: Any = client.parse_response
        self._turns = threading.Semaphore(min(MOST_COMMANDS, client.connection_pool.max_connections))
        # With the time of their last use. The one that was used last is taken first.
        self._idle: list[tuple[Any, float]] = []

    def command(self, *words: str | bytes | int) -> Any:  # noqa: ANN401 - any answer
        """Send a command and return its answer, as the client reads it.

        Raises:
            redis.RedisError: If the server refuses, is not there, or does not answer in time.
        """
        if not self._turns.acquire(timeout=self._timeout):
            raise redis.exceptions.TimeoutError("no connection was free in time")
        try:
            connection = self._take()
            try:
                connection.send_command(*words, check_health=False)
                return self._parsed(connection, words[0])
            finally:
                # If it was cut, it connects anew when it is used.
                self._idle.append((connection, time.monotonic()))
        finally:
            self._turns.release()

    def _take(self) -> Any:  # noqa: ANN401 - a connection of redis-py
        try:
            connection, used_at = self._idle.pop()
        except IndexError:
            return self._client.connection_pool.get_connection()
        if time.monotonic() - used_at > _FRESH:
            try:
                is_cut = connection.can_read()
            except (redis.exceptions.RedisError, OSError):
                is_cut = True
            if is_cut:
                connection.disconnect()
        return connection

    def disconnect(self) -> None:
        """Cut the connections that nobody uses."""
        self._client.connection_pool.disconnect(inuse_connections=False)
        with contextlib.suppress(IndexError):
            while True:
                connection, _ = self._idle.pop()
                connection.disconnect()
                self._client.connection_pool.release(connection)

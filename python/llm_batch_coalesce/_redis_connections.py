"""Connections of a process to one server, for the commands of its threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import redis.exceptions

from llm_batch_coalesce._redis_common import packed

if TYPE_CHECKING:
    from llm_batch_coalesce._redis_bounded import Bounded

# How many commands may be under way at the same time; others wait for their turn. Each has a connection.
MOST_COMMANDS = 64
# For how long a connection is taken to live without a look, in seconds. A look costs a tenth of a round trip.
_FRESH = 0.01


def most_commands(client: Any, *, shared: bool) -> int:  # noqa: ANN401 - a client of redis-py
    """Return how many commands a client may have under way at the same time, beside a subscription if that shares."""
    most = getattr(getattr(client, "connection_pool", None), "max_connections", MOST_COMMANDS)
    return max(1, min(MOST_COMMANDS, most - 1 if shared else most))


class Turns:
    """So many at a time, in the order in which they came.

    `threading.Semaphore` has no order, so that some wait for long, and an interrupt may leave its lock held.
    """

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        self._waiting: deque[Any] = deque()

    def take(self, seconds: float) -> bool:
        """Wait for a turn, for so many seconds at most. False if there was none."""
        gate = threading.Lock()
        gate.acquire()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            self._waiting.append(gate)
        try:
            if gate.acquire(timeout=seconds):
                return True
        except BaseException:
            if not self._leave(gate):
                self.give_back()
            raise
        return not self._leave(gate)

    def _leave(self, gate: Any) -> bool:  # noqa: ANN401 - a lock
        """Wait no more. False if the turn has come meanwhile."""
        with self._lock:
            if gate not in self._waiting:
                return False
            self._waiting.remove(gate)
            return True

    def give_back(self) -> None:
        """Let the next one have the turn."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1


class Connections:
    """Connections as those of a client of one server, taken in turn by threads.

    What the client does around each command (it looks whether the connection still lives, retries, measures) is a third
    of a round trip on loopback. Here it looks only after a pause, and who asks tries again.
    """

    def __init__(self, client: redis.Redis, timeout: float, bounded: Bounded) -> None:
        self._bounded = bounded
        self._pool = client.connection_pool
        self._timeout = timeout
        self._parsed: Any = client.parse_response
        self._turns = Turns(most_commands(client, shared=False))
        # With the time of their last use. The one that was used last is taken first.
        self._idle: list[tuple[Any, float]] = []

    def command(self, *words: str | bytes | int) -> Any:  # noqa: ANN401 - any answer
        """Send a command and return its answer, as the client reads it.

        Raises:
            redis.RedisError: If the server refuses, is not there, or does not answer in time.
        """
        if not self._turns.take(self._timeout):
            raise redis.exceptions.TimeoutError("no connection was free in time")
        try:
            connection = self._connection()
            # Whether all of the answer was read. If not, it must never be taken for the next command's.
            whole = False
            try:
                connection.send_packed_command([packed(words)], check_health=False)
                answer = self._parsed(connection, words[0])
                whole = True
            except redis.exceptions.ResponseError:
                whole = True
                raise
            finally:
                if whole:
                    self._idle.append((connection, time.monotonic()))
                else:
                    connection.disconnect()
            return answer
        finally:
            self._turns.give_back()

    def _connection(self) -> Any:  # noqa: ANN401 - a connection of redis-py
        try:
            connection, used_at = self._idle.pop()
        except IndexError:
            return self._connected(self._pool.connection_class(**self._pool.connection_kwargs))
        if time.monotonic() - used_at > _FRESH:
            try:
                is_cut = connection.can_read()
            except (redis.exceptions.RedisError, OSError):
                is_cut = True
            if is_cut:
                connection.disconnect()
                return self._connected(connection)
        return connection

    def _connected(self, connection: Any) -> Any:  # noqa: ANN401 - as above
        """Connect it. The timeout of its socket bounds no resolver, and each of a host's addresses anew."""
        wanted, made = True, False

        def connect() -> None:
            nonlocal made
            connection.connect()
            made = True
            if not wanted:
                connection.disconnect()

        try:
            self._bounded.run(connect)
        except BaseException:
            wanted = False
            # In this very moment; before, it is up to who connects.
            if made:
                connection.disconnect()
            raise
        return connection

    def disconnect(self) -> None:
        """Cut the connections that nobody uses."""
        idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.disconnect()

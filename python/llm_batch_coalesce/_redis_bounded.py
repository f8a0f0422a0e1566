"""Commands of a client whose own options may let it wait for long: run in threads, so that the caller can give up."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

import redis.exceptions

if TYPE_CHECKING:
    from collections.abc import Callable


class _Job:
    def __init__(self, command: Callable[[], Any]) -> None:
        self.command = command
        self.answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.wanted = True

    def do(self) -> None:
        if self.wanted:
            try:
                self.answers.put((self.command(), None))
            except BaseException as error:  # noqa: BLE001 - it goes to the caller
                self.answers.put((None, error))


# After how long a thread ends that has nothing to do, in seconds.
_LINGER = 1.0


class Bounded:
    """Threads for commands, made when they are needed."""

    def __init__(self, timeout: float, most: int) -> None:
        self._timeout, self._most = timeout, most
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # Jobs that nobody has begun, threads, and those of them that have nothing to do.
        self._pending = self._threads = self._idle = 0
        self._closed = False

    def run(self, command: Callable[[], Any]) -> Any:  # noqa: ANN401 - the command's answer
        """Run a command, but not for longer than the timeout; one that is given up goes on in its thread.

        Raises:
            redis.TimeoutError: If it takes longer.
        """
        job = _Job(command)
        with self._lock:
            if self._pending >= self._idle and self._threads < self._most:
                threading.Thread(target=self._work, name="coalesce-command", daemon=True).start()
                self._threads += 1
                self._idle += 1
            self._pending += 1
        self._jobs.put(job)
        try:
            answer, error = job.answers.get(timeout=self._timeout)
        except queue.Empty:
            job.wanted = False
            raise redis.exceptions.TimeoutError("no answer in time") from None
        if error is not None:
            try:
                raise error
            finally:
                # This frame is in its traceback: each would keep the other, and connections with them.
                del error
        return answer

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_LINGER)
            except queue.Empty:
                with self._lock:
                    # The others that are idle do what has just come.
                    if self._pending < self._idle:
                        self._idle -= 1
                        self._threads -= 1
                        return
                continue
            if job is None:
                return
            with self._lock:
                self._pending -= 1
                self._idle -= 1
            job.do()
            del job
            with self._lock:
                # Those that are idle do what is left.
                if self._closed and self._pending <= self._idle:
                    self._threads -= 1
                    return
                self._idle += 1

    def close(self) -> None:
        """End the threads when they are done. Commands that come later have threads of their own."""
        with self._lock:
            self._closed = True
            unneeded = max(0, self._idle - self._pending)
            for _ in range(unneeded):
                self._jobs.put(None)
            self._threads -= unneeded
            self._idle -= unneeded

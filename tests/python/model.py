"""The coalescer in pure Python: a lock, a dict of entries and an event for each. What the package must behave like."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Event = TypeVar("Event", threading.Event, asyncio.Event)


class Entry(Generic[Event]):
    """A call under way, or its outcome for as long as it is retained."""

    def __init__(self, done: Event) -> None:
        self.done = done
        self.value: Any = None
        self.error: Exception | None = None
        self.abandoned = False
        self.expires_at: float | None = None
        self.waiters = 0

    def outcome(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class Entries(Generic[Event]):
    """All entries by key. Its caller sees to it that no two operations overlap."""

    def __init__(self, ttl_seconds: float, clock: Callable[[], float], new_event: Callable[[], Event]) -> None:
        self._ttl_seconds, self._clock, self._new_event = ttl_seconds, clock, new_event
        self._entries: dict[Hashable, Entry[Event]] = {}

    def find_or_claim(self, key: Hashable) -> tuple[Entry[Event], bool]:
        """Return the key's entry, and whether the caller has to compute its outcome."""
        self._drop_expired()
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(self._new_event())
            return entry, True
        entry.waiters += 1
        return entry, False

    def finish(self, entry: Entry[Event]) -> None:
        """Retain the entry's outcome from now on, and wake those who wait for it."""
        entry.expires_at = self._clock() + self._ttl_seconds
        entry.done.set()

    def abandon(self, key: Hashable, entry: Entry[Event]) -> None:
        """Let those who wait for the entry compute its outcome themselves."""
        del self._entries[key]
        entry.abandoned = True
        entry.done.set()

    def waiters(self, key: Hashable) -> int:
        entry = self._entries.get(key)
        return entry.waiters if entry is not None and entry.expires_at is None else 0

    def _drop_expired(self) -> None:
        now = self._clock()
        for key, entry in list(self._entries.items()):
            if entry.expires_at is not None and entry.expires_at <= now:
                del self._entries[key]


class BatchCoalescer:
    """For threads."""

    def __init__(self, ttl_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._entries = Entries(ttl_seconds, clock, threading.Event)

    def get_or_call(self, key: Hashable, fn: Callable[[], T]) -> T:
        while True:
            with self._lock:
                entry, leads = self._entries.find_or_claim(key)
            if leads:
                try:
                    entry.value = fn()
                except Exception as error:
                    entry.error = error
                except BaseException:
                    with self._lock:
                        self._entries.abandon(key, entry)
                    raise
                with self._lock:
                    self._entries.finish(entry)
            else:
                entry.done.wait()
            if not entry.abandoned:
                return entry.outcome()

    def _waiters(self, key: Hashable) -> int:
        with self._lock:
            return self._entries.waiters(key)


class AsyncBatchCoalescer:
    """For the tasks of one event loop. Nothing is awaited between looking and claiming, so it needs no lock."""

    def __init__(self, ttl_seconds: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries = Entries(ttl_seconds, clock, asyncio.Event)

    async def get_or_call(self, key: Hashable, fn: Callable[[], Awaitable[T]]) -> T:
        while True:
            entry, leads = self._entries.find_or_claim(key)
            if leads:
                try:
                    entry.value = await fn()
                except Exception as error:
                    entry.error = error
                except BaseException:
                    self._entries.abandon(key, entry)
                    raise
                self._entries.finish(entry)
            else:
                await entry.done.wait()
            if not entry.abandoned:
                return entry.outcome()

    def _waiters(self, key: Hashable) -> int:
        return self._entries.waiters(key)

"""Tells when things are freed."""

import threading
import weakref


class Flag:
    """Like an event, but setting it takes no lock: a finalizer may run in the very thread that waits for it."""

    def __init__(self):
        self._set = False

    def set(self):
        self._set = True

    def is_set(self):
        return self._set

    def wait(self):
        """Wait until it is set. In small steps: a free-threaded build lets the thread that made an object free it."""
        pause = threading.Event()
        return any(self._set or pause.wait(0.01) for _ in range(1_000))


class Freed(Flag):
    """Whether a thing has been freed."""

    def __init__(self, thing):
        super().__init__()
        weakref.finalize(thing, self.set)

"""What several tests need: threads that start together and whose failures are the test's."""

import gc
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from complaints import complaints
from fleet_proxy import behind, proxy
from fleets import fleet, idle_processes, server
from http_fixtures import callers, library, provider, running

# Fixtures, one of each for all modules.
__all__ = [
    "behind",
    "callers",
    "complaints",
    "fleet",
    "idle_processes",
    "library",
    "provider",
    "proxy",
    "running",
    "server",
]

# Programs under test are interrupted, which a shell's background jobs and `nohup` would have them ignore.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Crew:
    """Threads that start at one barrier; `join` returns their results in order, or raises the first error."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._outcomes: dict[int, Any] = {}
        self._errors: list[BaseException] = []

    def start(self, count: int, work: Callable[[int], Any]) -> "Crew":
        barrier = threading.Barrier(count)

        def run(number: int) -> None:
            try:
                barrier.wait(60)
                self._outcomes[number] = work(number)
            except BaseException as error:
                self._errors.append(error)

        self._threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()
        return self

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        if self._errors:
            raise self._errors[0]
        return [self._outcomes[number] for number in sorted(self._outcomes)]


@pytest.fixture(scope="module", autouse=True)
def _what_is_old_is_not_collected():
    """Collections are quick, and find what the module's own tests have left, not what was imported or left before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def crew() -> Crew:
    return Crew()


@pytest.fixture
def crews() -> Callable[[], Crew]:
    return Crew


@pytest.fixture(autouse=True)
def the_gil_stays_off() -> Any:
    """On a free-threaded build neither import nor use may enable the GIL."""
    yield
    if "free-threading" in sys.version:
        assert not sys._is_gil_enabled()

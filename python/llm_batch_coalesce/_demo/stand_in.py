"""The stand-in provider in a process of its own, so that clients and server do not share an interpreter lock."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Final

import httpx2

from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.upstream import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

# Windows only: a Ctrl-C meant for the demo must not reach the provider before the demo has dealt with it.
_NEW_GROUP: Final[int] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class StandIn:
    """A running stand-in; its counters are the provider's own, not the client's."""

    def __init__(self, root: str, client: httpx2.Client) -> None:
        """Make the handle of the stand-in that serves ``root``."""
        self._root = root
        self._client = client

    @property
    def base_url(self) -> str:
        """What an OpenAI-compatible client takes as its base URL."""
        return f"{self._root}/v1"

    def reset_usage(self) -> None:
        """Set the counters to zero.

        Raises:
            DemoError: The stand-in is gone.
        """
        self._ask("POST", "/stats/reset")

    def usage(self) -> Usage:
        """Return what was used since the last reset.

        Raises:
            DemoError: The stand-in is gone.
        """
        stats = self._ask("GET", "/stats").json()
        return Usage(calls=stats["calls"], tokens=stats["tokens"], cost=stats["cost"])

    def _ask(self, method: str, path: str) -> httpx2.Response:
        try:
            return self._client.request(method, self._root + path).raise_for_status()
        except (httpx2.HTTPError, RuntimeError) as error:  # a RuntimeError if the block has been left
            message = f"the stand-in provider does not answer at {self._root}{path} ({error}); run the demo again"
            raise DemoError(message) from None


@contextlib.contextmanager
def running_stand_in(*, latency_seconds: float, price: float) -> Iterator[StandIn]:
    """Serve the stand-in on a free loopback port until the block is left.

    Raises:
        DemoError: The process did not start.
    """
    command = [sys.executable, "-m", "llm_batch_coalesce._demo.provider"]
    command += [f"--latency={latency_seconds!r}", f"--price={price!r}"]
    # A file and not a pipe, which would have to be emptied by somebody or else block the provider when full.
    with tempfile.TemporaryFile() as errors, _start(command, errors) as process:
        try:
            first_line = process.stdout.readline() if process.stdout is not None else b""
            if not first_line.strip().isdigit():
                errors.seek(0)
                last_words = errors.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
                raise _not_started(last_words or "it said nothing")
            # A proxy named in the environment knows nothing of this machine's loopback interface.
            with httpx2.Client(trust_env=False) as client:
                yield StandIn(f"http://127.0.0.1:{int(first_line)}", client)
        finally:
            # It keeps nothing, so there is nothing to shut down in good order.
            process.kill()


def _start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter and numbers that were checked
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            creationflags=_NEW_GROUP,
        )
    except OSError as error:
        raise _not_started(str(error)) from None


def _not_started(reason: str) -> DemoError:
    return DemoError(f"the stand-in provider did not start: {reason}")

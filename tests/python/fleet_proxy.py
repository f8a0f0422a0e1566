"""A TCP proxy in front of a server, on a loop of its own: it can lose, hold up, delay and cut what passes.

`only="inbox"` means the connections that have subscribed, `only="commands"` the others. Faults hit connections that
are there; those that ask for it hit later ones, too, until `heal`: for `only="inbox"`, from when they subscribe. A
connection that has lost bytes stays dead.
"""

import asyncio
import contextlib
import hashlib
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
from fleets import HOST, SHORT, Fleet, ServerProcess
from loops import LoopThread, let_run, wait_until

UP, DOWN = "up", "down"
# What members behind a proxy give the server for an answer; and no lease of theirs runs out during a test, unless that
# is what it is about.
LONG_LEASE = 50.0


class Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.ends = {UP: server, DOWN: client}
        self.is_inbox = False
        self.lost: set[str] = set()
        # It is cut when the server answers.
        self.is_doomed = False

    def chosen(self, only: str | None) -> bool:
        return only is None or (only == "inbox") == self.is_inbox

    def close(self) -> None:
        for end in self.ends.values():
            if end.get_extra_info("ssl_object") is None:
                with contextlib.suppress(OSError):
                    # A reset, not a farewell.
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
            end.transport.abort()


class Proxy:
    """Passes bytes on to a server, until it is told otherwise."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.made = 0
        self._target = port
        self._links: list[Link] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._refuses = False
        self._delays: dict[str, float] = {UP: 0.0, DOWN: 0.0}
        # What later connections lose: from their beginning, and from when they subscribe.
        self._lost: set[str] = set()
        self._lost_by_inboxes: set[str] = set()
        # Which scripts are to be cut on their way: their digest, whether the server hears of them, how many more.
        self._cut_sha, self._cut_heard, self._cuts_left = b"", False, 0
        self._thread = LoopThread()
        self._server: asyncio.Server = self._thread.start(asyncio.start_server(self._serve, HOST, 0, ssl=tls)).result()
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def address(self) -> dict[str, Any]:
        return {"host": HOST, "port": self.port}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        async def close() -> None:
            # Those that are accepted already begin to be served in the rounds that follow, which needs the server.
            for listener in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listener)
            await let_run()
            self._server.close()
            self._cut(None)
            # They may be in a delay, or about to connect.
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)
            # Transports close in the rounds that follow.
            await let_run()

        try:
            self._thread.start(close()).result()
        finally:
            self._thread.end()

    # Faults.

    def refuse(self) -> None:
        """Drop those that come from now on; what is there stays."""
        self._refuses = True

    def cut(self, only: str | None = None) -> None:
        """Reset connections."""
        self._thread.do(self._cut, only)

    def cut_scripts(self, script: str, *, heard: bool, times: int = 1) -> None:
        """Reset the connections of those that run a script next, on its way to the server, or its answer's way back."""
        sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()

        def begin() -> None:
            self._cut_sha, self._cut_heard, self._cuts_left = sha, heard, times

        self._thread.do(begin)

    def wait_for_cuts(self) -> None:
        """Return when all scripts that were to be cut have been."""
        wait_until(lambda: self._thread.do(lambda: not self._cuts_left and not any(x.is_doomed for x in self._links)))

    def half_close(self, direction: str, only: str | None = None) -> None:
        """End one direction: a server or a client is told that nothing comes any more, and may still talk."""

        def end() -> None:
            for link in self._chosen(only):
                link.lost.add(direction)
                link.ends[direction].write_eof()

        self._thread.do(end)

    def blackhole(self, *directions: str, only: str | None = None, later: bool = False) -> None:
        """Swallow what comes; nobody is told. `later`: of new connections, too."""

        def lose() -> None:
            for link in self._chosen(only):
                link.lost.update(directions or (UP, DOWN))
            if later:
                lost = self._lost_by_inboxes if only == "inbox" else self._lost
                lost.update(directions or (UP, DOWN))

        self._thread.do(lose)

    def delay(self, seconds: float, *directions: str) -> None:
        """Pass everything on, later."""
        for direction in directions or (UP, DOWN):
            self._delays[direction] = seconds

    def heal(self) -> None:
        """Let new connections be as they should."""

        def forgive() -> None:
            self._refuses = False
            self._lost.clear()
            self._lost_by_inboxes.clear()
            self._delays = {UP: 0.0, DOWN: 0.0}

        self._thread.do(forgive)

    # What is there.

    def count(self, only: str | None = None) -> int:
        return self._thread.do(lambda: len(self._chosen(only)))

    def wait_for_inboxes(self, count: int) -> None:
        """Return when so many connections have subscribed, and live."""
        wait_until(lambda: self._thread.do(lambda: sum(not link.lost for link in self._chosen("inbox"))) == count)

    # Inside the loop.

    def _chosen(self, only: str | None) -> list[Link]:
        return [link for link in self._links if link.chosen(only)]

    def _cut(self, only: str | None) -> None:
        for link in self._chosen(only):
            link.close()

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.made += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        if self._refuses:
            to_client.transport.abort()
            return
        try:
            from_server, to_server = await asyncio.open_connection(HOST, self._target)
        except (OSError, asyncio.CancelledError):
            to_client.transport.abort()
            return
        link = Link(to_client, to_server)
        link.lost.update(self._lost)
        self._links.append(link)
        try:
            # Streams of Python 3.11 log what is cancelled.
            with contextlib.suppress(asyncio.CancelledError):
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(self._pump(link, UP, from_client))
                    pumps.create_task(self._pump(link, DOWN, from_server))
        finally:
            self._links.remove(link)
            for end in link.ends.values():
                end.transport.abort()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _pump(self, link: Link, direction: str, source: asyncio.StreamReader) -> None:
        end = link.ends[direction]
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                if direction == UP and not link.is_inbox and b"SUBSCRIBE" in data.upper():
                    link.is_inbox = True
                    link.lost.update(self._lost_by_inboxes)
                if self._delays[direction]:
                    await asyncio.sleep(self._delays[direction])
                if self._is_cut(link, direction, data):
                    link.close()
                    return
                if direction in link.lost:
                    continue
                end.write(data)
                await end.drain()
        if direction not in link.lost:
            with contextlib.suppress(OSError):
                end.write_eof() if end.can_write_eof() else end.close()

    def _is_cut(self, link: Link, direction: str, data: bytes) -> bool:
        if direction == UP and self._cuts_left and self._cut_sha in data:
            self._cuts_left -= 1
            link.is_doomed = True
            return not self._cut_heard
        return direction == DOWN and link.is_doomed


@pytest.fixture
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def behind(fleet: Fleet, proxy: Proxy) -> Iterator[Callable[..., Any]]:
    """Make members that reach the server through the proxy."""
    from fleet_members import Member

    made = []

    def make(kind: str, **options: Any) -> Member:
        own = {"namespace": fleet.namespace, "backend_timeout_seconds": SHORT, "lease_seconds": LONG_LEASE}
        member = Member(kind, proxy.address, own | options)
        made.append(member)
        return member

    yield make
    proxy.heal()
    proxy.cut()
    for member in made:
        member.close()

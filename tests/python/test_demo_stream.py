"""``python -m llm_batch_coalesce demo --stream``: readers of one answer, from the command line and over real HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import socketserver
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from demo_runs import Terminal, assert_failed_in_one_line, environment, run_demo, serve, serving
from rich.console import Console

from llm_batch_coalesce.__main__ import main
from llm_batch_coalesce._demo import upstream
from llm_batch_coalesce._demo.audience import SHOWN, Reader, make_audience
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.provider import make_app
from llm_batch_coalesce._demo.reading import Board, State, read_together
from llm_batch_coalesce._demo.stream_view import view_of
from llm_batch_coalesce._demo.upstream import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

TABLE_ROW = re.compile(
    r"^(a stream each|one shared stream)[ |]+(\d+)[ |]+(\d+)[ |]+([\d,]+|n/a) .*?([^ |\n]+) *$", re.MULTILINE
)
TERM = max(load_glossary(), key=lambda term: len(load_glossary()[term]))
ANSWER = load_glossary()[TERM]

DIRECTLY = """
import llm_batch_coalesce
class DoesNothing:
    def __init__(self, **_): pass
    def stream(self, key, fn): return fn()
llm_batch_coalesce.AsyncBatchCoalescer = DoesNothing
"""
MIXED_UP = """
import llm_batch_coalesce
class MixesUp:
    def __init__(self, **_): self.asked = False
    def stream(self, key, fn):
        async def other():
            yield "something else"
        stream = other() if self.asked else fn()
        self.asked = True
        return stream
llm_batch_coalesce.AsyncBatchCoalescer = MixesUp
"""


def tokens(text: str) -> int:
    """Return what the stand-in takes a text for."""
    return math.ceil(len(text) / 4)


PROMPT_TOKENS = tokens(f"{upstream._INSTRUCTION}\n{TERM}")


def event(content: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\n\n"


def chunk(text: str | None, **more: Any) -> bytes:
    """Return the event of a piece of an answer."""
    return event({"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, **more}]})


DONE = event(b"[DONE]")
USAGE = event({"choices": [], "usage": {"total_tokens": 2000}})
PIECES = chunk("A ") + chunk(None) + chunk("loan.") + chunk(None, finish_reason="stop")


def rows(output: str) -> dict[str, list[str]]:
    """Return the numbers of each run in the demo's table."""
    return {run: numbers for run, *numbers in TABLE_ROW.findall(output)}


@pytest.fixture(scope="module")
def demo() -> subprocess.CompletedProcess[str]:
    """Run the demo once, on an output that is no terminal and knows ASCII only."""
    return run_demo("--stream", "--latency=0.02", PYTHONIOENCODING="ascii")


def test_the_demo_shows_that_one_answer_is_asked_for_once(demo: subprocess.CompletedProcess[str]) -> None:
    assert (demo.returncode, demo.stderr) == (0, "")
    table = rows(demo.stdout)
    assert list(table) == ["a stream each", "one shared stream"]
    readers, requests, paid, cost = table["one shared stream"]
    assert (readers, requests, paid) == ("50", "1", str(PROMPT_TOKENS + tokens(ANSWER)))
    readers, requests, all_paid, all_cost = table["a stream each"]
    assert (readers, requests) == ("50", "50")
    # Two have left early, and so have cost less.
    whole = PROMPT_TOKENS + tokens(ANSWER)
    assert 48 * whole + 2 * PROMPT_TOKENS < int(all_paid.replace(",", "")) <= 50 * whole
    assert 0.0 < float(cost.removeprefix("$")) < float(all_cost.removeprefix("$"))
    assert "No request too many: 1 (term, 5 s TTL window) pair. All got the same text." in demo.stdout


def test_output_that_is_no_terminal_gets_plain_lines_that_fit_it(demo: subprocess.CompletedProcess[str]) -> None:
    lines = [line.rstrip() for line in demo.stdout.splitlines()]
    assert demo.stdout.isascii()
    assert "\x1b" not in demo.stdout
    assert max(map(len, lines)) <= 80
    assert "Coming late: 10. Slow: 1. Leaving early: 2." in lines
    progress = [line for line in lines if line.startswith("one shared stream: ")]
    assert [line.split()[3] for line in progress[:4]] == ["50", "12", "24", "36"]
    assert progress[-1] == "one shared stream: served 48, left early 2, 1 upstream request"


@pytest.mark.parametrize("arguments", [["--users=1"], ["--users=4", "--ttl=0"], ["--users=5", "--seed=3"]])
def test_any_number_of_readers_is_served(arguments: list[str]) -> None:
    demo = run_demo("--stream", "--latency=0.01", *arguments)
    assert (demo.returncode, demo.stderr) == (0, "")
    assert rows(demo.stdout)["one shared stream"][1] == "1"


def test_a_coalescer_that_does_nothing_fails_the_demo() -> None:
    demo = run_demo("--stream", "--users=20", "--latency=0.02", prelude=DIRECTLY)
    assert_failed_in_one_line(demo, "one shared stream: 20 upstream requests for 1 ", "let duplicate requests through")
    assert "one shared stream" in rows(demo.stdout)  # the table is there to be looked at


def test_a_coalescer_that_mixes_answers_up_fails_the_demo() -> None:
    demo = run_demo("--stream", "--users=4", "--latency=0.02", prelude=MIXED_UP)
    assert_failed_in_one_line(demo, "its readers got 2 different texts")


def test_a_real_server_is_asked_for_a_stream_with_its_usage() -> None:
    with serving(200, PIECES + USAGE + DONE) as server:
        real = ("--base-url", server.url, "--model", "small", "--api-key-env", "DEMO_KEY", "--price=0.5")
        demo = run_demo("--stream", "--users=10", *real, DEMO_KEY="secret")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert server.asked == [("Bearer secret", "small")] * 11
    assert all(request["stream"] and request["stream_options"]["include_usage"] for request in server.requests)
    assert rows(demo.stdout) == {
        "a stream each": ["10", "10", "20,000", "$10.00"],
        "one shared stream": ["10", "1", "2,000", "$1.00"],
    }


def test_tokens_that_a_real_server_does_not_tell_are_not_made_up() -> None:
    with serving(200, PIECES) as server:
        demo = run_demo("--stream", "--users=3", "--base-url", server.url, "--model", "m")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert rows(demo.stdout)["one shared stream"] == ["3", "1", "n/a", "n/a"]
    assert "No cost: " in demo.stdout


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, b'{"error": {"message": "Incorrect\\nkey\\u001b[31m"}}', "401 Unauthorized (Incorrect key[31m)"),
        (500, b"<h1>oops</h1>", "HTTP 500 Internal Server Error;"),
        (200, b"<html>welcome</html>", "no whole stream of an answer"),
        (200, b'{"choices": [{"message": {"content": "not streamed"}}]}', "no whole stream of an answer"),
        (200, chunk("A "), "no whole stream of an answer"),
        (200, PIECES + event(b"{"), "no part of an answer"),
        (200, event(b"[" * 100_000), "no part of an answer"),
        (200, event(b"[]"), "no part of an answer"),
        (200, chunk("A ") + event({"error": {"message": "over\nloaded"}}), "broke the answer off (over loaded)"),
        (200, event({"error": {}}), "broke the answer off (it does not say why)"),
    ],
)
def test_a_server_that_gives_no_answer_is_named_in_one_line(
    status: int, body: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(status, body) as server:
        assert main(["demo", "--stream", "--users=10", "--base-url", server.url, "--model", "m"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{server.url}/chat/completions ")
    assert said in line


def test_a_server_that_breaks_off_is_named_in_one_line() -> None:
    class BreaksOff(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + chunk("A "))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), BreaksOff) as server, serve(server):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        demo = run_demo("--stream", "--users=10", "--base-url", url, "--model", "m")
    assert_failed_in_one_line(demo, f"the exchange with {url}/chat/completions broke off")


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone on Windows")
@pytest.mark.parametrize("cut", [0, len(chunk("A "))], ids=["before the first token", "after it"])
@pytest.mark.parametrize(("run", "streams_before"), [("a stream each", 0), ("one shared stream", 10)])
def test_ctrl_c_ends_the_demo_with_one_line_whatever_is_in_flight(run: str, streams_before: int, cut: int) -> None:
    command = (sys.executable, "-m", "llm_batch_coalesce", "demo", "--stream", "--users=10", "--model=m")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment()}
    with (
        serving(200, PIECES + DONE, hold_after=streams_before, cut=cut) as server,
        subprocess.Popen([*command, f"--base-url={server.url}"], **pipes) as demo,
    ):
        assert server.holding.wait(timeout=25)
        demo.send_signal(signal.SIGINT)
        output, errors = demo.communicate(timeout=25)
    assert (demo.returncode, errors) == (130, "interrupted before the demo had finished\n")
    assert output.splitlines()[-1] == f"{run}: 10 readers"


@pytest.mark.parametrize("which", [["--stream"], ["--requests=400"]])
def test_an_output_that_is_closed_ends_the_demo_with_one_line(which: list[str]) -> None:
    command = [sys.executable, "-m", "llm_batch_coalesce", "demo", "--latency=0.05", *which]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "env": environment()}
    with subprocess.Popen(command, **pipes) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        assert demo.stdout.readline()
        demo.stdout.close()
        assert demo.stderr.read() == "the output was closed before the demo had finished\n"
        assert demo.wait(25) == 1


def test_hovers_are_not_counted_with_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--stream", "--requests", "5"])
    assert exit_.value.code == 2
    assert "argument --requests: " in capsys.readouterr().err


def test_the_help_says_what_a_stream_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "--stream" in capsys.readouterr().out


def test_the_audience_follows_from_its_seed() -> None:
    audience = make_audience(200, 1)
    assert audience == make_audience(200, 1)
    assert audience != make_audience(200, 2)
    assert sum(reader.joins_at > 0 for reader in audience) == 40
    parts = [number for number, reader in enumerate(audience) if reader.is_slow or reader.leaves_after is not None]
    assert len(parts) == 3
    assert max(parts) < SHOWN  # where they can be seen
    assert make_audience(4, 1) == [Reader()] * 4


async def test_readers_come_and_leave_when_it_is_their_turn() -> None:
    board = Board([Reader(), Reader(joins_at=2), Reader(leaves_after=1)], expected=3)
    joined_at, advanced = [], []

    async def pieces() -> AsyncGenerator[str, None]:
        joined_at.append(board.front.tokens)
        for piece in "abc":
            await asyncio.sleep(0)
            yield piece

    await read_together(
        board, open_stream=pieces, pause_seconds=0.0, advanced=lambda: advanced.append(board.front.tokens)
    )
    assert [(place.state, place.text) for place in board.places] == [
        (State.SERVED, "abc"),
        (State.SERVED, "abc"),
        (State.LEFT, "a"),
    ]
    assert joined_at[:2] == [0, 0]
    assert joined_at[2] >= 2
    assert advanced == [1, 2, 3]


async def test_the_slow_reader_pauses_after_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    paused = []

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    async def pieces() -> AsyncGenerator[str, None]:
        for piece in "abc":
            yield piece

    monkeypatch.setattr(asyncio, "sleep", pause)
    board = Board([Reader(), Reader(is_slow=True)], expected=3)
    await read_together(board, open_stream=pieces, pause_seconds=12.5, advanced=lambda: None)
    assert paused == [12.5] * 3


async def test_who_waits_for_a_token_that_never_comes_is_let_in_at_the_end() -> None:
    async def pieces() -> AsyncGenerator[str, None]:
        yield "all"

    board = Board([Reader(), Reader(joins_at=24)], expected=40)
    await read_together(board, open_stream=pieces, pause_seconds=0.0, advanced=lambda: None)
    assert board.count(State.SERVED) == 2


@pytest.mark.parametrize(("encoding", "served"), [("utf-8", "█████✓"), ("ascii", "#####+")])
def test_a_terminal_gets_the_growing_answer_and_a_bar_for_each_reader(encoding: str, served: str) -> None:
    class Screen(Terminal):
        @property
        def encoding(self) -> str:
            return encoding

    screen = Screen()
    console = Console(file=screen, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"})
    board, tally = Board(make_audience(60, 1), expected=10), Tally()
    with view_of(console, "one shared stream", board, tally, keep=True):
        tally.sent()
        first, second, third, *_ = board.places
        for _ in range(5):
            board.got(first, "\x1b[31mab")
        first.state = State.READING
        board.ended(second, State.LEFT)
        board.ended(third, State.SERVED)
    shown = screen.getvalue()
    assert "\x1b[31mab" not in shown  # what servers send does not reach the terminal as it is
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    frame = text[text.rindex("one shared stream: 1 upstream request") :].splitlines()
    assert "[31mab [31mab" in frame[1]
    half = served[:2] + ("▌" if encoding == "utf-8" else "")
    assert frame[5].startswith(f"{half.ljust(6)} {'     ' + ('✗' if encoding == 'utf-8' else 'x')} {served} ")
    assert len(frame) <= 24
    assert all(len(line) <= 80 for line in frame)
    assert frame[-1].endswith("and 10 more")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=80, _environ={"TERM": "dumb"})
    with view_of(console, "one shared stream", Board([Reader()], expected=10), Tally(), keep=True):
        pass
    assert screen.getvalue().splitlines() == [
        "one shared stream: 1 reader",
        "one shared stream: served 0, left early 0, 0 upstream requests",
    ]


async def test_the_stand_in_streams_like_a_provider_and_keeps_its_books() -> None:
    transport = httpx2.ASGITransport(make_app(latency_seconds=0.0, price=2.0))
    question = {"model": "m", "messages": [{"role": "user", "content": "bond"}], "stream": True}
    async with httpx2.AsyncClient(transport=transport, base_url="http://provider") as client:
        assert (await client.post("/v1/chat/completions", json=question | {"stream_options": 3})).status_code == 400
        await client.post("/stats/reset")
        for more in ({}, {"stream_options": None}, {"stream_options": {"include_usage": True}}):
            response = await client.post("/v1/chat/completions", json=question | more)
            assert response.headers["content-type"].startswith("text/event-stream")
            *events, done = re.findall(r"data: (.*)\n\n", response.text)
            assert done == "[DONE]"
            chunks = [json.loads(each) for each in events]
            assert {each["object"] for each in chunks} == {"chat.completion.chunk"}
            choices = [each["choices"][0] for each in chunks if each["choices"]]
            assert "".join(choice["delta"].get("content", "") for choice in choices) == load_glossary()["bond"]
            assert [choice["finish_reason"] for choice in choices][-2:] == [None, "stop"]
            assert ("usage" in chunks[-1]) == bool(more.get("stream_options"))
        took = tokens("bond") + tokens(load_glossary()["bond"])
        assert chunks[-1]["usage"]["total_tokens"] == took
        stats = (await client.get("/stats")).json()
        assert stats == {"calls": 3, "tokens": 3 * took, "cost": 3 * took / 1000 * 2.0}


async def test_the_stand_in_bills_what_it_has_written_before_a_reader_left() -> None:
    app = make_app(latency_seconds=0.0, price=2.0)
    body = {"model": "m", "messages": [{"role": "user", "content": TERM}], "stream": True}
    asked, left = [json.dumps(body).encode()], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked:
            return {"type": "http.request", "body": asked.pop()}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message.get("body"):
            left.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b""}
    await app(scope | {"asgi": {"spec_version": "2.3"}}, receive, send)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://provider") as client:
        stats = (await client.get("/stats")).json()
    assert tokens(TERM) < stats["tokens"] < tokens(TERM) + tokens(ANSWER)


async def test_a_failing_reader_ends_the_run() -> None:
    async def pieces() -> AsyncGenerator[str, None]:
        yield "a"
        raise DemoError("no more")

    board = Board([Reader(), Reader(joins_at=5)], expected=3)
    with pytest.raises(DemoError, match="no more"):
        await read_together(board, open_stream=pieces, pause_seconds=0.0, advanced=lambda: None)

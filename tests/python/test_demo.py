"""``python -m llm_batch_coalesce demo``, from the command line and over real HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
from collections import Counter

import httpx2
import pytest
from demo_runs import COMPLETION, Terminal, assert_failed_in_one_line, environment, run_demo, serve, serving
from rich.console import Console

import llm_batch_coalesce
from llm_batch_coalesce.__main__ import main
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.progress import progress_on
from llm_batch_coalesce._demo.provider import make_app
from llm_batch_coalesce._demo.report import quantile
from llm_batch_coalesce._demo.stand_in import running_stand_in
from llm_batch_coalesce._demo.trace import make_trace
from llm_batch_coalesce._demo.upstream import Tally
from llm_batch_coalesce._demo.windows import Call, count_windows

USERS, REQUESTS = 40, 50
SMALL = ("--users", str(USERS), "--requests", str(REQUESTS))
TABLE_ROW = re.compile(
    r"^((?:threads|tasks)(?: \+ coalescer)?)[ |]+(\d+)[ |]+(\d+)[ |]+(\d+) \((\d+)%\) .*[ |]([^ |\n]+) *$", re.MULTILINE
)

NOTHING_IN_THREADS = """
import llm_batch_coalesce
class DoesNothing:
    def __init__(self, **_): pass
    def get_or_call(self, key, fn): return fn()
llm_batch_coalesce.BatchCoalescer = DoesNothing
"""
NOTHING_IN_TASKS = """
import llm_batch_coalesce
class DoesNothing:
    def __init__(self, **_): pass
    async def get_or_call(self, key, fn): return await fn()
llm_batch_coalesce.AsyncBatchCoalescer = DoesNothing
"""
NO_EXTRA = """
import sys
sys.modules["httpx2"] = None
"""


def asked_terms(**changes: int) -> set[str]:
    """Return the terms of the trace that the demo replays when run with ``SMALL``."""
    trace = make_trace(list(load_glossary()), **({"users": USERS, "requests": REQUESTS, "seed": 1} | changes))
    return {hover.term for hover in trace}


@pytest.fixture(scope="module")
def small_demo() -> subprocess.CompletedProcess[str]:
    """Run the demo once, on an output that is no terminal and knows ASCII only."""
    return run_demo(*SMALL, "--latency=0.02", "--ttl=60", PYTHONIOENCODING="ascii")


def test_the_demo_shows_that_each_term_is_asked_for_once(small_demo: subprocess.CompletedProcess[str]) -> None:
    assert (small_demo.returncode, small_demo.stderr) == (0, "")
    terms = len(asked_terms())
    rows = {run: numbers for run, *numbers in TABLE_ROW.findall(small_demo.stdout)}
    shared = [str(REQUESTS), str(terms), str(REQUESTS - terms), f"{(REQUESTS - terms) / REQUESTS * 100:.0f}"]
    assert list(rows) == ["threads", "threads + coalescer", "tasks", "tasks + coalescer"]
    for readers in ("threads", "tasks"):
        *numbers, cost = rows[readers]
        assert numbers == [str(REQUESTS), str(REQUESTS), "0", "0"]
        *numbers, shared_cost = rows[f"{readers} + coalescer"]
        assert numbers == shared
        assert 0.0 < float(shared_cost.removeprefix("$")) < float(cost.removeprefix("$"))
    assert f"{terms} (threads) and {terms} (tasks) pairs of term and 60 s TTL window" in small_demo.stdout


def test_output_that_is_no_terminal_gets_plain_lines_that_fit_it(small_demo: subprocess.CompletedProcess[str]) -> None:
    lines = [line.rstrip() for line in small_demo.stdout.splitlines()]
    assert small_demo.stdout.isascii()
    assert "\x1b" not in small_demo.stdout
    assert max(map(len, lines)) <= 80
    assert f"tasks               {44 * '#'} {REQUESTS}" in lines
    progress = [line for line in lines if line.startswith("[1/4] threads: ")]
    assert [line.split()[2] for line in progress] == ["50", "13", "25", "38", "50"]
    assert progress[-1] == "[1/4] threads: 50 answered, 50 upstream calls"


def test_the_bound_holds_when_outcomes_expire_during_the_run() -> None:
    demo = run_demo("--users=40", "--requests=40", "--latency=0.01", "--ttl=0.05")
    assert (demo.returncode, demo.stderr) == (0, "")


@pytest.mark.parametrize(
    ("prelude", "run"),
    [(NOTHING_IN_THREADS, "threads + coalescer"), (NOTHING_IN_TASKS, "tasks + coalescer")],
)
def test_a_coalescer_that_does_nothing_fails_the_demo(prelude: str, run: str) -> None:
    demo = run_demo("--users=40", "--requests=20", "--latency=0.02", "--ttl=60", prelude=prelude)
    calls, pairs = f"{run}: 20 upstream calls", f"{len(asked_terms(requests=20))} (term, TTL window) pairs"
    assert_failed_in_one_line(demo, calls, pairs, "let duplicate calls through")
    assert run in demo.stdout  # the table is there to be looked at


def test_a_real_server_is_asked_with_model_and_key_and_counted_by_the_client() -> None:
    with serving(200, json.dumps(COMPLETION).encode()) as server:
        demo = run_demo(
            *("--base-url", f"{server.url}/", "--model", "small[bold]", "--api-key-env", "DEMO_KEY", "--ttl", "60"),
            *SMALL,
            DEMO_KEY="secret",
        )
    assert (demo.returncode, demo.stderr) == (0, "")
    assert f"{server.url} (model small[bold])" in demo.stdout
    assert "secret" not in demo.stdout
    assert "No cost" in demo.stdout
    assert Counter(server.asked) == {("Bearer secret", "small[bold]"): 2 * REQUESTS + 2 * len(asked_terms())}
    rows = {run: numbers for run, *numbers in TABLE_ROW.findall(demo.stdout)}
    assert rows["tasks + coalescer"][1] == str(len(asked_terms()))
    assert rows["tasks + coalescer"][-1] == "n/a"  # the answers have no usage


def test_tokens_come_from_the_usage_field_of_a_real_server() -> None:
    usage = {"usage": {"prompt_tokens": 1500, "completion_tokens": 500, "total_tokens": 2000}}
    with serving(200, json.dumps(COMPLETION | usage).encode()) as server:
        demo = run_demo(*("--base-url", server.url, "--model", "m", "--price", "0.5"), "--users=20", "--requests=2")
    assert (demo.returncode, demo.stderr) == (0, "")
    assert next(row[-1] for row in TABLE_ROW.findall(demo.stdout)) == "$2.00"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (
            401,
            b'{"error": {"message": "Incorrect\\nkey\\u001b[31m"}}',
            ["401 Unauthorized (Incorrect key[31m)", "--api-key-env"],
        ),
        (429, b'{"error": {"message": "slow down"}}', ["HTTP 429 Too Many Requests (slow down)", "--requests"]),
        (500, b"<h1>oops</h1>", ["HTTP 500 Internal Server Error;", "server's log"]),
        (302, b"", ["HTTP 302 Found;", "--base-url"]),
        (200, b"<html>welcome</html>", ["no chat completion", "--base-url"]),
    ],
)
def test_a_server_that_gives_no_answer_is_named_in_one_line(status: int, body: bytes, said: list[str]) -> None:
    with serving(status, body) as server:
        demo = run_demo(*SMALL, "--base-url", server.url, "--model", "m")
    assert_failed_in_one_line(demo, f"{server.url}/chat/completions answered", *said)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"[]", b"[" * 100_000, b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'],
)
def test_an_answer_that_is_no_chat_completion_is_told_from_one(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(200, body) as server:
        assert main(["demo", *SMALL, "--base-url", server.url, "--model", "m"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "answered with something that is no chat completion" in line


def test_a_server_that_is_down_is_named_in_one_line() -> None:
    with socket.socket() as bound:  # and not listening: nobody else gets the port, and nobody answers
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        demo = run_demo(*SMALL, "--base-url", url, "--model", "m")
    assert_failed_in_one_line(demo, f"cannot connect to {url}/chat/completions", "check that the server is running")


def test_a_server_that_speaks_no_http_is_named_in_one_line() -> None:
    class Greeter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1)
            self.request.sendall(b"220 mail.example ESMTP\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server, serve(server):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        demo = run_demo(*SMALL, "--base-url", url, "--model", "m")
    assert_failed_in_one_line(demo, f"the exchange with {url}/chat/completions broke off")


@pytest.mark.parametrize("url", ["http://" + "a" * 70 + ".invalid/v1", "http://xn--\u00fc.invalid/v1"])
def test_a_host_name_that_cannot_exist_is_an_error_in_one_line(url: str) -> None:
    assert_failed_in_one_line(run_demo(*SMALL, "--base-url", url, "--model", "m"), "check", "--base-url")


def test_without_the_extra_the_demo_says_what_to_install() -> None:
    demo = run_demo(prelude=NO_EXTRA)
    assert demo.stdout == ""
    assert_failed_in_one_line(demo, 'the demo needs the optional extra: pip install "llm-batch-coalesce[demo]"')


@pytest.mark.parametrize("obstacle", ['sys.executable += "-missing"', 'os.environ["PYTHONHOME"] = "nowhere"'])
def test_a_stand_in_that_cannot_start_is_an_error_in_one_line(obstacle: str) -> None:
    demo = run_demo(prelude=f"import os, sys\n{obstacle}\n")
    assert_failed_in_one_line(demo, "the stand-in provider did not start")


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be sent Ctrl-C alone on Windows")
@pytest.mark.parametrize("runs_before", [0, 1, 2, 3])
def test_ctrl_c_ends_the_demo_with_one_line_whatever_is_in_flight(runs_before: int) -> None:
    small = ("--users=40", "--requests=20", "--ttl=60")
    calls = [20, len(asked_terms(requests=20)), 20]
    with (
        serving(200, json.dumps(COMPLETION).encode(), hold_after=sum(calls[:runs_before])) as server,
        subprocess.Popen(
            [*(sys.executable, "-m", "llm_batch_coalesce", "demo"), *small, "--base-url", server.url, "--model", "m"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment(),
        ) as demo,
    ):
        assert server.holding.wait(timeout=25)
        demo.send_signal(signal.SIGINT)
        output, errors = demo.communicate(timeout=25)
    assert (demo.returncode, errors) == (130, "interrupted before the demo had finished\n")
    assert f"[{runs_before + 1}/4]" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--users", value) for value in ("0", "-3", "501", "many")),
        *(("--requests", value) for value in ("0", "-1", "1.5")),
        *(("--latency", value) for value in ("-1", "nan", "inf", "soon")),
        *(("--ttl", value) for value in ("-0.5", "NaN")),
        *(("--price", value) for value in ("-1", "nan", "inf")),
        ("--seed", "x"),
        *(("--base-url", value) for value in ("localhost:80", "ftp://host", "http://", "http://h:99999", "http://a?b")),
        ("--base-url", "http://user:secret@host/v1"),
        ("--base-url", "http://host/v1"),  # which needs --model
        ("--model", "m"),  # which needs --base-url
        ("--api-key-env", "HOME"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", option, value])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert "--model" in errors if value == "http://host/v1" else f"argument {option}: " in errors
    assert "secret" not in errors


def test_a_key_that_is_not_there_or_no_key_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key in ("", " ", "k\u00e9y", "two\nlines"):
        monkeypatch.setenv("DEMO_KEY", key)
        with pytest.raises(SystemExit):
            main(["demo", "--base-url", "http://host/v1", "--model", "m", "--api-key-env", "DEMO_KEY"])
        line = capsys.readouterr().err.splitlines()[-1]
        assert "argument --api-key-env: " in line
        assert "DEMO_KEY" in line


def test_the_command_line_tells_its_version_and_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"llm-batch-coalesce {llm_batch_coalesce.__version__}\n"
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_the_trace_follows_from_its_seed() -> None:
    terms = list(load_glossary())
    trace = make_trace(terms, users=50, requests=400, seed=7)
    assert make_trace(terms, users=50, requests=400, seed=7) == trace
    assert make_trace(terms, users=50, requests=400, seed=8) != trace


def test_the_trace_is_in_order_of_time_with_popular_terms_and_equally_busy_users() -> None:
    trace = make_trace(list(load_glossary()), users=50, requests=420, seed=1)
    assert [hover.at_seconds for hover in trace] == sorted(hover.at_seconds for hover in trace)
    assert set(Counter(hover.user for hover in trace).values()) == {8, 9}
    by_popularity = [times for _, times in Counter(hover.term for hover in trace).most_common()]
    assert by_popularity[0] > 4 * by_popularity[9]


def test_the_glossary_holds_definitions_of_a_sentence_or_two() -> None:
    glossary = load_glossary()
    assert len(glossary) >= 60
    assert list(glossary) == sorted(glossary, key=str.lower)
    for definition in glossary.values():
        assert 1 <= len(re.findall(r"\.(?: |$)", definition)) <= 2


def test_windows_are_counted_from_completion_for_each_term() -> None:
    calls = [Call("bond", 0.0, 1.0), Call("bond", 6.0, 7.0), Call("beta", 0.5, 1.5), Call("bond", 12.0, 13.0)]
    assert count_windows(calls, ttl_seconds=5.0) == 4
    assert count_windows(reversed(calls), ttl_seconds=5.0) == 4
    assert count_windows(calls, ttl_seconds=float("inf")) == 2
    assert count_windows([], ttl_seconds=5.0) == 0


def test_a_call_within_a_window_opens_none() -> None:
    in_flight, retained, after = Call("bond", 0.9, 1.9), Call("bond", 5.9, 6.9), Call("bond", 6.0, 7.0)
    assert count_windows([Call("bond", 0.0, 1.0), in_flight], ttl_seconds=5.0) == 1
    assert count_windows([Call("bond", 0.0, 1.0), in_flight, retained, after], ttl_seconds=5.0) == 2
    # A coarse clock may close a window a tick early.
    assert count_windows([Call("bond", 0.0, 1.0), Call("bond", 5.99, 6.9)], ttl_seconds=5.0) == 2


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert quantile([3.0], 0.99) == 3.0


def test_a_terminal_gets_bars_with_the_calls_so_far() -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with progress_on(console, runs=1, requests=3) as progress:
        tally = Tally()
        answered = progress.begin("threads", tally)
        tally.sent()
        for _ in range(3):
            answered()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"threads .* 3/3 +1 calls", text)


def test_the_stand_in_answers_like_a_provider_and_keeps_its_books() -> None:
    async def talk() -> None:
        transport = httpx2.ASGITransport(make_app(latency_seconds=0.0, price=2.0))
        async with httpx2.AsyncClient(transport=transport, base_url="http://provider") as client:
            for body in (b"", b"[]", b"{}", b'{"model": "m", "messages": []}', b"[" * 100_000, b"\xff"):
                assert (await client.post("/v1/chat/completions", content=body)).status_code == 400
            question = {"model": "m", "messages": [{"role": "user", "content": "no such term"}]}
            refusal = await client.post("/v1/chat/completions", json=question)
            assert "no such term" in refusal.json()["error"]["message"]
            await client.post("/stats/reset")
            question["messages"] = [{"role": "user", "content": "bond"}]
            answer = (await client.post("/v1/chat/completions", json=question)).json()
            assert answer["choices"][0]["message"]["content"] == load_glossary()["bond"]
            tokens = answer["usage"]["total_tokens"]
            stats = (await client.get("/stats")).json()
            assert stats == {"calls": 1, "tokens": tokens, "cost": tokens / 1000 * 2.0}

    asyncio.run(talk())


def test_the_stand_in_ends_with_the_demo_however_that_ends() -> None:
    command = [sys.executable, "-m", "llm_batch_coalesce._demo.provider", "--latency=0", "--price=0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as provider:
        assert provider.stdin is not None
        assert provider.stdout is not None
        assert int(provider.stdout.readline()) > 0
        provider.stdin.close()
        assert provider.wait(timeout=25) == 0


def test_the_stand_in_that_has_gone_is_an_error_that_says_so() -> None:
    with running_stand_in(latency_seconds=0.0, price=0.0) as provider:
        assert provider.usage().calls == 0
    with pytest.raises(DemoError, match="does not answer"):
        provider.usage()

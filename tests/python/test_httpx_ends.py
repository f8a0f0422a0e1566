"""How shared responses end: marks of event streams, loops that end, processes that exit."""

import asyncio
import contextlib
import gc
import gzip
import socket
import subprocess
import sys
import types
import weakref

import httpx2
import pytest
from http_callers import Inner, Tasks, Threads, raised
from http_sdks import GROQ, OPENAI, warm
from loops import PATIENCE, wait_until
from provider import BREAK, HOLD, TEXT, Answer, Gate, sdk_answer

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, SharedCallError, _http_async, _http_sync
from llm_batch_coalesce._http_parts import EndMark, Head
from llm_batch_coalesce._http_sync import Cut
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport

EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.fixture(scope="module")
def running(running):
    warm(running)
    return running


# OpenAI's clients stop reading at the mark, and close the response before they have seen its end.


def mark_and_more(*more):
    return lambda seen: Answer([b"data: 1\n\n", b"data: [DONE]\n\n", *more], headers=EVENTS)


def slow_to_end(seen):
    answer = sdk_answer(seen)
    answer.parts.append(HOLD)
    return answer


@pytest.mark.parametrize("sdk", [OPENAI, GROQ], ids=lambda sdk: sdk.name)
def test_a_stream_of_threads_that_all_left_at_its_mark_is_whole(provider, sdk):
    def read():
        with sdk.ask(client, stream=True) as stream:
            return "".join(sdk.word(event) for event in stream)

    provider.script = slow_to_end
    transport = CoalescingTransport(coalescer=BatchCoalescer())
    with contextlib.closing(sdk.client(provider, transport)) as client:
        if sdk is GROQ:  # it reads on to the end
            provider.release()
        assert [read(), read()] == [TEXT] * 2
        provider.release()
        assert read() == TEXT
    assert len(provider.seen) == 1


async def test_a_stream_of_tasks_that_all_left_at_its_mark_is_whole(provider):
    async def read():
        async with await OPENAI.ask(client, stream=True) as stream:
            return "".join([OPENAI.word(event) async for event in stream])

    provider.script = slow_to_end
    transport = AsyncCoalescingTransport(coalescer=AsyncBatchCoalescer())
    async with OPENAI.async_client(provider, transport) as client:
        assert [await read(), await read()] == [TEXT] * 2
        provider.release()
        assert await read() == TEXT
    assert len(provider.seen) == 1


def test_what_comes_after_the_mark_is_replayed_too(callers, provider):
    provider.script = mark_and_more(HOLD, b": a comment\n\n")
    client = callers.client()
    first, second = (callers.open(client, provider.url).result(PATIENCE) for _ in range(2))
    assert callers.chunk(first).result(PATIENCE).startswith(b"data: 1")
    callers.leave(first).result(PATIENCE)
    rest = callers.start(second.read if isinstance(callers, Threads) else second.aread)
    provider.release()
    assert rest.result(PATIENCE) == b"data: 1\n\ndata: [DONE]\n\n: a comment\n\n"
    assert callers.ask(client, provider.url).content == rest.result()
    assert len(provider.seen) == 1


def test_a_stream_that_does_not_end_after_its_mark_is_ended(callers, provider, monkeypatch):
    """Else a request would be left behind for each."""
    monkeypatch.setattr(_http_sync, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(_http_async, "LINGER_SECONDS", 0.05)
    provider.script = mark_and_more(HOLD)
    client = callers.client()
    assert callers.ask(client, provider.url).content == b"data: 1\n\ndata: [DONE]\n\n"
    assert provider.seen[0].disconnected.wait(PATIENCE)
    assert callers.ask(client, provider.url).content == b"data: 1\n\ndata: [DONE]\n\n"
    assert len(provider.seen) == 1


def test_a_stream_that_breaks_off_after_its_mark_is_whole(callers, provider):
    provider.script = mark_and_more(HOLD, BREAK)
    client = callers.client()
    asked = callers.post(client, provider.url)
    provider.release()
    assert asked.result(PATIENCE).content == b"data: 1\n\ndata: [DONE]\n\n"
    assert callers.ask(client, provider.url).status_code == 200
    assert len(provider.seen) == 1


@pytest.mark.parametrize(
    ("chunks", "headers", "seen_at"),
    [
        ([b"data: 1\n\n", b"data: [DONE]\n\n"], {}, 1),
        ([b"data: 1\n\ndata: [DONE]\n\n"], {}, 0),
        ([b"data: [DONE]\n\n"], {}, 0),
        ([b"event: done\ndata:[DONE]\n\n"], {}, 0),
        ([b"x\r\n\r\ndata: [DO", b"NE]\r", b"\n\r", b"\n"], {}, 3),
        ([bytes([byte]) for byte in b"data: 1\n\ndata: [DONE]\n\n"], {}, 22),
        ([b"x" * 100_000, b"\n\ndata: [DONE]\n\n"], {}, 1),
        ([b"data: 1\n\ndata: [DONE]"], {}, None),
        ([b"data: [DONE]\n\ndata: more\n\n"], {}, None),
        ([b'data: {"text": "data: [DONE]"}\n\n'], {}, None),
        ([b"comment data: [DONE]\n\n"], {}, None),
        ([b"x" * 16 + b"data: [DONE]\n\n"], {}, None),
        ([b"data: [DONE]\n\n"], {"content-type": "application/json"}, None),
        ([b"data: [DONE]\n\n"], {"content-encoding": "gzip"}, None),
        ([gzip.compress(b"data: [DONE]\n\n")], {"content-encoding": "gzip"}, None),
    ],
)
def test_the_mark_is_known_by_its_bytes(chunks, headers, seen_at):
    raw = [(name.title().encode(), value.encode()) for name, value in (EVENTS | headers).items()]
    mark = EndMark(Head(200, tuple(raw), {}))
    noticed = [mark.comes_with(chunk) for chunk in chunks]
    assert noticed == [number == seen_at for number in range(len(chunks))]
    assert mark.seen == (seen_at is not None)


@pytest.mark.parametrize(
    ("version", "released", "cut"), [(b"HTTP/1.1", False, True), (b"HTTP/1.1", True, False), (b"HTTP/2", False, False)]
)
def test_only_the_connection_of_this_response_is_cut(version, released, cut):
    """Once it is released it may serve another request, and one of HTTP/2 serves others at the same time."""
    ours, peers = socket.socketpair()
    with ours, peers:
        stream = types.SimpleNamespace(get_extra_info=lambda name: {"socket": ours}[name])
        response = httpx2.Response(200, extensions={"network_stream": stream, "http_version": version})
        cutter = Cut(response)
        if released:
            cutter.release()
        peers.send(b"before")
        cutter.close()
        peers.setblocking(False)
        assert ours.recv(10) == b"before"
        with contextlib.nullcontext() if cut else pytest.raises(BlockingIOError):
            assert peers.recv(10) == b""
    Cut(httpx2.Response(200)).close()  # an inner transport may have no socket to tell of


# Several loops.


def test_tasks_of_several_loops_share_one_request(library, provider):
    provider.hold()
    with Tasks(library) as here, Tasks(library) as there:
        there.coalescer = here.coalescer
        asked = [each.post(client, provider.url) for each in (here, there) for client in [each.client()] * 3]
        provider.release()
        assert {each.result(PATIENCE).status_code for each in asked} == {200}
        assert there.ask(there.client(), provider.url).status_code == 200
    assert len(provider.seen) == 1


def test_when_the_loop_of_a_request_ends_before_its_head_others_send_it_anew(library):
    with Tasks(library) as there:
        inner = Inner(lambda request, number: library.Response(200, json={"number": number}), held=True)
        here = Tasks(library)
        here.coalescer = there.coalescer
        leader = here.post(here.client(inner))
        waiter = there.post(there.client(inner))
        here.thread.end()
        inner.release()
        assert leader.done()
        assert waiter.result(PATIENCE).json() == {"number": 2}


def test_when_the_loop_of_a_request_ends_in_mid_answer_others_get_an_error(library, provider):
    provider.script = lambda seen: Answer([b"one", HOLD], headers=EVENTS)
    with Tasks(library) as there:
        here = Tasks(library)
        here.coalescer = there.coalescer
        mine, other = (each.open(each.client(timeout=None), provider.url).result(PATIENCE) for each in (here, there))
        assert [here.chunk(mine).result(PATIENCE), there.chunk(other).result(PATIENCE)] == [b"one"] * 2
        rest = there.chunk(other)
        here.thread.end()
        assert type(raised(rest)) is SharedCallError
        assert provider.seen[0].disconnected.wait(PATIENCE)


def test_a_request_under_way_is_held_though_nobody_else_holds_its_task(library):
    class Forgotten(Inner):
        async def handle_async_request(self, request):
            future = asyncio.get_running_loop().create_future()
            self.future = weakref.ref(future)
            await future
            return library.Response(200, content=b"fine")

    inner = Forgotten(None)
    with Tasks(library) as callers:
        asked = callers.post(callers.client(inner))
        wait_until(lambda: hasattr(inner, "future"))
        callers.thread.do(gc.collect)
        future = inner.future()
        assert future is not None
        callers.thread.do(future.set_result, None)
        assert asked.result(PATIENCE).text == "fine"


def test_when_a_requests_task_is_cancelled_from_outside_its_leader_is_cancelled_and_others_send_it_anew(library):
    def cancel_the_pump():
        (pump,) = [task for task in asyncio.all_tasks() if "pump" in task.get_coro().__qualname__]
        pump.cancel()

    inner = Inner(lambda request, number: library.Response(200, json={"number": number}), held=True)
    with Tasks(library) as callers:
        client = callers.client(inner)
        leader, waiter = callers.post(client), callers.post(client)
        wait_until(lambda: len(inner.requests) == 1)
        callers.thread.do(cancel_the_pump)
        assert raised(leader) is None
        assert leader.cancelled()
        inner.release()
        assert waiter.result(PATIENCE).json() == {"number": 2}


@pytest.mark.parametrize("whole", [True, False])
def test_the_upstream_response_is_closed_when_it_has_ended_and_when_nobody_reads(callers, whole):
    class Stream(callers.library.SyncByteStream, callers.library.AsyncByteStream):
        closed = 0

        def __iter__(self):
            yield b"one"
            assert gate.wait(PATIENCE)
            yield b"two"

        async def __aiter__(self):
            yield b"one"
            await gate.passed()
            yield b"two"

        def close(self):
            Stream.closed += 1

        async def aclose(self):
            Stream.closed += 1

    gate = Gate()
    client = callers.client(Inner(lambda request, number: callers.library.Response(200, stream=Stream())))
    response = callers.open(client).result(PATIENCE)
    assert callers.chunk(response).result(PATIENCE) == b"one"
    assert Stream.closed == 0
    if whole:
        gate.open()
        assert callers.read(response) == [b"two"]
    else:
        callers.leave(response).result(PATIENCE)
        gate.open()
    wait_until(lambda: Stream.closed == 1)


# The process.


def test_a_process_with_requests_under_way_exits():
    program = """
import sys, threading, httpx2
from llm_batch_coalesce import BatchCoalescer
from llm_batch_coalesce.httpx import CoalescingTransport

begun = threading.Semaphore(0)

class Endless(httpx2.SyncByteStream):
    def __iter__(self):
        while True:
            yield b"more"

class Inner(httpx2.BaseTransport):
    def handle_request(self, request):
        begun.release()
        if request.url.path == "/silent":
            threading.Event().wait()
        return httpx2.Response(200, stream=Endless())

def read(path):
    with client.stream("POST", "http://provider.test" + path) as response:
        for _ in response.iter_raw():
            pass

client = httpx2.Client(transport=CoalescingTransport(Inner(), coalescer=BatchCoalescer()), timeout=None)
for path in ["/silent", "/one", "/two", "/one", "/silent"]:
    threading.Thread(target=read, args=(path,), daemon=True).start()
for _ in range(3):
    begun.acquire()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loop_that_ends_with_requests_under_way_is_quiet(provider, recwarn):
    async def main():
        transport = AsyncCoalescingTransport(coalescer=AsyncBatchCoalescer())
        client = httpx2.AsyncClient(transport=transport)
        tasks.extend(asyncio.create_task(client.post(provider.url)) for _ in range(3))
        await asyncio.to_thread(provider.wait_for, 1)

    tasks = []
    provider.hold()
    asyncio.run(main())
    assert all(task.cancelled() for task in tasks)
    assert provider.seen[0].disconnected.wait(PATIENCE)
    assert not recwarn.list


# Threads in odd places.


@pytest.mark.parametrize("timeout", [PATIENCE, None])
def test_a_thread_may_ask_though_an_event_loop_runs_in_it(library, timeout):
    inner = Inner(lambda request, number: library.Response(200, json=number))
    transport = CoalescingTransport(inner, coalescer=BatchCoalescer(ttl_seconds=0))

    async def ask():
        with library.Client(transport=transport, timeout=timeout) as client:
            return [client.post("http://provider.test", json={}).json() for _ in range(2)]

    assert asyncio.run(ask()) == [1, 2]


def test_a_thread_that_is_interrupted_before_it_has_sent_holds_nobody_up(library, monkeypatch):
    inner, coalescer = Inner(lambda request, number: library.Response(200, json=number)), BatchCoalescer()
    make_place = _http_sync.make_place

    def interrupted(*args):
        monkeypatch.setattr(_http_sync, "make_place", make_place)
        raise KeyboardInterrupt

    monkeypatch.setattr(_http_sync, "make_place", interrupted)
    with library.Client(transport=CoalescingTransport(inner, coalescer=coalescer), timeout=PATIENCE) as client:
        # Its frames live on in the traceback, as where people type.
        with pytest.raises(KeyboardInterrupt) as kept:
            client.post("http://provider.test", json={})
        assert client.post("http://provider.test", json={}).json() == 1
    assert kept.tb is not None

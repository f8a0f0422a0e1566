"""What comes while something is being cleaned up (a cancellation, an interrupt, a close) does not cut that short."""

import asyncio
import json
import signal
import sys
import threading
import types

import httpx
import pytest
import redis
import redis.asyncio
from fleets import HOST
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _redis_bounded
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer


class Closing:
    """Notes whether it was closed to the end."""

    def __init__(self):
        self.begun, self.may_end, self.ended = asyncio.Event(), asyncio.Event(), []

    async def aclose(self):
        self.begun.set()
        try:
            await self.may_end.wait()
            self.ended.append("whole")
        except asyncio.CancelledError:
            self.ended.append("cut")
            raise


@pytest.mark.parametrize("error", [None, httpx.ReadError("broken")], ids=["whole", "broken"])
async def test_a_response_that_is_over_is_closed_whole_though_its_last_reader_leaves_meanwhile(error):
    class Body(Closing, httpx.AsyncByteStream):
        async def __aiter__(self):
            yield b"a"
            if error is not None:
                raise error

    class Inner(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            return httpx.Response(200, stream=body)

    body = Body()
    transport = AsyncCoalescingTransport(Inner(), coalescer=AsyncBatchCoalescer())
    async with httpx.AsyncClient(transport=transport) as client:
        asked = asyncio.create_task(client.post("http://provider.test/", json={}))
        await body.begun.wait()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await let_run()
        body.may_end.set()
        await let_run()
    assert body.ended == ["whole"]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_transport_is_not_closed_before_a_request_that_is_about_to_begin(cancelled):
    seen = []

    class Inner(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            seen.append("request")
            return httpx.Response(200, json={})

        async def aclose(self):
            seen.append("closed")

    transport = AsyncCoalescingTransport(Inner(), coalescer=AsyncBatchCoalescer())
    leader, waiter = (httpx.AsyncClient(transport=transport) for _ in range(2))
    asked = [asyncio.create_task(client.post("http://provider.test/", json={})) for client in [leader, waiter]]
    closing = asyncio.create_task(leader.aclose())
    if cancelled:
        # After their first step, in which they make the task that sends, and before its first.
        asyncio.get_running_loop().call_soon(lambda: [task.cancel() for task in asked])
    results = await asyncio.gather(*asked, return_exceptions=True)
    await closing
    await let_run()
    if cancelled:
        assert seen in (["closed"], ["request", "closed"])
    else:
        assert [result.status_code for result in results] == [200, 200]
        assert seen == ["request", "closed"]


def test_a_transport_is_not_closed_between_the_claim_of_a_thread_and_its_request():
    seen = []

    class ClosedByAnother(BatchCoalescer):
        def _open(self, *args):
            reader = super()._open(*args)
            transport.close()
            return reader

    class Inner(httpx.BaseTransport):
        def handle_request(self, request):
            seen.append("request")
            return httpx.Response(200, json={})

        def close(self):
            seen.append("closed")

    transport = CoalescingTransport(Inner(), coalescer=ClosedByAnother())
    assert httpx.Client(transport=transport).post("http://provider.test/", json={}).status_code == 200
    wait_until(lambda: "closed" in seen)
    assert seen == ["request", "closed"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks start eagerly since Python 3.12")
async def test_a_pump_is_not_cancelled_within_its_own_step():
    """By an eager task that it makes there, so that it is not the current one."""
    may_go_on = asyncio.Event()

    class Upstream(Closing):
        number = 0

        def __aiter__(self):
            return self

        async def __anext__(self):
            self.number += 1
            if self.number == 2:
                await may_go_on.wait()
                asyncio.Task(reader.aclose(), loop=asyncio.get_running_loop(), eager_start=True)
            return self.number

    upstream = Upstream()
    reader = AsyncBatchCoalescer().stream("k", lambda: upstream)
    assert await anext(reader) == 1
    may_go_on.set()
    await upstream.begun.wait()
    await let_run()
    upstream.may_end.set()
    await let_run()
    assert upstream.ended == ["whole"]


async def test_an_upstream_that_comes_when_the_last_reader_leaves_is_closed():
    class Upstream(Closing):
        def __aiter__(self):
            return self

        async def __anext__(self):
            raise AssertionError("nobody reads")

    upstream, coming = Upstream(), asyncio.get_running_loop().create_future()
    upstream.may_end.set()
    asked = asyncio.Event()

    def fn():
        asked.set()
        return coming

    async def read():
        async for _ in AsyncBatchCoalescer().stream("k", fn):
            pass

    reader = asyncio.create_task(read())
    await asked.wait()
    await asyncio.sleep(0)
    reader.cancel()
    coming.set_result(upstream)
    await asyncio.gather(reader, return_exceptions=True)
    await let_run()
    assert upstream.ended == ["whole"]


@pytest.fixture
def interrupt_in():
    """Interrupt this thread once, when it enters the function of a name."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt_in(name):
        def traced(frame, event, arg):
            if frame.f_code.co_name == name:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)

        sys.settrace(traced)

    yield interrupt_in
    sys.settrace(None)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_thread_that_cancels_a_call_is_its_own_and_the_call_is_cancelled(interrupt_in):
    tasks, thread, held = AsyncBatchCoalescer(), LoopThread(), HeldCall()
    threads = tasks.as_sync()
    try:
        leads = thread.start(tasks.get_or_call("k", held))
        assert held.started.wait(PATIENCE)

        def leave():
            wait_until(lambda: tasks._waiters("k") == 1)
            leads.cancel()

        leaving = threading.Thread(target=leave)
        leaving.start()
        interrupt_in("cancel_call")
        with pytest.raises(KeyboardInterrupt):
            threads.get_or_call("k", lambda: None, timeout=3.0)
        leaving.join()
        assert held.cancelled.wait(PATIENCE)
        assert threads.get_or_call("other", lambda: 5) == 5
    finally:
        thread.end()


def test_an_interrupt_of_the_thread_that_closes_a_stream_is_its_own_and_the_pump_is_cancelled(interrupt_in):
    tasks, thread, cancelled = AsyncBatchCoalescer(), LoopThread(), threading.Event()

    async def upstream():
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def read():
        stream = tasks.stream("k", upstream)
        await anext(stream)
        joined.set()
        await asyncio.to_thread(may_leave.wait, PATIENCE)
        await stream.aclose()

    joined, may_leave = threading.Event(), threading.Event()
    try:
        leads = thread.start(read())
        assert joined.wait(PATIENCE)
        stream = tasks.as_sync().stream("k", lambda: None)
        assert next(stream) == 1
        may_leave.set()
        leads.result()
        interrupt_in("cancel_pump")
        with pytest.raises(KeyboardInterrupt):
            stream.close()
        assert cancelled.wait(PATIENCE)
    finally:
        thread.end()


def test_an_interrupt_while_a_value_is_serialized_frees_its_key(fleet):
    class Serializer:
        loads = staticmethod(json.loads)

        def dumps(self, value):
            if value == "first":
                raise KeyboardInterrupt
            return json.dumps(value)

    options = {"namespace": fleet.namespace, "lease_seconds": 600}
    with DistributedBatchCoalescer(fleet.client, serializer=Serializer(), **options) as coalescer:
        with pytest.raises(KeyboardInterrupt):
            coalescer.get_or_call("k", lambda: "first")
        assert fleet.names() == []
        assert coalescer.get_or_call("k", lambda: "second", timeout=PATIENCE) == "second"


async def test_closing_at_the_first_contact_cancels_nobody():
    asked = asyncio.Event()

    async def say_nothing(reader, writer):
        await reader.read(1)
        asked.set()
        await reader.read()
        writer.close()

    async def call():
        return 1

    server = await asyncio.start_server(say_nothing, HOST, 0)
    async with redis.asyncio.Redis(host=HOST, port=server.sockets[0].getsockname()[1]) as client:
        coalescer = AsyncDistributedBatchCoalescer(client, backend_timeout_seconds=PATIENCE)
        asks = [asyncio.create_task(coalescer.get_or_call("k", call)), asyncio.create_task(coalescer.peek("other"))]
        await asked.wait()
        await coalescer.close()
        assert await asyncio.gather(*asks) == [1, None]
    server.close()


async def test_a_close_that_is_cancelled_is_finished_all_the_same(fleet):
    async def call():
        return 1

    def connections():
        return {each["id"] for each in fleet.client.client_list()}

    async with redis.asyncio.Redis(**fleet.server.address) as client:
        await client.ping()
        before = connections()
        coalescer = AsyncDistributedBatchCoalescer(client, namespace=fleet.namespace)
        assert await coalescer.get_or_call("k", call) == 1
        closing = asyncio.create_task(coalescer.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await coalescer.close()
        await asyncio.to_thread(wait_until, lambda: connections() <= before)


def test_threads_for_commands_that_are_closed_early_serve_those_that_come_later(monkeypatch):
    may_begin = threading.Event()

    class Late(threading.Thread):
        def run(self):
            may_begin.wait()
            super().run()

    done = []
    with monkeypatch.context() as patch:
        patch.setattr(_redis_bounded, "threading", types.SimpleNamespace(Thread=Late, Lock=threading.Lock))
        bounded = _redis_bounded.Bounded(PATIENCE, 2)
        first = threading.Thread(target=lambda: done.append(bounded.run(lambda: 1)))
        first.start()
        wait_until(lambda: bounded._jobs.qsize() == 1)
        bounded.close()
    may_begin.set()
    first.join()
    assert [*done, bounded.run(lambda: 2)] == [1, 2]

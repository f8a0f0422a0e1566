"""HTTP clients of threads and of tasks behind one set of methods, so that one test speaks for both."""

import asyncio
import concurrent.futures
import contextlib

from loops import PATIENCE, LoopThread, wait_until
from provider import Gate

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport

URL = "http://provider.test/v1/answers"


def present(coalescer):
    """Return how many callers lead or wait."""
    return sum(flight.waiters + 1 for flight in coalescer.flights())


class Callers:
    """Callers that send through transports which share one coalescer. What they do is a future of the test's thread."""

    def __init__(self, library, **options):
        self.library = library
        self.coalescer = self.coalescer_kind(**options)
        self._clients = []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for client in self._clients:
            self.close_client(client).result(PATIENCE)

    def transport(self, inner=None, **options):
        return self.transport_kind(inner, **{"coalescer": self.coalescer} | options)

    def client(self, inner=None, *, transport=None, timeout=PATIENCE, **options):
        """Return a client with a transport of its own."""
        client = self.make_client(transport=transport or self.transport(inner, **options), timeout=timeout)
        self._clients.append(client)
        return client

    def post(self, client, url=URL, **options):
        """Start a request whose answer is read; returns when the caller leads or waits, or is done."""
        here = present(self.coalescer)
        options.setdefault("json", {"term": "alpha"})
        asked = self.start(client.post, url, **options)
        wait_until(lambda: asked.done() or present(self.coalescer) > here)
        return asked

    def ask(self, client, url=URL, **options):
        """Return the answer to a request."""
        return self.post(client, url, **options).result(PATIENCE)

    def open(self, client, url=URL, **options):
        """Start a request whose answer is read by `chunk`."""
        request = client.build_request("POST", url, **{"json": {"term": "alpha"}} | options)
        return self.start(client.send, request, stream=True)

    def read(self, response):
        """Return the rest of an answer's chunks."""
        found = []
        while (chunk := self.chunk(response).result(PATIENCE)) is not None:
            found.append(chunk)
        return found


class Threads(Callers):
    coalescer_kind = BatchCoalescer
    transport_kind = CoalescingTransport

    def __init__(self, library, **options):
        super().__init__(library, **options)
        self._pool = concurrent.futures.ThreadPoolExecutor(64)

    def __exit__(self, *exc_info):
        super().__exit__()
        self._pool.shutdown()

    def make_client(self, **options):
        return self.library.Client(**options)

    def start(self, function, *args, **options):
        return self._pool.submit(function, *args, **options)

    def chunk(self, response):
        if not hasattr(response, "test_reading"):
            response.test_reading = response.iter_raw()
        return self._pool.submit(next, response.test_reading, None)

    def leave(self, response):
        return self._pool.submit(response.close)

    def close_client(self, client):
        return self._pool.submit(client.close)


class Tasks(Callers):
    coalescer_kind = AsyncBatchCoalescer
    transport_kind = AsyncCoalescingTransport

    def __init__(self, library, **options):
        super().__init__(library, **options)
        self.thread = LoopThread()

    def __exit__(self, *exc_info):
        super().__exit__()
        self.thread.end()

    def make_client(self, **options):
        return self.library.AsyncClient(**options)

    def start(self, function, *args, **options):
        return asyncio.run_coroutine_threadsafe(function(*args, **options), self.thread.loop)

    def chunk(self, response):
        async def read():
            if not hasattr(response, "test_reading"):
                response.test_reading = response.aiter_raw()
            return await anext(response.test_reading, None)

        return self.start(read)

    def leave(self, response):
        async def leave():
            if hasattr(response, "test_reading"):
                await response.test_reading.aclose()
            await response.aclose()

        return self.start(leave)

    def close_client(self, client):
        return self.start(client.aclose)


class Inner:
    """An inner transport of either kind that does what a function of the request and its number says.

    With `held`, requests wait for `release` first. It counts them, and knows whether it was entered and closed.
    """

    def __init__(self, script, *, held=False):
        self.script = script
        self.requests = []
        self.entered = self.closed = 0
        self._gate = Gate()
        if not held:
            self._gate.open()

    def release(self):
        self._gate.open()

    def handle_request(self, request):
        self.requests.append(request)
        number = len(self.requests)
        assert self._gate.wait(PATIENCE)
        return self.script(request, number)

    async def handle_async_request(self, request):
        self.requests.append(request)
        number = len(self.requests)
        await self._gate.passed()
        return self.script(request, number)

    def close(self):
        self.closed += 1

    async def aclose(self):
        self.closed += 1

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *exc_info):
        self.close()

    async def __aenter__(self):
        return self.__enter__()

    async def __aexit__(self, *exc_info):
        self.close()


def raised(asked):
    """Return what a caller raised."""
    with contextlib.suppress(concurrent.futures.CancelledError):
        return asked.exception(PATIENCE)

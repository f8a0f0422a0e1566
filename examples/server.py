"""A server in front of a paid model: its tenants' concurrent clients share calls, each tenant its own.

    python examples/server.py
    curl -H 'X-API-Key: key-of-acme' 'http://127.0.0.1:8000/plain?prompt=What+is+a+bond'
    curl -H 'X-API-Key: key-of-acme' -N 'http://127.0.0.1:8000/stream?prompt=What+is+a+bond'
    curl -H 'X-API-Key: key-of-acme' -d '{"texts": ["bond", "beta"]}' http://127.0.0.1:8000/embeddings
    curl http://127.0.0.1:8000/stats

It needs `pip install starlette uvicorn`. FastAPI is made of Starlette, and its routes do the same.
"""

import argparse
import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict

import uvicorn
from anyio.to_thread import current_default_thread_limiter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from llm_batch_coalesce import BatchCoalescer, request_key

TENANTS = {"key-of-acme": "acme", "key-of-globex": "globex"}


class Provider:
    """Stands in for the provider's SDK, and counts what would be paid for."""

    def __init__(self) -> None:
        """Start at zero."""
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def complete(self, prompt: str) -> str:
        """Answer a thread."""
        self.count("completions")
        time.sleep(0.5)
        return f"An answer to {prompt!r}."

    async def acomplete(self, prompt: str) -> str:
        """Answer a task."""
        self.count("completions")
        await asyncio.sleep(0.5)
        return f"An answer to {prompt!r}."

    async def stream(self, prompt: str) -> AsyncGenerator[str, None]:
        """Answer a task, word by word."""
        self.count("streams")
        for word in f"An answer to {prompt!r}.".split():
            await asyncio.sleep(0.1)
            yield f"{word} "

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """Embed many texts in one call."""
        self.count("embedding calls")
        self.count("embedded texts", len(texts))
        await asyncio.sleep(0.5)
        return [[float(len(text)), float(text.count(" "))] for text in texts]

    def count(self, what: str, number: int = 1) -> None:
        """Count a call."""
        with self._lock:
            self.calls[what] += number


def tenant_of(request: Request) -> str:
    """Tell whose request it is: nobody is served an answer that was made for another tenant."""
    try:
        return TENANTS[request.headers.get("X-API-Key", "")]
    except KeyError:
        raise HTTPException(401, "X-API-Key is missing or unknown") from None


def key_of(tenant: str, **asked: str) -> str:
    """Make the key of a call: all that the answer depends on, and whose it is."""
    return request_key({"model": "small", **asked}, scope=tenant)


async def events(pieces: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """Write server-sent events; a client that hangs up leaves the shared stream, and the last one closes it."""
    async with aclosing(pieces):
        async for piece in pieces:
            yield f"data: {json.dumps(piece)}\n\n"
    yield "data: [DONE]\n\n"


def make_app(provider: Provider) -> Starlette:
    """Return the server as an ASGI application."""
    # Two faces of one coalescer: a thread and a task that ask for the same thing share one call, too.
    threads = BatchCoalescer(ttl_seconds=5.0, error_ttl_seconds=0.0, max_flight_seconds=60.0, name="model")
    tasks = threads.as_async()

    def plain(request: Request) -> JSONResponse:
        # Not async, so Starlette runs it in a thread of its pool, and waiters may block there.
        prompt = request.query_params["prompt"]
        answer = threads.get_or_call(key_of(tenant_of(request), prompt=prompt), lambda: provider.complete(prompt))
        return JSONResponse({"answer": answer})

    async def asynchronous(request: Request) -> JSONResponse:
        prompt = request.query_params["prompt"]
        answer = await tasks.get_or_call(key_of(tenant_of(request), prompt=prompt), lambda: provider.acomplete(prompt))
        return JSONResponse({"answer": answer})

    async def stream(request: Request) -> StreamingResponse:
        prompt = request.query_params["prompt"]
        pieces = tasks.stream(key_of(tenant_of(request), prompt=prompt), lambda: provider.stream(prompt))
        return StreamingResponse(events(pieces), media_type="text/event-stream")

    async def embeddings(request: Request) -> JSONResponse:
        # A key for each text: clients share the texts that they have in common, however these are batched.
        tenant, texts = tenant_of(request), (await request.json())["texts"]
        keys = {key_of(tenant, text=text): text for text in texts}
        vectors = await tasks.get_or_call_many(keys, lambda led: provider.embed([keys[key] for key in led]))
        return JSONResponse({"embeddings": [vectors[key_of(tenant, text=text)] for text in texts]})

    async def stats(_: Request) -> JSONResponse:
        counts = threads.stats()
        shared = {**asdict(counts), "saved_ratio": counts.saved_ratio}
        return JSONResponse({"provider": dict(provider.calls), "coalescer": shared})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # A waiter of a plain endpoint keeps its thread, of which Starlette has 40 unless told otherwise.
        current_default_thread_limiter().total_tokens = 200
        yield

    app = Starlette(lifespan=lifespan)
    for path, endpoint in (("/plain", plain), ("/async", asynchronous), ("/stream", stream), ("/stats", stats)):
        app.add_route(path, endpoint)
    app.add_route("/embeddings", embeddings, methods=["POST"])
    app.state.coalescer = threads
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server whose clients share calls.")
    parser.add_argument("--port", type=int, default=8000)
    uvicorn.run(make_app(Provider()), port=parser.parse_args().port)

"""Read by mypy, never run: the clients of both libraries take the transports."""

import httpx
import httpx2

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce.httpx import IGNORED_HEADERS, AsyncCoalescingTransport, CoalescingTransport

threads = CoalescingTransport(coalescer=BatchCoalescer())
tasks = AsyncCoalescingTransport(coalescer=AsyncBatchCoalescer())
httpx2.Client(transport=threads)
httpx.Client(transport=threads)
httpx2.AsyncClient(transport=tasks)
httpx.AsyncClient(transport=tasks)
httpx2.Client(transport=tasks)  # type: ignore[arg-type]

CoalescingTransport(httpx2.HTTPTransport(), coalescer=BatchCoalescer(), scope=lambda request: str(request.url))
AsyncCoalescingTransport(
    httpx.AsyncHTTPTransport(),
    coalescer=AsyncBatchCoalescer(),
    scope="tenant 7",
    methods=["POST"],
    paths=["*/embeddings"],
    ignored_headers=(*IGNORED_HEADERS, "x-mine"),
)
CoalescingTransport(coalescer=AsyncBatchCoalescer())  # type: ignore[arg-type]

"""Read by mypy, never run: what callers get is what their callables return."""

from collections.abc import Awaitable
from typing import assert_type

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, CoalesceError, RecursiveCallError


def threads(coalescer: BatchCoalescer) -> None:
    assert_type(coalescer.get_or_call("k", lambda: 1), int)
    assert_type(coalescer.get_or_call(key=("k", 1), fn=lambda: "text"), str)
    assert_type(coalescer.get_or_call(None, lambda: None), None)
    assert_type(len(coalescer), int)
    assert_type("k" in coalescer, bool)
    coalescer.get_or_call([], lambda: 1)  # type: ignore[arg-type]
    coalescer.get_or_call("k", 5)  # type: ignore[arg-type]
    BatchCoalescer(ttl_seconds="5")  # type: ignore[arg-type]


async def tasks(coalescer: AsyncBatchCoalescer, pending: Awaitable[bytes]) -> None:
    async def vector() -> list[float]:
        return [0.5]

    assert_type(await coalescer.get_or_call("k", vector), list[float])
    assert_type(await coalescer.get_or_call(key="k", fn=lambda: pending), bytes)
    await coalescer.get_or_call("k", lambda: 1)  # type: ignore[arg-type, return-value]


def errors(error: RecursiveCallError) -> tuple[CoalesceError, RuntimeError]:
    return error, error

"""Read by mypy, never run: what callers get is what their callables return."""

from collections.abc import Awaitable
from typing import assert_type

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, CoalesceError, RecursiveCallError, Retain


def either() -> str | Retain[str]:
    return Retain("text", ttl_seconds=1.0)


def threads(coalescer: BatchCoalescer) -> None:
    assert_type(coalescer.get_or_call("k", lambda: 1), int)
    assert_type(coalescer.get_or_call(key=("k", 1), fn=lambda: "text"), str)
    assert_type(coalescer.get_or_call(None, lambda: None), None)
    assert_type(coalescer.get_or_call("k", lambda: Retain("text", 1.0)), str)
    assert_type(coalescer.get_or_call("k", either), str)
    assert_type(coalescer.outcome("k", lambda: 1).value, int)
    assert_type(coalescer.outcome("k", either, timeout=1.0, ttl_seconds=2).value, str)
    assert_type(len(coalescer), int)
    assert_type("k" in coalescer, bool)
    coalescer.get_or_call([], lambda: 1)  # type: ignore[call-overload]
    coalescer.get_or_call("k", 5)  # type: ignore[call-overload]
    BatchCoalescer(ttl_seconds="5")  # type: ignore[arg-type]


async def tasks(coalescer: AsyncBatchCoalescer, pending: Awaitable[bytes]) -> None:
    async def vector() -> list[float]:
        return [0.5]

    async def retained() -> Retain[str]:
        return Retain("text", 1.0)

    assert_type(await coalescer.get_or_call("k", vector), list[float])
    assert_type(await coalescer.get_or_call("k", retained), str)
    assert_type((await coalescer.outcome("k", vector)).value, list[float])
    assert_type(coalescer.as_sync().as_async(), AsyncBatchCoalescer)
    assert_type(await coalescer.get_or_call(key="k", fn=lambda: pending), bytes)
    await coalescer.get_or_call("k", lambda: 1)  # type: ignore[arg-type, return-value]


def errors(error: RecursiveCallError) -> tuple[CoalesceError, RuntimeError]:
    return error, error

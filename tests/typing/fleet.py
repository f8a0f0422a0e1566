"""Read by mypy, never run: the classes of a fleet are typed as those of one process."""

from typing import assert_type

import redis
import redis.asyncio

from llm_batch_coalesce import Outcome, Retain
from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer

threads = DistributedBatchCoalescer(redis.Redis())
tasks = AsyncDistributedBatchCoalescer(redis.asyncio.Redis(), on_abandoned="finish")
AsyncDistributedBatchCoalescer(redis.asyncio.Redis(), on_abandoned="nonsense")  # type: ignore[arg-type]


def short() -> Retain[str]:
    return Retain("", 1.0)


def either() -> str | Retain[str]:
    return short()


async def short_async() -> Retain[str]:
    return Retain("", 1.0)


@threads.coalesced()
def define(term: str) -> int:
    return len(term)


@tasks.coalesced(key=lambda term: term.lower())
async def define_async(term: str) -> bytes:
    return term.encode()


async def use() -> None:
    assert_type(threads.get_or_call("k", lambda: 5), int)
    assert_type(threads.get_or_call("k", short), str)
    assert_type(threads.get_or_call("k", either), str)
    assert_type(threads.outcome("k", short), Outcome[str])
    assert_type(threads.forget("k"), bool)
    assert_type(await tasks.get_or_call("k", short_async), str)
    assert_type(await tasks.outcome("k", short_async), Outcome[str])
    assert_type(await tasks.forget("k"), bool)
    assert_type(define("term"), int)
    assert_type(await define_async("term"), bytes)
    define(5)  # type: ignore[arg-type]

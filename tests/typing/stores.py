"""Read by mypy, never run: whatever is like a mapping, or has `get` and `set`, is a store; batches may be `Retain`."""

from collections.abc import MutableMapping
from typing import assert_type

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, Retain


class Ttl:
    def get(self, key: str) -> int | None:
        raise NotImplementedError

    def set(self, key: str, value: int, ttl_seconds: float) -> None:
        raise NotImplementedError


class Async:
    async def get(self, key: str) -> int | None:
        raise NotImplementedError

    async def set(self, key: str, value: int, ttl_seconds: float) -> None:
        raise NotImplementedError


def use(mapping: MutableMapping[str, str], plain: dict[str, str]) -> None:
    BatchCoalescer(store=mapping)
    BatchCoalescer(store=plain)
    BatchCoalescer(store=Ttl())
    AsyncBatchCoalescer(store=mapping)
    AsyncBatchCoalescer(store=Async())
    BatchCoalescer(store=5)  # type: ignore[arg-type]


def batch(missing: list[str]) -> list[Retain[int]]:
    return [Retain(len(key), 1.0) for key in missing]


async def batch_async(missing: list[str]) -> dict[str, Retain[int]]:
    return {key: Retain(len(key), 1.0) for key in missing}


async def use_batches() -> None:
    assert_type(BatchCoalescer().get_or_call_many(["k"], batch), dict[str, int])
    assert_type(BatchCoalescer().get_or_call_many(["k"], lambda missing: [5 for _ in missing]), dict[str, int])
    assert_type(await AsyncBatchCoalescer().get_or_call_many(["k"], batch_async), dict[str, int])

"""Cache warming: filling keys ahead of their callers, through ordinary flights."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llm_batch_coalesce import _core
from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from llm_batch_coalesce._async import AsyncBatchCoalescer
    from llm_batch_coalesce._sync import BatchCoalescer

K = TypeVar("K", bound="Hashable")


def check(items: object, concurrency: object, progress: object) -> None:
    """Check the arguments of `warm()`.

    Raises:
        TypeError: If one has the wrong type.
        ValueError: If `concurrency` is below 1.
    """
    if not isinstance(items, Mapping):
        raise TypeError(f"items must be a mapping of keys to callables, not {shown(items)}")
    for key, fn in items.items():
        if not callable(fn):
            raise TypeError(f"items[{shown(key)}] must be callable, not {shown(fn)}")
    if not isinstance(concurrency, int) or isinstance(concurrency, bool):
        raise TypeError(f"concurrency must be an int, not {shown(concurrency)}")
    if concurrency < 1:
        raise ValueError(f"concurrency must be 1 or more, not {concurrency}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, not {shown(progress)}")


def in_threads(
    coalescer: BatchCoalescer,
    items: Mapping[K, Callable[[], Any]],
    concurrency: int,
    progress: Callable[[int, int], object],
    ttl_seconds: float | None,
) -> dict[K, Exception]:
    """Fill keys with so many threads at once; returns what failed."""
    failed: dict[K, Exception] = {}
    pool = concurrent.futures.ThreadPoolExecutor(concurrency, thread_name_prefix="coalesce-warm")
    # A call that warms is what the calls of its pool are part of.
    context = contextvars.copy_context()
    context.run(_core._carry_calls)  # noqa: SLF001 - this is a part of it
    try:
        calls = {
            pool.submit(context.copy().run, partial(coalescer.get_or_call, key, fn, ttl_seconds=ttl_seconds)): key
            for key, fn in items.items()
        }
        for done, call in enumerate(concurrent.futures.as_completed(calls), 1):
            try:
                call.result()
            except Exception as error:  # noqa: BLE001 - it is the user's, and reported
                failed[calls[call]] = error
            progress(done, len(calls))
    finally:
        # What has not begun when this is interrupted does not begin any more.
        pool.shutdown(cancel_futures=True)
    return {key: failed[key] for key in items if key in failed}


async def in_tasks(
    coalescer: AsyncBatchCoalescer,
    items: Mapping[K, Callable[[], Awaitable[Any]]],
    concurrency: int,
    progress: Callable[[int, int], object],
    ttl_seconds: float | None,
) -> dict[K, Exception]:
    """Fill keys with so many tasks at once; returns what failed."""
    failed: dict[K, Exception] = {}
    todo = iter(list(items.items()))
    done = 0

    async def work() -> None:
        nonlocal done
        for key, fn in todo:
            try:
                await coalescer.get_or_call(key, fn, ttl_seconds=ttl_seconds)
            except asyncio.CancelledError as error:
                worker = asyncio.current_task()
                if worker is None or worker.cancelling():
                    raise
                # It was the key that was cancelled.
                failed[key] = concurrent.futures.CancelledError(*error.args)
            except Exception as error:  # noqa: BLE001 - as above
                failed[key] = error
            done += 1
            progress(done, len(items))

    workers = [asyncio.ensure_future(work()) for _ in range(min(concurrency, len(items)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
    return {key: failed[key] for key in items if key in failed}

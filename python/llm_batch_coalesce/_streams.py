"""Where the items of shared streams come from: upstreams that a task pumps, or that threads pull."""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from inspect import isawaitable
from typing import Any

from llm_batch_coalesce._core import StreamSource
from llm_batch_coalesce._errors import CallResultError, SharedCallError, StreamLagError
from llm_batch_coalesce._reports import in_coalescer, logger
from llm_batch_coalesce._shown import shown

# What the log of a stream holds at most, by default: more tokens than any answer has.
MAX_BUFFERED = 65_536
# After so many items the pump lets others run, if upstream does not do so by itself.
_PACE = 16


async def pump(
    source: StreamSource, fn: Callable[[], AsyncIterator[Any] | Awaitable[AsyncIterator[Any]]], max_buffered: int | None
) -> BaseException | None:
    """Hand the items of an upstream to its readers, and close it when there are none any more."""
    # Readers that keep up must get their turn before the log has moved on without them.
    pace = _PACE if max_buffered is None else max(1, min(_PACE, max_buffered // 2))
    upstream: Any = None
    finished = False
    try:
        source.enter()
        upstream = fn()
        if isawaitable(upstream):
            upstream = await upstream
        if not hasattr(type(upstream), "__aiter__"):
            msg = f"fn must return an async iterator, not {shown(upstream)}; use BatchCoalescer for plain iterators"
            raise CallResultError(msg)  # noqa: TRY301 - it is shared like any error of the call
        number = 0
        async for item in upstream:
            if not source.append(item):
                return None
            if number % pace == 0:
                await asyncio.sleep(0)
            number += 1
        finished = True
        source.finish()
    except asyncio.CancelledError as error:
        source.break_off(error)
        raise
    except BaseException as error:
        if not source.fail(error) and not isinstance(error, Exception):
            raise
        return error
    finally:
        if not finished:
            await _close(upstream)
    return None


async def _close(upstream: Any) -> None:  # noqa: ANN401 - whatever `fn` has returned
    if asyncio.isfuture(upstream) and upstream.done() and not upstream.cancelled() and not upstream.exception():
        # The pump was cancelled when it was about to have it.
        upstream = upstream.result()
    close = getattr(upstream, "aclose", None) or getattr(upstream, "close", None)
    if close is None:
        return
    try:
        closing = close()
        if isawaitable(closing):
            await closing
    except Exception:  # noqa: BLE001 - it is the user's, and nobody waits for it
        logger.exception("closing the upstream of a stream failed: %s", shown(upstream))


def iterate(fn: Callable[[], Any]) -> tuple[Iterator[Any], Any]:
    """Begin an upstream for threads: its iterator, and what that iterates over."""
    try:
        upstream = fn()
        if hasattr(type(upstream), "__iter__") or hasattr(type(upstream), "__getitem__"):
            return iter(upstream), upstream
    except StopIteration as error:
        # As in generators: it would read as the end.
        raise RuntimeError("fn raised StopIteration") from error
    if asyncio.iscoroutine(upstream):
        upstream.close()
    raise CallResultError(f"fn must return an iterator, not {shown(upstream)}; use AsyncBatchCoalescer for async ones")


def close_both(iterator: Any, iterated: Any) -> None:  # noqa: ANN401 - whatever `fn` has returned
    """Close an iterator as generators are closed, and what it iterates over; some have nothing to close."""
    try:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
    finally:
        close = getattr(iterated, "close", None)
        if close is not None:
            close()


async def pull_in_thread(pull: Callable[[Any], None], fn: Callable[[], Any]) -> None:
    """Run a task's pull in a thread of its own: those of a pool may all be readers that wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[BaseException | None] = loop.create_future()
    context = contextvars.copy_context()

    def tell(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            context.run(pull, fn)
        except BaseException as raised:  # noqa: BLE001 - it is for the task
            error = raised
        # A loop that was closed meanwhile has nobody to tell.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=run, name="coalesce-pull", daemon=True).start()
    error = await done
    if error is not None:
        try:
            raise error
        finally:
            # The error's traceback holds this frame.
            del error, done


def lost_stream_error(key: Hashable, name: str | None) -> SharedCallError:
    """Make the error of a reader whose stream ended without an end, since its event loop or its process is gone."""
    return SharedCallError("LostStream", f"the source of the stream of {shown(key)}{in_coalescer(name)} is gone")


def stream_lag_error(key: Hashable, name: str | None, missed: int) -> StreamLagError:
    """Make the error of a reader that is too far behind."""
    return StreamLagError(
        f"this reader of the stream of {shown(key)}{in_coalescer(name)} is too far behind: "
        f"{missed} items have left the log",
        missed,
    )

"""Shared responses for tasks: the task that pumps one, and the places of those that read it."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Self

from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._http_parts import LINGER_SECONDS, EndMark, GaveUp, Head, Place, make_place, upstream_request


class TaskPlace(Place):
    """The place of a caller that waits in a task."""

    KIND: ClassVar[str] = "AsyncByteStream"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            found = await self._await_item()
        except BaseException:
            self.leave()
            raise
        if not isinstance(found, bytes):
            self.leave()
            raise StopAsyncIteration
        return found

    async def aclose(self) -> None:
        """Leave the response."""
        self.leave()

    async def head(self, began: float, until: float | None) -> Head | None:
        """Return the response's head; None if it is to be asked for anew.

        Args:
            began: When the caller began to wait.
            until: When its patience ends.
        """
        found = await self._await_item(until)
        if isinstance(found, Head):
            return found
        if isinstance(found, GaveUp):
            try:
                await self._await_item()
            except Exception:
                if self._reader.leads:
                    raise
            # That was the end: from here on nobody can find this stream any more.
            self.check_timeout(found, time.monotonic() - began)
        return None

    async def _await_item(self, until: float | None = None) -> Any:  # noqa: ANN401 - an item, or "end" or "again"
        while True:
            found = self.next_found()
            if not isinstance(found, str) or found != "wait":
                return found
            until = until or self.until()
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            if not self._reader.wait_with(loop, future):
                continue
            if until is None:
                await future
                continue
            try:
                async with asyncio.timeout(max(until - time.monotonic(), 0.0)):
                    await future
            except TimeoutError:
                raise self.read_timeout() from None


class AsyncInnerTransport:
    """A transport that requests are sent through, with the requests under way.

    It is closed when they are done: other clients may wait for them than the one that closes it.
    """

    __slots__ = ("_close", "_closing", "_lock", "_pumps", "transport")

    def __init__(self, transport: Any) -> None:  # noqa: ANN401 - of either library
        self.transport = transport
        # Loops of several threads may use it.
        self._lock = threading.Lock()
        self._pumps = 0
        self._close: Callable[[], Awaitable[object]] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self, loop: asyncio.AbstractEventLoop, request: Any, library: Any, source: Any) -> asyncio.Task[Any]:  # noqa: ANN401
        """Send a request and feed its response to a shared stream, in a task."""
        begun = False

        async def pump() -> None:
            nonlocal begun
            begun = True
            try:
                await self._feed(request, library, source)
            finally:
                close = self._end_pump()
                if close is not None:
                    await close()

        def done(_: object) -> None:
            # It may have been cancelled before it began.
            close = None if begun else self._end_pump()
            if close is not None:
                self._closing = loop.create_task(_run(close))

        # From now on, since others may close the transport before the task begins.
        with self._lock:
            self._pumps += 1
        task = loop.create_task(pump())
        task.add_done_callback(done)
        return task

    async def _feed(self, request: Any, library: Any, source: Any) -> None:  # noqa: ANN401
        head = None
        try:
            source.enter()
            response = await self.transport.handle_async_request(request)
            try:
                head = Head.of(response)
                if not source.append(head):
                    return
                if not await _feed(source, response, EndMark(head)):
                    return
            finally:
                source.ends()
                await response.aclose()
            source.finish(head.ttl_seconds)
        except asyncio.CancelledError as error:
            # The last reader has left, or the loop ends.
            source.break_off(error)
            raise
        except library.TimeoutException as error:
            if head is None:
                # It is the leader's own timeout, and concerns nobody else.
                source.append(GaveUp(type(error).__name__))
                source.break_off(error)
            else:
                source.fail(error, 0.0)
        except BaseException as error:
            if not source.fail(error, 0.0) and not isinstance(error, Exception):
                raise

    def _end_pump(self) -> Callable[[], Awaitable[object]] | None:
        """Count a request as done; return what closes the transport, if it was the last one that this waited for."""
        with self._lock:
            self._pumps -= 1
            if self._pumps:
                return None
            close, self._close = self._close, None
            return close

    async def close(self, close: Callable[[], Awaitable[object]]) -> None:
        """Have the transport closed by the coroutine function `close`, now or when all requests are done."""
        with self._lock:
            if self._pumps:
                self._close = close
                return
        await close()


async def _run(close: Callable[[], Awaitable[object]]) -> None:
    await close()


async def _feed(source: Any, response: Any, mark: EndMark) -> bool:  # noqa: ANN401
    """Feed a response's body to a shared stream. False if nobody reads it any more."""
    try:
        async with asyncio.timeout(None) as limit:
            async for chunk in response.stream:
                if mark.comes_with(chunk):
                    source.see_through()
                    limit.reschedule(asyncio.get_running_loop().time() + LINGER_SECONDS)
                if not source.append(bytes(chunk)):
                    return False
    except Exception:
        if not mark.seen:
            raise
    return True


async def share(
    coalescer: AsyncBatchCoalescer,
    key: Any,  # noqa: ANN401 - any hashable
    inner: AsyncInnerTransport,
    request: Any,  # noqa: ANN401 - of either library
    library: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Return a response of the caller's own, from the request under way or retained, or from sending it.

    Raises:
        Exception: What sending the request raised, or the library's `ReadTimeout` if the caller's own has passed.
    """
    began, until = time.monotonic(), None
    while True:
        reader = coalescer._open(key, None, None, True)  # noqa: SLF001, FBT003 - it is the package's
        place = make_place(TaskPlace, reader, request, library)
        try:
            if reader.leads:
                # Patience with a request that it sends itself begins anew.
                began, until = time.monotonic(), None
                _lead(reader.source(), coalescer, inner, request, library)
            until = until or place.until()
            head = await place.head(began, until)
        except BaseException:
            place.leave()
            raise
        if head is not None:
            return place.response(head)
        place.leave()


def _lead(
    source: Any,  # noqa: ANN401
    coalescer: AsyncBatchCoalescer,
    inner: AsyncInnerTransport,
    request: Any,  # noqa: ANN401
    library: Any,  # noqa: ANN401
) -> None:
    loop = asyncio.get_running_loop()
    task = inner.start(loop, upstream_request(library, request), library, source)
    source.led_by(task, asyncio.current_task(loop) or task)
    coalescer._hold(task)  # noqa: SLF001 - it is the package's

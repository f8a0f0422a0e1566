"""Shared responses for threads: the thread that pumps one, and the places of those that read it."""

import contextlib
import contextvars
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

from llm_batch_coalesce._http_parts import LINGER_SECONDS, EndMark, GaveUp, Head, Place, make_place, upstream_request
from llm_batch_coalesce._sync import BatchCoalescer


class ThreadPlace(Place):
    """The place of a caller that waits in its thread."""

    KIND: ClassVar[str] = "SyncByteStream"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            found = self._await_item()
        except BaseException:
            self.leave()
            raise
        if not isinstance(found, bytes):
            self.leave()
            raise StopIteration
        return found

    def close(self) -> None:
        """Leave the response."""
        self.leave()

    def head(self, began: float, until: float | None) -> Head | None:
        """Return the response's head; None if it is to be asked for anew.

        Args:
            began: When the caller began to wait.
            until: When its patience ends.
        """
        found = self._await_item(until)
        if isinstance(found, Head):
            return found
        if isinstance(found, GaveUp):
            try:
                self._await_item()
            except Exception:
                if self._reader.leads:
                    raise
            # That was the end: from here on nobody can find this stream any more.
            self.check_timeout(found, time.monotonic() - began)
        return None

    def _await_item(self, until: float | None = None) -> Any:  # noqa: ANN401 - an item, or "end" or "again"
        while True:
            found = self.next_found()
            if not isinstance(found, str) or found != "wait":
                return found
            until = until or self.until()
            left = None if until is None else max(until - time.monotonic(), 0.0)
            if not self._reader.wait(left):
                raise self.read_timeout()


class InnerTransport:
    """A transport that requests are sent through, with the requests under way.

    It is closed when they are done: other clients may wait for them than the one that closes it.
    """

    __slots__ = ("_close", "_lock", "_under_way", "transport")

    def __init__(self, transport: Any) -> None:  # noqa: ANN401 - of either library
        self.transport = transport
        self._lock = threading.Lock()
        self._under_way = 0
        self._close: Callable[[], object] | None = None

    def send_shared(self, request: Any, library: Any, source: Any) -> None:  # noqa: ANN401
        """Send a request in a thread of its own, and feed its response to a shared stream."""
        copy = upstream_request(library, request)
        context = contextvars.copy_context()
        self.begin()
        # A daemon: its callers may all have left while the provider says nothing, and the process must be able to end.
        thread = threading.Thread(
            target=context.run,
            args=(self._pump, copy, library, source),
            name="llm_batch_coalesce upstream request",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            self.end()
            raise

    def _pump(self, request: Any, library: Any, source: Any) -> None:  # noqa: ANN401
        head = None
        try:
            source.enter()
            with _closing(self.transport.handle_request(request)) as (response, cut):
                head = Head.of(response)
                if not source.append(head) or not source.close_with(cut):
                    return
                if not _feed(source, response, EndMark(head), cut):
                    return
            source.finish(head.ttl_seconds)
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
        finally:
            self.end()

    def begin(self) -> None:
        """Have it stay open until `end`."""
        with self._lock:
            self._under_way += 1

    def end(self) -> None:
        """Close it if that has waited for this."""
        with self._lock:
            self._under_way -= 1
            if self._under_way:
                return
            close, self._close = self._close, None
        if close is not None:
            close()

    def close(self, close: Callable[[], object]) -> None:
        """Have the transport closed by calling `close`, now or when all requests are done."""
        with self._lock:
            if self._under_way:
                self._close = close
                return
        close()


class Cut:
    """Cuts the connection of a response whose thread may be blocked reading from it, which closing would not wake."""

    __slots__ = ("_lock", "_response")

    def __init__(self, response: Any) -> None:  # noqa: ANN401 - of either library
        self._lock = threading.Lock()
        self._response = response

    def release(self) -> None:
        """Cut no more: from now on the connection may serve another request."""
        with self._lock:
            self._response = None

    def close(self) -> None:
        """Wake the thread that reads; what it reads is the end."""
        with self._lock:
            extensions = {} if self._response is None else self._response.extensions
            stream = extensions.get("network_stream")
            # An HTTP/2 connection serves other requests at the same time.
            if stream is None or not extensions.get("http_version", b"").startswith(b"HTTP/1"):
                return
            connection = stream.get_extra_info("socket")
            if isinstance(connection, socket.socket):
                with contextlib.suppress(OSError):
                    # Not that of SSLSocket, which would drop the state that the thread is using.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _feed(source: Any, response: Any, mark: EndMark, cut: Cut) -> bool:  # noqa: ANN401
    """Feed a response's body to a shared stream. False if nobody reads it any more."""
    linger: threading.Timer | None = None
    try:
        for chunk in response.stream:
            marked = mark.comes_with(chunk)
            if marked:
                source.see_through()
            if not source.append(bytes(chunk)):
                return False
            if marked:
                linger = threading.Timer(LINGER_SECONDS, cut.close)
                linger.daemon = True
                linger.start()
    except Exception:
        if not mark.seen:
            raise
    finally:
        if linger is not None:
            linger.cancel()
    return True


@contextlib.contextmanager
def _closing(response: Any) -> Iterator[tuple[Any, Cut]]:  # noqa: ANN401 - of either library
    cut = Cut(response)
    try:
        yield response, cut
    finally:
        cut.release()
        response.close()


def share(coalescer: BatchCoalescer, key: Any, inner: InnerTransport, request: Any, library: Any) -> Any:  # noqa: ANN401
    """Return a response of the caller's own, from the request under way or retained, or from sending it.

    Raises:
        Exception: What sending the request raised, or the library's `ReadTimeout` if the caller's own has passed.
    """
    began, until = time.monotonic(), None
    while True:
        # From before others can wait for it.
        inner.begin()
        reader = None
        try:
            reader = coalescer._open(key, None, None, True)  # noqa: SLF001, FBT003 - it is the package's
            place = make_place(ThreadPlace, reader, request, library)
            if reader.leads:
                # Patience with a request that it sends itself begins anew.
                began, until = time.monotonic(), None
                _lead(reader.source(), place, inner, request, library)
        except BaseException:
            if reader is not None:
                reader.leave()
            raise
        finally:
            inner.end()
        try:
            until = until or place.until()
            head = place.head(began, until)
        except BaseException:
            place.leave()
            raise
        if head is not None:
            return place.response(head)
        place.leave()


def _lead(source: Any, place: ThreadPlace, inner: InnerTransport, request: Any, library: Any) -> None:  # noqa: ANN401
    try:
        inner.send_shared(request, library, source)
    except BaseException as error:
        source.break_off(error)
        place.leave()
        raise

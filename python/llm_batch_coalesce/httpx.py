"""HTTP transports that make identical requests in flight one upstream request, for httpx2 and httpx alike.

Given to a client, they coalesce what goes through it, without a change to the code that uses it; so SDKs that take an
`http_client`, such as openai's and anthropic's, can be coalesced:

    import httpx2
    from openai import OpenAI

    from llm_batch_coalesce import BatchCoalescer
    from llm_batch_coalesce.httpx import CoalescingTransport

    coalescer = BatchCoalescer(ttl_seconds=5.0)
    client = OpenAI(http_client=httpx2.Client(transport=CoalescingTransport(coalescer=coalescer)))

1. **Who shares.** Requests of the same library with the same method, URL, body (JSON compared by its meaning) and
   headers, but for `IGNORED_HEADERS`. All that authenticates counts, so that callers with different credentials never
   share, unless a `scope` says that they may.
2. **What they share** is the response as it comes from the wire: status, headers and the undecoded body, chunk by
   chunk. Each gets a response of its own. Whoever comes later, in flight or within the TTL, reads it from the start,
   event streams too, and nobody holds up the others. So a body is held in memory as long as it is read or retained.
3. **What is retained.** Responses that have ended, but for those that SDKs try again: 408, 409, 429, 500 and above, and
   whatever says `x-should-retry: true`. Those, and errors, go to the callers in flight alone.
4. **Timeouts are private.** Each caller keeps to its own read timeout, for the response's head (until it comes, sending
   the request included) and for each chunk, and gets its library's `ReadTimeout`. The upstream request has the other
   timeouts of its leader. If one of them passes, the leader alone gets the error, and the next caller sends the request
   anew; but a waiter that has by then waited as long as its own timeout of that kind gets that error, too.
5. **Leaving is private.** A caller that is cancelled, or closes its response or its client, takes nobody with it. When
   the last one has left, the upstream response is closed, unless nothing but its end is missing: OpenAI's clients leave
   an event stream at `data: [DONE]`. (A thread that waits for a head cannot be interrupted: its request is closed when
   the head comes.)

httpx2 and httpx are imported when a request of theirs comes, and only then. On free-threaded builds the first use of an
SDK from several threads at once can fail inside pydantic: make one call before the threads start.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from llm_batch_coalesce import _http_async, _http_sync
from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._http_keys import CREDENTIAL_HEADERS, IGNORED_HEADERS, Rules
from llm_batch_coalesce._http_parts import default_transport, library_of
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._sync import BatchCoalescer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import httpx
    import httpx2

    # Type checkers want clients to be given a class of their library's.
    class _TransportBase(httpx2.BaseTransport, httpx.BaseTransport):
        def handle_request(self, request: Any) -> Any: ...  # noqa: ANN401
        def __enter__(self) -> Self: ...

    class _AsyncTransportBase(httpx2.AsyncBaseTransport, httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: Any) -> Any: ...  # noqa: ANN401
        async def __aenter__(self) -> Self: ...

else:
    _TransportBase = _AsyncTransportBase = object

__all__ = ["CREDENTIAL_HEADERS", "IGNORED_HEADERS", "AsyncCoalescingTransport", "CoalescingTransport"]

_Inner = TypeVar("_Inner")


class _SameTransport:
    """Part of the keys of requests through a transport that was given, which may authenticate by itself."""

    __slots__ = ("_transport",)

    def __init__(self, transport: object) -> None:
        # Held, so that no other transport gets its id while the key lives.
        self._transport = transport

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameTransport) and other._transport is self._transport

    def __hash__(self) -> int:
        return id(self._transport)


class _Inners(Generic[_Inner]):
    """The transport that was given, or one of each library whose requests come."""

    def __init__(self, kind: Callable[[Any], _Inner], class_name: str, given: object) -> None:
        self._kind = kind
        self._class_name = class_name
        self._lock = threading.Lock()
        self._made: dict[str, _Inner] = {}
        self.given = None if given is None else kind(given)
        self._mark = None if given is None else _SameTransport(given)

    def of(self, library: Any) -> _Inner:  # noqa: ANN401 - a module
        if self.given is not None:
            return self.given
        with self._lock:
            inner = self._made.get(library.__name__)
            if inner is None:
                inner = self._made[library.__name__] = self._kind(default_transport(library, self._class_name))
            return inner

    def key(self, digest: str) -> object:
        return digest if self._mark is None else (digest, self._mark)

    def all(self) -> list[_Inner]:
        if self.given is not None:
            return [self.given]
        with self._lock:
            return list(self._made.values())


class CoalescingTransport(_TransportBase):
    """Makes identical requests of an `httpx2.Client` or `httpx.Client` that are under way at once one upstream request.

    For the coalescer's `ttl_seconds` after its response has ended, later ones are served it, too. Any number of clients
    and threads may use one transport, and transports share by their coalescer.

    Args:
        transport: What sends the upstream requests; it is closed with this one. None makes an `HTTPTransport` of the
            library that a request is of, with its default limits, and TCP keep-alive, since there is no read timeout
            upstream. Give one to go through a proxy, or for limits, certificates or retries. Only transports with the
            same one, or with none given, share with each other: make one for all clients that are to share.
        coalescer: Whose flights and TTL the requests share; one of a fleet is not taken.
        scope: Who shares: with `"credentials"`, requests with equal credentials, as all headers count. Any other string
            is a name that you vouch for, such as a tenant's: requests of one name share though their credentials
            (`CREDENTIAL_HEADERS`) differ. A callable gets the request and returns one or the other.
        methods: The methods whose requests are shared; what has another goes straight through.
        paths: Patterns as in `fnmatch`, such as `"*/chat/completions"`; requests whose URL's path matches none go
            straight through. None shares all.
        ignored_headers: Names of headers that do not count, or beginnings of names that end in `*`. Those of
            credentials count nevertheless; `scope` is there for them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a scope or `methods` is empty.

    Example:
        >>> import httpx2
        >>> def answer(request):
        ...     return httpx2.Response(200, json={"text": "what alpha means"})
        >>> inner = httpx2.MockTransport(answer)
        >>> transport = CoalescingTransport(inner, coalescer=BatchCoalescer(ttl_seconds=5.0))
        >>> with httpx2.Client(transport=transport) as client:
        ...     client.post("https://api.example.com/define", json={"term": "alpha"}).json()
        {'text': 'what alpha means'}
    """

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        transport: httpx2.BaseTransport | httpx.BaseTransport | None = None,
        *,
        coalescer: BatchCoalescer,
        scope: str | Callable[[Any], str] = "credentials",
        methods: Iterable[str] = ("POST",),
        paths: Iterable[str] | None = None,
        ignored_headers: Iterable[str] = IGNORED_HEADERS,
    ) -> None:
        """Make a transport; see the class."""
        if not isinstance(coalescer, BatchCoalescer):
            raise TypeError(f"coalescer must be a BatchCoalescer, not {shown(coalescer)}")
        _check_transport(transport, "handle_request")
        self._coalescer = coalescer
        self._rules = Rules(scope, methods, paths, ignored_headers)
        self._inners = _Inners(_http_sync.InnerTransport, "HTTPTransport", transport)

    def handle_request(self, request: Any) -> Any:  # noqa: ANN401 - of either library
        """Return the response to a request, shared with all that are identical.

        Args:
            request: One of httpx2's or httpx's.

        Returns:
            A response of the same library, this caller's own.

        Raises:
            Exception: What sending the request raised: the original for the leader, a copy for everybody else; or the
                library's `ReadTimeout`, if this request's own has passed.
            TypeError: If the request is of another library.
        """
        library = library_of(request)
        inner = self._inners.of(library)
        if not self._rules.cover(request):
            return inner.transport.handle_request(request)
        request.read()
        key = self._inners.key(self._rules.key(request, library.__name__))
        return _http_sync.share(self._coalescer, key, inner, request, library)

    def close(self) -> None:
        """Close the transports inside, once the requests that others wait for are done."""
        for inner in self._inners.all():
            inner.close(inner.transport.close)

    def __enter__(self) -> Self:
        """Enter the transport that was given."""
        if self._inners.given is not None:
            self._inners.given.transport.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave the transports inside, once the requests that others wait for are done."""
        for inner in self._inners.all():
            inner.close(partial(inner.transport.__exit__, *exc_info))


class AsyncCoalescingTransport(_AsyncTransportBase):
    """The same for an `httpx2.AsyncClient` or `httpx.AsyncClient` on asyncio.

    Clients on several event loops share through one coalescer; but an upstream connection belongs to its loop, so each
    loop needs a client and a transport of its own, as it does without this one.

    Args:
        transport: As in `CoalescingTransport`, of the async kind.
        coalescer: Whose flights and TTL the requests share. Its `on_abandoned` says what becomes of an upstream request
            whose last caller has left.
        scope: As in `CoalescingTransport`.
        methods: As in `CoalescingTransport`.
        paths: As in `CoalescingTransport`.
        ignored_headers: As in `CoalescingTransport`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a scope or `methods` is empty.

    Example:
        >>> import asyncio, httpx2
        >>> def answer(request):
        ...     return httpx2.Response(200, json={"text": "what alpha means"})
        >>> async def main():
        ...     inner = httpx2.MockTransport(answer)
        ...     transport = AsyncCoalescingTransport(inner, coalescer=AsyncBatchCoalescer(ttl_seconds=5.0))
        ...     async with httpx2.AsyncClient(transport=transport) as client:
        ...         response = await client.post("https://api.example.com/define", json={"term": "alpha"})
        ...     return response.json()
        >>> asyncio.run(main())
        {'text': 'what alpha means'}
    """

    def __init__(  # noqa: PLR0913 - they are options, given by name
        self,
        transport: httpx2.AsyncBaseTransport | httpx.AsyncBaseTransport | None = None,
        *,
        coalescer: AsyncBatchCoalescer,
        scope: str | Callable[[Any], str] = "credentials",
        methods: Iterable[str] = ("POST",),
        paths: Iterable[str] | None = None,
        ignored_headers: Iterable[str] = IGNORED_HEADERS,
    ) -> None:
        """Make a transport; see the class."""
        if not isinstance(coalescer, AsyncBatchCoalescer):
            raise TypeError(f"coalescer must be an AsyncBatchCoalescer, not {shown(coalescer)}")
        _check_transport(transport, "handle_async_request")
        self._coalescer = coalescer
        self._rules = Rules(scope, methods, paths, ignored_headers)
        self._inners = _Inners(_http_async.AsyncInnerTransport, "AsyncHTTPTransport", transport)

    async def handle_async_request(self, request: Any) -> Any:  # noqa: ANN401 - of either library
        """Return the response to a request, shared with all that are identical.

        Args:
            request: One of httpx2's or httpx's.

        Returns:
            A response of the same library, this caller's own.

        Raises:
            Exception: What sending the request raised: the original for the leader, a copy for everybody else; or the
                library's `ReadTimeout`, if this request's own has passed.
            TypeError: If the request is of another library.
        """
        library = library_of(request)
        inner = self._inners.of(library)
        if not self._rules.cover(request):
            return await inner.transport.handle_async_request(request)
        await request.aread()
        key = self._inners.key(self._rules.key(request, library.__name__))
        return await _http_async.share(self._coalescer, key, inner, request, library)

    async def aclose(self) -> None:
        """Close the transports inside, once the requests that others wait for are done."""
        for inner in self._inners.all():
            await inner.close(inner.transport.aclose)

    async def __aenter__(self) -> Self:
        """Enter the transport that was given."""
        if self._inners.given is not None:
            await self._inners.given.transport.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Leave the transports inside, once the requests that others wait for are done."""
        for inner in self._inners.all():
            await inner.close(partial(inner.transport.__aexit__, *exc_info))


def _check_transport(transport: object, method: str) -> None:
    if transport is not None and not callable(getattr(transport, method, None)):
        raise TypeError(f"transport must be one with {method}, or None, not {shown(transport)}")

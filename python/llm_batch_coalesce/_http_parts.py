"""What sync and async transports have in common: the parts of a shared response, and one caller's place in it.

A shared response is a stream: first its head, then its body in chunks, undecoded, as they come. Each caller makes a
response of its own from them, of the library that its request is of; so nothing of one caller's can change another's.
"""

from __future__ import annotations

import importlib
import re
import socket
import time
from collections import deque
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from llm_batch_coalesce._shown import shown

_LIBRARIES: Final = ("httpx2", "httpx")
# What SDKs try again, so that a retained answer would take their retries' place; and all that is 500 or above.
_RETRYABLE: Final = frozenset({408, 409, 429})
_SERVER_ERROR: Final = 500
# Of the inner response's extensions only what is plain data; the network stream is nobody's but the pump's.
_SHARED_EXTENSIONS: Final = ("http_version", "reason_phrase")
_MARK: Final = re.compile(rb"(?:\A|[\r\n])data: ?\[DONE\](?:\n\n|\r\n\r\n)\Z")
_LONGEST_MARK: Final = 32
# How long the end of a body may take to come after the mark.
LINGER_SECONDS: Final = 1.0
# Which of a request's timeouts has passed, by the name of the error's class.
_PHASES: Final = {"ConnectTimeout": "connect", "PoolTimeout": "pool", "WriteTimeout": "write", "ReadTimeout": "read"}


class Head(NamedTuple):
    """The first item of a shared response."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    extensions: dict[str, Any]

    @classmethod
    def of(cls, response: Any) -> Head:  # noqa: ANN401 - a response of either library
        """Return the head of an inner transport's response."""
        shared = {name: response.extensions[name] for name in _SHARED_EXTENSIONS if name in response.extensions}
        return cls(response.status_code, tuple(response.headers.raw), shared)

    @property
    def ttl_seconds(self) -> float | None:
        """How long the response is retained: 0.0 if asking again may give a better one, else None for as ever."""
        if self.status in _RETRYABLE or self.status >= _SERVER_ERROR:
            return 0.0
        told = any(name.lower() == b"x-should-retry" and value == b"true" for name, value in self.headers)
        return 0.0 if told else None


class EndMark:
    """Notices the mark that ends an event stream of OpenAI's kind.

    Clients stop reading there, and close the response before they have seen its end. That is no reason to cut it off:
    nothing of it is missing.
    """

    __slots__ = ("_applies", "_tail", "seen")

    def __init__(self, head: Head) -> None:
        headers = {name.lower(): value.lower() for name, value in head.headers}
        is_events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._applies = is_events and headers.get(b"content-encoding", b"identity") == b"identity"
        self._tail = b""
        self.seen = False

    def comes_with(self, chunk: bytes) -> bool:
        """Tell whether the mark is complete with this chunk of the body."""
        if not self._applies or self.seen:
            return False
        self._tail = (self._tail + chunk[-_LONGEST_MARK:])[-_LONGEST_MARK:]
        self.seen = _MARK.search(self._tail) is not None
        return self.seen


class GaveUp(NamedTuple):
    """The first and only item of a response that never came, because a timeout of its leader's passed."""

    error: str  # name of its class


def library_of(request: object) -> Any:  # noqa: ANN401 - a module
    """Return the library that a request is of.

    Raises:
        TypeError: If it is of none that is known.
    """
    for cls in type(request).__mro__:
        name = cls.__module__.partition(".")[0]
        if name in _LIBRARIES:
            return importlib.import_module(name)
    raise TypeError(f"request must be one of httpx2's or httpx's, not {shown(request)}")


def default_transport(library: Any, class_name: str) -> Any:  # noqa: ANN401 - of either library
    """Return a transport with the library's defaults that notices when its peer has died.

    Upstream requests have no timeout for reading, so the system has to ask a peer that has long been silent.
    """
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return getattr(library, class_name)(socket_options=options)


def upstream_request(library: Any, request: Any) -> Any:  # noqa: ANN401 - of either library
    """Return the request that is sent for all: that of its leader, which has been read, with no timeout for reading.

    How long an answer may take is for each caller to say, and each keeps to it while it waits. The other timeouts stay:
    they are about getting the request out.
    """
    extensions = dict(request.extensions)
    if extensions.get("timeout"):
        extensions["timeout"] = {**extensions["timeout"], "read": None}
    copy = library.Request(
        request.method, request.url, headers=request.headers, stream=request.stream, extensions=extensions
    )
    # Inner transports may look at its content.
    copy.read()
    return copy


def own(error: BaseException, request: Any, library: Any) -> None:  # noqa: ANN401 - of either library
    """Have an error name the request of the caller that gets it."""
    if isinstance(error, library.RequestError):
        error.request = request


class Place:
    """One caller's place in a shared response, and the body of the response that it makes of it."""

    # Of the library's class for streams.
    KIND: ClassVar[str]

    def __init__(self, reader: Any, request: Any, library: Any) -> None:  # noqa: ANN401
        self._reader = reader
        self._request = request
        self._library = library
        self._items: deque[Any] = deque()

    def response(self, head: Head) -> Any:  # noqa: ANN401 - of either library
        """Return a response whose body is the rest of the stream."""
        return self._library.Response(
            head.status,
            headers=list(head.headers),
            stream=self,
            request=self._request,
            extensions=dict(head.extensions),
        )

    def leave(self) -> None:
        """Read no more. The last one to leave closes the upstream response."""
        self._items.clear()
        self._reader.leave()

    def limit(self, phase: str = "read") -> float | None:
        """Return one of the caller's own timeouts, in seconds."""
        seconds: float | None = (self._request.extensions.get("timeout") or {}).get(phase)
        return seconds

    def until(self) -> float | None:
        """Return when the caller's patience ends, if it begins now."""
        seconds = self.limit()
        return None if seconds is None else time.monotonic() + seconds

    def next_found(self) -> Any:  # noqa: ANN401 - an item or a word
        """Return the next item, or a word: "wait", "end", or "again" for one that is to open the stream anew.

        Raises:
            Exception: What ended the stream.
        """
        if not self._items:
            try:
                found = self._reader.take()
            except Exception as error:
                own(error, self._request, self._library)
                raise
            if isinstance(found, str):
                return found
            self._items.extend(found)
        return self._items.popleft()

    def read_timeout(self) -> Exception:
        """Return the error of a caller whose patience is over."""
        message = f"nothing was received within {self.limit()} seconds"
        error: Exception = self._library.ReadTimeout(message, request=self._request)
        return error

    def check_timeout(self, gave_up: GaveUp, waited: float) -> None:
        """Raise if a caller has waited for as long as its own timeout for what the leader gave up on allows.

        Otherwise a provider that cannot be reached would be tried by one waiter after the other, and the last of many
        would wait many times as long.

        Raises:
            Exception: The library's timeout error of the same class as the leader's.
        """
        seconds = self.limit(_PHASES.get(gave_up.error, "connect"))
        if seconds is None or waited < seconds:
            return
        kind = getattr(self._library, gave_up.error, self._library.TimeoutException)
        message = f"{seconds} seconds have passed, and the request that it waited for timed out"
        raise kind(message, request=self._request)


_P = TypeVar("_P", bound=Place)
_classes: dict[tuple[type[Place], Any], Any] = {}


def make_place(kind: type[_P], reader: Any, request: Any, library: Any) -> _P:  # noqa: ANN401
    """Return the place of a request's caller, of the library's class of streams, which it asserts of a response."""
    cls: type[_P] | None = _classes.get((kind, library))
    if cls is None:
        cls = _classes[kind, library] = type(kind.__name__, (kind, getattr(library, kind.KIND)), {})
    return cls(reader, request, library)

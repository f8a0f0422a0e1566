"""Which HTTP requests are shared, and their keys: the same for requests that mean the same to whoever answers them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Final

from llm_batch_coalesce._requests import plain, render
from llm_batch_coalesce._shown import shown

# What changes with each attempt, or tells who asks and not what for. Lower case; a "*" ends a prefix.
IGNORED_HEADERS: Final = (
    # one value for each request or attempt
    "idempotency-key",
    "x-idempotency-key",
    "x-request-id",
    "x-client-request-id",
    "x-correlation-id",
    "request-id",
    "date",
    # traces
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "x-b3-*",
    "sentry-trace",
    "uber-trace-id",
    "uberctx-*",
    "x-amzn-trace-id",
    "x-cloud-trace-context",
    "x-datadog-*",
    "x-ot-span-context",
    # the client: retry count, timeouts, versions, sync or async
    "user-agent",
    "x-stainless-*",
    "x-goog-api-client",
    # the connection; the body, of whatever length, counts itself
    "connection",
    "keep-alive",
    "content-length",
    "transfer-encoding",
)

# What tells for whom a request is made.
CREDENTIAL_HEADERS: Final = (
    "authorization",
    "proxy-authorization",
    "cookie",
    "api-key",
    "x-api-key",
    "x-auth-token",
    "x-access-token",
    "openai-organization",
    "openai-project",
    "anthropic-organization-id",
    "anthropic-workspace-id",
    "anthropic-user-profile-id",
    "x-goog-api-key",
    "x-goog-user-project",
    "ocp-apim-subscription-key",
    "cf-aig-authorization",
    "helicone-auth",
    "x-portkey-api-key",
    "x-portkey-virtual-key",
    # signatures, which are new for each request
    "x-amz-date",
    "x-amz-security-token",
    "x-amz-content-sha256",
)

_CREDENTIALS: Final = "credentials"
_credential_headers: Final = frozenset(CREDENTIAL_HEADERS)


class Rules:
    """Which requests are shared, and by which key."""

    __slots__ = ("_ignored", "_ignored_prefixes", "_methods", "_paths", "_scope")

    def __init__(
        self,
        scope: str | Callable[[Any], str],
        methods: Iterable[str],
        paths: Iterable[str] | None,
        ignored_headers: Iterable[str],
    ) -> None:
        if not callable(scope):
            _check_scope("scope must be a str or a callable", scope)
        self._scope = scope
        self._methods = frozenset(name.upper() for name in _names("methods", methods))
        if not self._methods:
            raise ValueError("methods must not be empty: nothing would be shared")
        self._paths = None if paths is None else _names("paths", paths)
        ignored = [name.lower() for name in _names("ignored_headers", ignored_headers)]
        self._ignored = frozenset(name for name in ignored if not name.endswith("*"))
        self._ignored_prefixes = tuple(name[:-1] for name in ignored if name.endswith("*"))

    def cover(self, request: Any) -> bool:  # noqa: ANN401 - a request of either library
        """Tell whether a request is to be shared."""
        # After an upgrade the connection itself is what the caller gets, and that cannot be shared.
        if request.method.upper() not in self._methods or "upgrade" in request.headers:
            return False
        path = request.url.path
        return self._paths is None or any(fnmatchcase(path, pattern) for pattern in self._paths)

    def key(self, request: Any, library: str) -> str:  # noqa: ANN401 - as above
        """Return the key of a request that has been read. Nothing of the request can be read from it.

        Raises:
            TypeError: If the callable that names the scope gives no string.
            ValueError: If it gives an empty one.
        """
        scope = self._scope
        if callable(scope):
            scope = scope(request)
            _check_scope("what scope returns must be a str", scope)
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        content_type = b"".join(value for name, value in headers if name == b"content-type")
        # These two of the request's extensions change where it goes.
        route = [request.extensions.get(name, "") for name in ("target", "sni_hostname")]
        parts = ["http-v1", library, scope, request.method.upper(), str(request.url), *map(repr, route)]
        digest = hashlib.blake2b(digest_size=32)
        for part in [*parts, *_body(content_type, request.content), *self._counted(headers, scope)]:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            # With its length, so that no two lists of parts are one text.
            digest.update(len(data).to_bytes(8, "big") + data)
        return f"http-v1:{digest.hexdigest()}"

    def _counted(self, headers: list[tuple[bytes, bytes]], scope: str) -> list[bytes]:
        kept = []
        for raw_name, value in headers:
            name = raw_name.decode("latin-1")
            if name in _credential_headers:
                counts = scope == _CREDENTIALS  # and can be ignored in no other way
            else:
                counts = name not in self._ignored and not name.startswith(self._ignored_prefixes)
            if counts:
                kept.append((raw_name, value))
        # The order of names means nothing, that of one name's values may.
        kept.sort(key=lambda header: header[0])
        return [part for header in kept for part in header]


def _body(content_type: bytes, body: bytes) -> tuple[str, bytes]:
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type == b"application/json" or media_type.endswith(b"+json"):
        try:
            value = json.loads(body, object_pairs_hook=_object)
            return "json", render(plain(value, "", equal_numbers=True))
        except (ValueError, TypeError, RecursionError):
            pass  # what is no JSON after all is compared byte by byte
    return "bytes", body


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        # Which of them counts is for the provider to say.
        raise ValueError("a name occurs twice")
    return fields


def _check_scope(rule: str, scope: object) -> None:
    if not isinstance(scope, str):
        raise TypeError(f"{rule}, not {shown(scope)}")
    if not scope:
        raise ValueError(f'{rule}, and not empty: "{_CREDENTIALS}", or a name of all who may share')


def _names(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names given for an argument; a single string is one."""
    given = (names,) if isinstance(names, str) else names
    if not isinstance(given, Iterable):
        raise TypeError(f"{what} must be strings, not {shown(names)}")
    found = tuple(given)
    if not all(isinstance(name, str) for name in found):
        raise TypeError(f"{what} must be strings, not {shown(names)}")
    return found

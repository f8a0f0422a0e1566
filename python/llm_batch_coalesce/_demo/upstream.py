"""Asking an OpenAI-compatible server over HTTP what a term means, and saying clearly why it does not answer."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Self

import httpx2

from llm_batch_coalesce._demo.errors import DemoError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_INSTRUCTION: Final = "Explain the finance term that the user names, in one or two plain sentences."
_CONNECT_SECONDS: Final = 10.0
_LONGEST_REASON: Final = 200

_ADVICE: Final[dict[int, str]] = {
    400: "check --model",
    401: "name the environment variable that holds a valid key with --api-key-env",
    403: "name the environment variable that holds a key with access to this model with --api-key-env",
    404: "check --base-url, which usually ends in /v1, and --model",
    429: "wait a while, or ask for less with --users and --requests",
}
ADVICE_SERVER_ERROR: Final = "look at the server's log or try again later"
ADVICE_OTHER: Final = "check that --base-url names an OpenAI-compatible API; it usually ends in /v1"


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and how."""

    base_url: str
    model: str
    connections: int
    """As many as there are users, so that nobody waits for a free connection."""
    read_seconds: float
    api_key: str | None = field(default=None, repr=False)
    trust_env: bool = True
    """Whether proxies named in the environment apply."""
    advice: str = "check that the server is running and that --base-url is right"
    """What to do when it cannot be reached."""

    @property
    def url(self) -> str:
        """The URL that completions are posted to."""
        return f"{self.base_url}/chat/completions"

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def timeout(self) -> httpx2.Timeout:
        """Return how long to wait for a connection and for an answer."""
        return httpx2.Timeout(self.read_seconds, connect=_CONNECT_SECONDS, pool=None)

    def limits(self) -> httpx2.Limits:
        """Return the size of the connection pool."""
        return httpx2.Limits(max_connections=self.connections, max_keepalive_connections=self.connections)

    def question(self, term: str) -> dict[str, Any]:
        """Return the body of the request that asks for ``term``."""
        messages = [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": term}]
        return {"model": self.model, "messages": messages}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run took from the provider; ``None`` is what the provider does not tell."""

    calls: int
    tokens: int | None
    cost: float | None


class Tally:
    """The client's own count of requests sent and tokens used. Safe to share between threads."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._calls = 0
        self._tokens = 0
        self._all_told = True

    @property
    def calls(self) -> int:
        """Requests sent so far."""
        return self._calls

    def sent(self) -> None:
        """Count a request."""
        with self._lock:
            self._calls += 1

    def used(self, tokens: int | None) -> None:
        """Count the tokens of an answer; ``None`` when it did not tell."""
        with self._lock:
            if tokens is None:
                self._all_told = False
            else:
                self._tokens += tokens

    def usage(self, *, price: float) -> Usage:
        """Return the count so far, with its cost at ``price`` US dollars for 1,000 tokens."""
        with self._lock:
            tokens = self._tokens if self._all_told else None
            return Usage(self._calls, tokens, None if tokens is None else tokens / 1000 * price)


class Explainer:
    """Explains terms to threads."""

    def __init__(self, target: Target, tally: Tally) -> None:
        """Make a client for ``target`` that counts its requests in ``tally``."""
        self._target = target
        self._tally = tally
        with said_clearly(target):
            self._client = httpx2.Client(
                headers=target.headers(),
                timeout=target.timeout(),
                limits=target.limits(),
                trust_env=target.trust_env,
                event_hooks={"request": [lambda _: tally.sent()]},
            )

    def __enter__(self) -> Self:
        """Return the explainer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self._client.close()

    def explain(self, term: str) -> str:
        """Return what ``term`` means.

        Raises:
            DemoError: The server cannot be reached, refuses, or answers with no chat completion.
        """
        with said_clearly(self._target):
            response = self._client.post(self._target.url, json=self._target.question(term))
        return _read_answer(response, self._target, self._tally)


class AsyncExplainer:
    """Explains terms to the tasks of one event loop."""

    def __init__(self, target: Target, tally: Tally) -> None:
        """Make a client for ``target`` that counts its requests in ``tally``."""

        async def count(_: httpx2.Request) -> None:
            tally.sent()

        self._target = target
        self._tally = tally
        with said_clearly(target):
            self._client = httpx2.AsyncClient(
                headers=target.headers(),
                timeout=target.timeout(),
                limits=target.limits(),
                trust_env=target.trust_env,
                event_hooks={"request": [count]},
            )

    async def __aenter__(self) -> Self:
        """Return the explainer."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def explain(self, term: str) -> str:
        """Return what ``term`` means.

        Raises:
            DemoError: The server cannot be reached, refuses, or answers with no chat completion.
        """
        with said_clearly(self._target):
            response = await self._client.post(self._target.url, json=self._target.question(term))
        return _read_answer(response, self._target, self._tally)


@contextlib.contextmanager
def said_clearly(target: Target) -> Iterator[None]:
    """Turn what goes wrong with an exchange into the one line that tells it."""
    # "from None" throughout: the message says it all, and the coalescer copies an error for each of its waiters.
    try:
        yield
    except httpx2.TimeoutException as error:
        wait = f"{_CONNECT_SECONDS:g} s" if isinstance(error, httpx2.ConnectTimeout) else f"{target.read_seconds:g} s"
        message = f"no answer from {target.url} within {wait}; {target.advice}"
        raise DemoError(message) from None
    except httpx2.ConnectError as error:
        message = f"cannot connect to {target.url} ({one_line(error)}); {target.advice}"
        raise DemoError(message) from None
    except httpx2.RequestError as error:
        message = f"the exchange with {target.url} broke off ({one_line(error)}); {target.advice}"
        raise DemoError(message) from None
    except (httpx2.InvalidURL, ImportError, OSError, ValueError) as error:
        # A host name that cannot exist; a proxy or a certificate file, named in the environment, that cannot be used.
        message = f"cannot ask {target.url} ({one_line(error)}); check --base-url and the environment's proxy settings"
        raise DemoError(message) from None


def raise_refusal(response: httpx2.Response, target: Target) -> None:
    """Raise what a response that has been read says, if it is none of success."""
    if response.is_success:
        return
    status = response.status_code
    advice = _ADVICE.get(status, ADVICE_SERVER_ERROR if response.is_server_error else ADVICE_OTHER)
    try:
        reason = reason_given(response.json())
    except (ValueError, RecursionError):
        reason = ""
    message = f"{target.url} answered HTTP {_named(status)}{reason and f' ({reason})'}; {advice}"
    raise DemoError(message)


def _read_answer(response: httpx2.Response, target: Target, tally: Tally) -> str:
    raise_refusal(response, target)
    try:
        answer = response.json()
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        message = f"{target.url} answered with something that is no chat completion; {ADVICE_OTHER}"
        raise DemoError(message)
    tally.used(tokens_told(answer))
    return text


def tokens_told(answer: dict[str, Any]) -> int | None:
    """Return how many tokens an answer says it took, if it does."""
    usage = answer.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    # A bool is an int, and no number of tokens.
    return tokens if type(tokens) is int and tokens >= 0 else None


def reason_given(answer: Any) -> str:  # noqa: ANN401 - any JSON
    """Return the message of an error in the form that OpenAI's API and most others give it, or nothing."""
    try:
        error = answer["error"]
        return one_line(error["message"] if isinstance(error, dict) else error)
    except (LookupError, TypeError):
        return ""


def one_line(reason: object) -> str:
    """Return a reason as it can be shown."""
    # It comes from elsewhere and goes to a terminal: no line breaks, no control sequences, no novels.
    text = "".join(character for character in " ".join(str(reason).split()) if character.isprintable())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def _named(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)

"""Who shares: which requests are one, and which never are."""

import doctest
import json
import subprocess
import sys

import httpx
import httpx2
import pytest
from http_callers import URL, Inner, Threads
from loops import PATIENCE

import llm_batch_coalesce.httpx
from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce.httpx import (
    CREDENTIAL_HEADERS,
    IGNORED_HEADERS,
    AsyncCoalescingTransport,
    CoalescingTransport,
)


def numbered(library):
    return Inner(lambda request, number: library.Response(200, json={"number": number}))


def sent(library, requests, **options):
    """Return how many upstream requests these requests are, one after the other inside the TTL."""
    inner = numbered(library)
    with Threads(library) as callers:
        client = callers.client(inner, **options)
        for request in requests:
            assert client.request(**{"method": "POST", "url": URL} | request).status_code == 200
    return len(inner.requests)


def same_bodies():
    headers = {"content-type": "application/json"}
    yield {"json": {"a": 1, "b": [1, {"c": 2, "d": None}]}}
    yield {"content": b'{ "b": [1.0, {"d":null, "c":2}],\n "a": 1 }', "headers": headers}
    yield {"content": iter([b'{"b":[1,{"c":2,', b'"d":null}],"a":1}']), "headers": headers}


def test_json_bodies_are_compared_by_their_meaning(library):
    assert sent(library, same_bodies()) == 1


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
def test_what_is_json_is_seen_by_its_content_type(library, content_type):
    headers = {"content-type": content_type}
    assert sent(library, [{"content": body, "headers": headers} for body in (b'{"a":1}', b'{ "a":1 }')]) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a":1}', b'{"a":2}'),
        (b'{"a":1}', b'{"a":true}'),
        (b'{"a":1}', b'{"a":"1"}'),
        (b"[1,2]", b"[2,1]"),
        (b'{"a":1,"a":2}', b'{"a":2}'),  # who knows which one counts
        (b'{"a":NaN}', b'{ "a":NaN}'),  # no JSON: by its bytes
        (b'{"a":1', b' {"a":1'),
        (b"\xff", b" \xff"),
        (b"[" * 100_000, b" " + b"[" * 100_000),
        (b'{"a":1e999}', b'{"a":1e998}'),
        (b"", b"null"),
    ],
)
def test_bodies_that_may_mean_something_else_never_share(library, one, other):
    headers = {"content-type": "application/json"}
    requests = [{"content": body, "headers": headers} for body in (one, other, one)]
    assert sent(library, requests) == 2


def test_other_bodies_are_compared_by_their_bytes(library):
    headers = {"content-type": "text/plain"}
    assert sent(library, [{"content": body, "headers": headers} for body in (b'{"a":1}', b'{ "a":1}', b'{"a":1}')]) == 2


def test_no_two_places_of_a_request_are_confused(library):
    requests = [
        {"headers": {"x-a": "1", "x-b": ""}},
        {"headers": {"x-a": "", "x-b": "1"}},
        {"headers": {"x-a": "1x-b"}},
        {"content": b"x-a1"},
        {"headers": [("x-a", "1"), ("x-a", "2")]},
        {"headers": [("x-a", "2"), ("x-a", "1")]},
    ]
    assert sent(library, requests) == len(requests)


@pytest.mark.parametrize(
    "other",
    [
        {"url": URL + "/more"},
        {"url": URL + "?a=1"},
        {"url": URL.replace("http:", "https:")},
        {"url": URL.replace("provider.test", "user:secret@provider.test")},
        {"method": "PUT"},
        {"headers": {"accept": "text/event-stream"}},
        {"headers": {"accept-encoding": "identity"}},
        {"headers": {"anthropic-beta": "new"}},
        {"extensions": {"target": b"/elsewhere"}},
        {"extensions": {"sni_hostname": "elsewhere"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_requests_that_differ_never_share(library, other):
    assert sent(library, [{}, other, {}, other], methods=("POST", "PUT")) == 2


# Credentials.


@pytest.mark.parametrize("name", CREDENTIAL_HEADERS)
def test_callers_with_different_credentials_never_share(callers, name):
    """Not even while they ask at once, nor if the header is to be ignored."""
    inner = Inner(lambda request, number: callers.library.Response(200, json={"for": request.headers[name]}))
    clients = [callers.client(inner), callers.client(inner, ignored_headers=["*", name, name.upper()])]
    for client in clients:
        inner.requests.clear()
        asked = [callers.post(client, headers={name.title(): f"{number % 3}"}) for number in range(6)]
        assert [each.result(30).json()["for"] for each in asked] == ["0", "1", "2"] * 2
        assert sorted(sent.headers[name] for sent in inner.requests) == ["0", "1", "2"]
        callers.coalescer.clear()


def test_a_named_scope_shares_whatever_the_credentials_are(library):
    requests = [{"headers": {name: f"{number}"}} for name in CREDENTIAL_HEADERS for number in range(2)]
    assert sent(library, [{}, *requests], scope="tenant 7") == 1
    assert sent(library, [{}, {"headers": {"x-other": "1"}}], scope="tenant 7") == 2


def test_scopes_never_share_with_each_other(library):
    inner = numbered(library)
    with Threads(library) as callers:
        scopes = ["credentials", "tenant 1", "tenant 2", lambda request: "tenant 1", lambda request: "credentials"]
        numbers = [callers.ask(callers.client(inner, scope=scope)).json()["number"] for scope in scopes]
    assert numbers == [1, 2, 3, 2, 1]


def test_a_callable_names_the_scope_by_the_request(library):
    requests = [{"headers": {"x-tenant": tenant, "authorization": key}} for tenant in "ab" for key in "kl"]
    assert sent(library, requests, scope=lambda request: request.headers["x-tenant"]) == 2
    assert sent(library, requests) == 4


@pytest.mark.parametrize(("answer", "error"), [(7, TypeError), (None, TypeError), ("", ValueError)])
def test_what_is_no_scope_is_refused_before_anything_is_sent(callers, answer, error):
    inner = numbered(callers.library)
    client = callers.client(inner, scope=lambda request: answer)
    with pytest.raises(error, match="what scope returns must be a str, "):
        callers.ask(client)
    assert inner.requests == []


def test_a_key_shows_nothing_of_the_request(library):
    with Threads(library) as callers:
        transport = callers.transport()
        inner = Inner(lambda request, number: library.Response(200), held=True)
        client = callers.client(transport=callers.transport(inner))
        asked = callers.post(client, headers={"authorization": "Bearer a-secret"}, json={"word": "a-secret"})
        (flight,) = callers.coalescer.flights()
        assert "a-secret" not in repr(flight) + repr(callers.coalescer) + repr(transport)
        inner.release()
        asked.result(30)


# Headers that do not count.


def test_ignored_headers_do_not_count(library):
    names = [name.replace("*", "anything") for name in IGNORED_HEADERS]
    own = {"content-length", "transfer-encoding", "connection", "keep-alive"}  # the clients set them
    requests = [{"headers": {name: f"{number}"}} for name in names if name not in own for number in range(2)]
    assert sent(library, [{}, *requests]) == 1


def test_the_list_of_ignored_headers_is_an_option(library):
    requests = [{"headers": {"x-mine": f"{number}"}} for number in range(3)]
    assert sent(library, requests) == 3
    for names in (["X-Mine"], "x-mine", ("x-m*",), [*IGNORED_HEADERS, "x-mine"]):
        assert sent(library, requests, ignored_headers=names) == 1
    assert sent(library, [{"headers": {"x-request-id": f"{number}"}} for number in range(3)], ignored_headers=()) == 3


# What is not shared at all.


def test_other_methods_and_paths_go_straight_through(callers):
    inner = numbered(callers.library)
    client = callers.client(inner, methods=["post", "Put"], paths=["*/chat/completions", "/v?/messages"])
    through = [("GET", "/v1/chat/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/messages/batches")]
    for method, path in through:
        for _ in range(2):
            callers.start(client.request, method, f"http://provider.test{path}").result(PATIENCE)
    assert len(inner.requests) == 2 * len(through)
    assert callers.coalescer.stats().calls == 0
    # They keep their own timeout, since nobody else waits for them.
    assert {request.extensions["timeout"]["read"] for request in inner.requests} == {PATIENCE}
    inner.requests.clear()
    for method, path in [("POST", "/v1/chat/completions"), ("PUT", "/v2/messages")]:
        for _ in range(2):
            callers.start(client.request, method, f"http://provider.test{path}").result(PATIENCE)
    assert len(inner.requests) == 2


def test_an_upgrade_of_the_connection_is_not_shared(library):
    assert sent(library, [{"headers": {"upgrade": "websocket"}}] * 2) == 2


def test_requests_of_two_libraries_never_share():
    """Each caller gets a response of its own library."""
    coalescer = BatchCoalescer()

    def answer(request, number):
        library = sys.modules[type(request).__module__.partition(".")[0]]
        return library.Response(200, json={"number": number})

    inner = Inner(answer)
    for _ in range(2):
        for library in (httpx2, httpx):
            with library.Client(transport=CoalescingTransport(inner, coalescer=coalescer)) as client:
                assert type(client.post(URL)) is library.Response
    assert len(inner.requests) == 2


def test_transports_share_if_what_they_send_through_is_the_same(callers):
    """One that was given may authenticate by itself, with a certificate."""
    inner, other = numbered(callers.library), numbered(callers.library)
    clients = [callers.client(inner), callers.client(inner), callers.client(other)]
    assert [callers.ask(client).json()["number"] for client in clients] == [1, 1, 1]
    assert (len(inner.requests), len(other.requests)) == (1, 1)


# Arguments.

KINDS = [(CoalescingTransport, BatchCoalescer), (AsyncCoalescingTransport, AsyncBatchCoalescer)]


@pytest.mark.parametrize(("kind", "coalescer"), KINDS, ids=["threads", "tasks"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"coalescer": None}, TypeError, "coalescer must be an? (Async)?BatchCoalescer, not None"),
        ({"transport": 5}, TypeError, "transport must be one with handle_(async_)?request, or None, not 5"),
        ({"scope": 7}, TypeError, "scope must be a str or a callable, not 7"),
        ({"scope": ""}, ValueError, "scope must be a str or a callable, and not empty"),
        ({"methods": ()}, ValueError, "methods must not be empty"),
        ({"methods": [b"POST"]}, TypeError, r"methods must be strings, not \[b'POST'\]"),
        ({"methods": 5}, TypeError, "methods must be strings, not 5"),
        ({"paths": [1]}, TypeError, r"paths must be strings, not \[1\]"),
        ({"ignored_headers": None}, TypeError, "ignored_headers must be strings, not None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named_with_their_values(kind, coalescer, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kind(**{"coalescer": coalescer()} | options)


def test_a_coalescer_of_the_other_kind_is_refused():
    with pytest.raises(TypeError, match=r"^coalescer must be a BatchCoalescer, not "):
        CoalescingTransport(coalescer=AsyncBatchCoalescer())
    with pytest.raises(TypeError, match=r"^coalescer must be an AsyncBatchCoalescer, not "):
        AsyncCoalescingTransport(coalescer=BatchCoalescer())


def test_what_is_no_request_is_refused():
    with pytest.raises(TypeError, match="request must be one of httpx2's or httpx's, not 'text'"):
        CoalescingTransport(coalescer=BatchCoalescer()).handle_request("text")


def test_the_examples_in_the_docs_hold():
    done = doctest.testmod(llm_batch_coalesce.httpx)
    assert (done.attempted > 0, done.failed) == (True, 0)


def test_the_module_imports_neither_library():
    program = """
import sys
import llm_batch_coalesce
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport
CoalescingTransport(coalescer=llm_batch_coalesce.BatchCoalescer()).close()
AsyncCoalescingTransport(coalescer=llm_batch_coalesce.AsyncBatchCoalescer())
print([name for name in ("httpx", "httpx2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("used", "missing"), [("httpx2", "httpx"), ("httpx", "httpx2")])
def test_one_library_is_enough(used, missing):
    program = f"""
import sys
sys.modules[{missing!r}] = None  # as if it were not installed
import {used} as library
from llm_batch_coalesce import BatchCoalescer
from llm_batch_coalesce.httpx import CoalescingTransport
inner = library.MockTransport(lambda request: library.Response(200, text="fine"))
with library.Client(transport=CoalescingTransport(inner, coalescer=BatchCoalescer())) as client:
    print(client.post("http://provider.test").text)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "fine"


def test_json_of_any_size_is_no_reason_to_hang_or_fail(library):
    value = 0
    for _ in range(500):
        value = [value]
    body = json.dumps({"a": value, "b": ["x" * 100] * 1000})
    assert sent(library, [{"content": body, "headers": {"content-type": "application/json"}}] * 2) == 1

"""What callers get: the whole response as it came from the wire, an object of their own; or the error."""

import gzip
import json
import threading
import zlib

import pytest
from http_callers import Inner, Threads, present, raised
from loops import PATIENCE, wait_until
from provider import BREAK, HOLD, Answer

from llm_batch_coalesce import RecursiveCallError

COUNT = 20


def test_everybody_gets_the_whole_response(callers, provider):
    def answer(seen):
        headers = {"content-type": "text/plain", "X-Trace": "1", "set-cookie": "a=1"}
        return Answer([b"all of it"], status=203, headers=headers)

    provider.script = answer
    provider.hold()
    clients = [callers.client() for _ in range(COUNT)]
    asked = [callers.post(client, provider.url) for client in clients]
    provider.release()
    responses = [each.result(PATIENCE) for each in asked]
    clients.append(callers.client())  # the others' cookie is part of their requests by now
    responses.append(callers.ask(clients[-1], provider.url))
    for response in responses:
        assert type(response) is callers.library.Response
        assert (response.status_code, response.reason_phrase) == (203, "Non-Authoritative Information")
        assert response.http_version == "HTTP/1.1"
        assert response.text == "all of it"
        assert response.headers["x-trace"] == "1"
        assert response.headers.raw == responses[0].headers.raw
        assert response.elapsed.total_seconds() >= 0
        assert "network_stream" not in response.extensions
    assert {client.cookies["a"] for client in clients} == {"1"}
    assert len({id(response.request) for response in responses}) == COUNT + 1
    assert len(provider.seen) == 1


def test_a_response_is_the_same_as_without_the_transport(callers, provider):
    provider.script = lambda seen: Answer([b"fine"], headers={"X-Twice": "1", "x-twice": "2", "content-length": "4"})
    with callers.library.Client() as client:
        plain = client.post(provider.url, json={"term": "alpha"})
    response = callers.ask(callers.client(), provider.url)

    def without_date(headers):
        return [header for header in headers.raw if header[0] != b"date"]

    assert without_date(response.headers) == without_date(plain.headers)
    sent = [{k: v for k, v in seen.headers.items() if k != "user-agent"} for seen in provider.seen]
    assert sent[0] == sent[1]


def test_a_responses_version_and_reason_are_those_of_the_wire(callers):
    told = {"http_version": b"HTTP/2", "reason_phrase": b"Odd", "stream_id": 5}
    inner = Inner(lambda request, number: callers.library.Response(200, extensions=told))
    client = callers.client(inner)
    for _ in range(2):
        response = callers.ask(client)
        assert (response.http_version, response.reason_phrase) == ("HTTP/2", "Odd")
        assert "stream_id" not in response.extensions


def test_changing_one_response_changes_no_other(callers, provider):
    provider.script = lambda seen: Answer([b'{"words": ["what"]}'])
    client = callers.client()
    one = callers.ask(client, provider.url)
    one.headers["content-type"] = "changed"
    one.headers["x-new"] = "changed"
    one.extensions["http_version"] = b"changed"
    one.json()["words"].append("changed")
    one.status_code = 500
    other = callers.ask(client, provider.url)
    assert len(provider.seen) == 1
    assert other.headers["content-type"] == "application/json"
    assert "x-new" not in other.headers
    assert other.http_version == "HTTP/1.1"
    assert other.json() == {"words": ["what"]}
    assert other.status_code == 200


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_what_is_compressed_is_replayed_as_it_is(callers, provider, encoding, compress):
    text = json.dumps({"text": "alpha " * 1000}).encode()
    raw = compress(text)
    provider.script = lambda seen: Answer([raw[:20], raw[20:]], headers={"content-encoding": encoding})
    client = callers.client()
    for _ in range(2):
        response = callers.ask(client, provider.url)
        assert response.content == text
        assert response.headers["content-encoding"] == encoding
        assert response.num_bytes_downloaded == len(raw)
        assert b"".join(callers.read(callers.open(client, provider.url).result(PATIENCE))) == raw
    assert len(provider.seen) == 1


def test_an_event_stream_comes_chunk_by_chunk_and_is_replayed_from_the_start(callers, provider):
    events = [f"data: {number}\n\n".encode() for number in range(4)]
    provider.script = lambda seen: Answer(
        [part for number, event in enumerate(events) for part in (event, HOLD)][:-1],
        headers={"content-type": "text/event-stream"},
    )
    client = callers.client()
    first, second = (callers.open(client, provider.url).result(PATIENCE) for _ in range(2))
    # Before the provider sends more.
    assert callers.chunk(first).result(PATIENCE) == callers.chunk(second).result(PATIENCE) == events[0]
    late = callers.open(client, provider.url).result(PATIENCE)
    provider.release()
    rest = [b"".join(callers.read(response)) for response in (first, second)]
    assert rest == [b"".join(events[1:])] * 2
    assert b"".join(callers.read(late)) == b"".join(events)
    later = callers.open(client, provider.url).result(PATIENCE)
    assert b"".join(callers.read(later)) == b"".join(events)
    assert len(provider.seen) == 1


def test_a_slow_reader_holds_nobody_up(callers, provider):
    parts = [bytes([number % 256]) * 1000 for number in range(500)]
    provider.script = lambda seen: Answer(parts, headers={"content-type": "text/event-stream"})
    client = callers.client()
    slow = callers.open(client, provider.url).result(PATIENCE)
    assert callers.ask(client, provider.url).content == b"".join(parts)
    assert b"".join(callers.read(slow)) == b"".join(parts)


def test_an_answer_without_a_body_is_one(callers, provider):
    provider.script = lambda seen: Answer([], status=204, headers={})
    client = callers.client()
    for _ in range(2):
        response = callers.ask(client, provider.url)
        assert (response.status_code, response.content) == (204, b"")
    assert len(provider.seen) == 1


def test_the_body_of_a_request_may_come_from_an_iterator(callers, provider):
    def parts():
        yield b"one "
        yield b"two"

    async def async_parts():
        for part in parts():
            yield part

    provider.script = lambda seen: Answer([b"fine"])
    client = callers.client()
    for _ in range(2):
        content = parts() if isinstance(callers, Threads) else async_parts()
        callers.ask(client, provider.url, json=None, content=content)
    assert [seen.body for seen in provider.seen] == [b"one two"]


def test_what_is_sent_is_the_leaders_request(callers, provider):
    client = callers.client()
    callers.ask(client, provider.url + "?a=1", headers={"X-Mine": "1", "authorization": "Bearer k"})
    (seen,) = provider.seen
    assert seen.asked == {"term": "alpha"}
    assert (seen.method, seen.path) == ("POST", "/v1/answers")
    assert (seen.headers["x-mine"], seen.headers["authorization"]) == ("1", "Bearer k")
    assert seen.headers["content-length"] == str(len(seen.body))


def test_an_inner_transport_may_change_its_request(callers):
    """Nobody's own request is changed by one that signs."""

    def sign(request, number):
        assert request.content == b'{"term":"alpha"}'
        request.headers["authorization"] = "signed"
        return callers.library.Response(200, content=b"fine")

    inner = Inner(sign)
    response = callers.ask(callers.client(inner))
    assert response.text == "fine"
    assert "authorization" not in response.request.headers


# What is retained.


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 422])
def test_other_statuses_are_retained(callers, status):
    inner = Inner(lambda request, number: callers.library.Response(status, json={"number": number}))
    client = callers.client(inner)
    for _ in range(2):
        response = callers.ask(client)
        assert (response.status_code, response.json()) == (status, {"number": 1})


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_retryable_statuses_go_to_those_in_flight_only(callers, status):
    inner = Inner(lambda request, number: callers.library.Response(status, json={"number": number}), held=True)
    client = callers.client(inner)
    asked = [callers.post(client) for _ in range(COUNT)]
    inner.release()
    assert [each.result(PATIENCE).json() for each in asked] == [{"number": 1}] * COUNT
    assert callers.ask(client).json() == {"number": 2}


def test_what_the_provider_wants_to_be_tried_again_is_not_retained(callers):
    headers = {"X-Should-Retry": "true"}
    inner = Inner(lambda request, number: callers.library.Response(400, headers=headers, json={"number": number}))
    client = callers.client(inner)
    assert [callers.ask(client).json()["number"] for _ in range(2)] == [1, 2]


def test_without_a_ttl_nothing_is_retained(library):
    inner = Inner(lambda request, number: library.Response(200, json={"number": number}))
    with Threads(library, ttl_seconds=0) as callers:
        client = callers.client(inner)
        assert [callers.ask(client).json()["number"] for _ in range(3)] == [1, 2, 3]


# Errors.


def test_an_error_goes_to_those_in_flight_as_an_object_of_their_own(callers):
    def fail(request, number):
        raise callers.library.ConnectError(f"refused {number}")

    inner = Inner(fail, held=True)
    client = callers.client(inner)
    asked = [callers.post(client, headers={"x-request-id": f"{number}"}) for number in range(COUNT)]
    inner.release()
    errors = [raised(each) for each in asked]
    assert {type(error) for error in errors} == {callers.library.ConnectError}
    assert {str(error) for error in errors} == {"refused 1"}
    assert len({id(error) for error in errors}) == COUNT
    # Each tells of its own caller's request.
    assert [error.request.headers["x-request-id"] for error in errors] == [f"{number}" for number in range(COUNT)]
    # It is not retained.
    assert str(raised(callers.post(client))) == "refused 2"


def test_an_error_names_its_callers_request_without_a_client_too(library):
    def fail(request, number):
        raise library.ConnectError("refused")

    inner = Inner(fail, held=True)
    with Threads(library) as callers:
        transport = callers.transport(inner)
        requests = [library.Request("POST", "http://provider.test") for _ in range(3)]
        asked = [callers.start(transport.handle_request, request) for request in requests]
        wait_until(lambda: present(callers.coalescer) == 3)
        inner.release()
        assert [raised(each).request for each in asked] == requests


def test_an_error_that_is_not_the_librarys_is_shared_too(callers):
    def fail(request, number):
        raise LookupError(f"no such host {number}")

    inner = Inner(fail, held=True)
    client = callers.client(inner)
    asked = [callers.post(client) for _ in range(5)]
    inner.release()
    assert [str(raised(each)) for each in asked] == ["no such host 1"] * 5


def test_an_answer_that_breaks_off_is_an_error_for_all_and_not_retained(callers, provider):
    def answer(seen):
        end = [BREAK] if seen.number == 1 else [b"whole"]
        return Answer([b"half ", HOLD, *end], headers={"content-type": "text/event-stream"})

    provider.script = answer
    client = callers.client()
    responses = [callers.open(client, provider.url).result(PATIENCE) for _ in range(5)]
    for response in responses:
        assert callers.chunk(response).result(PATIENCE) == b"half "
    rest = [callers.chunk(response) for response in responses]
    provider.release()
    errors = [raised(each) for each in rest]
    assert {type(error) for error in errors} == {callers.library.RemoteProtocolError}
    assert len({id(error) for error in errors}) == 5
    assert [error.request for error in errors] == [response.request for response in responses]
    assert callers.ask(client, provider.url).content == b"half whole"


def test_a_provider_that_is_not_there_is_an_error_for_all(callers):
    client = callers.client()
    error = raised(callers.post(client, "http://127.0.0.1:9/"))
    assert type(error) is callers.library.ConnectError


def test_what_comes_out_of_an_inner_transport_as_no_exception_is_not_lost(library):
    """The leader gets it, and whoever waits sends the request anew."""

    class Leave(BaseException):
        pass

    def fail(request, number):
        if number == 1:
            raise Leave
        return library.Response(200, json={"number": number})

    inner = Inner(fail, held=True)
    with Threads(library) as callers:
        client = callers.client(inner)
        leader, waiter = callers.post(client), callers.post(client)
        inner.release()
        assert type(raised(leader)) is Leave
        assert waiter.result(PATIENCE).json() == {"number": 2}


def test_a_request_that_asks_for_itself_is_told(callers):
    class Again(Inner):
        def handle_request(self, request):
            return transport.handle_request(request)

        async def handle_async_request(self, request):
            return await transport.handle_async_request(request)

    transport = callers.transport(Again(None))
    error = raised(callers.post(callers.client(transport=transport)))
    assert type(error) is RecursiveCallError


def test_upstream_threads_are_one_a_request_and_end(library, provider):
    provider.hold()

    def upstream():
        return [thread for thread in threading.enumerate() if "upstream request" in thread.name]

    wait_until(lambda: not upstream())
    with Threads(library) as callers:
        client = callers.client()
        asked = [callers.post(client, provider.url) for _ in range(COUNT)]
        (thread,) = upstream()
        assert thread.daemon
        provider.release()
        assert [each.result(PATIENCE).status_code for each in asked] == [200] * COUNT
        wait_until(lambda: not upstream())

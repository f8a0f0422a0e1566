"""What concerns one caller only: its timeouts, its leaving, its cancellation, its closing of its client."""

import asyncio
import gc
import time
import types

import pytest
from http_callers import URL, Inner, Tasks, Threads, present, raised
from loops import PATIENCE, wait_until
from provider import HOLD, Answer

from llm_batch_coalesce import _http_async, _http_parts, _http_sync

PATIENT = None  # no timeout at all


def in_halves(_):
    return Answer([b"one ", b"two ", HOLD, b"three"], headers={"content-type": "text/event-stream"})


def first_half(callers, response):
    """Return the chunks of what the provider has sent; how it is cut is the network's business."""
    read = b""
    while len(read) < len(b"one two "):
        read += callers.chunk(response).result(PATIENCE)
    return read


def ok(library):
    return lambda request, number: library.Response(200, json={"number": number})


# Timeouts.


def test_a_waiters_timeout_is_its_own(callers, provider):
    provider.hold()
    client = callers.client()
    leader = callers.post(client, provider.url)
    waiters = [callers.post(client, provider.url, timeout=0.05) for _ in range(5)]
    for waiter in waiters:
        error = raised(waiter)
        assert type(error) is callers.library.ReadTimeout
        assert str(error) == "nothing was received within 0.05 seconds"
        assert error.request.extensions["timeout"]["read"] == 0.05
    assert not leader.done()
    provider.release()
    assert leader.result(PATIENCE).status_code == 200
    assert len(provider.seen) == 1


def test_an_impatient_leader_leaves_its_request_to_the_others(callers, provider):
    client = callers.client(timeout=PATIENT)
    for patience in (0.2, 1, 5):
        provider.reset()
        provider.hold()
        url = provider.root + "/v1/answers"
        leader = callers.post(client, url, timeout=patience)
        waiters = [callers.start(client.post, url, json={"term": "alpha"}) for _ in range(5)]
        wait_until(lambda leader=leader: leader.done() or present(callers.coalescer) == 6)
        in_time = not leader.done()
        assert type(raised(leader)) is callers.library.ReadTimeout
        if in_time:
            break
        provider.release()  # the machine is slow: the leader had gone before the others came
        assert [waiter.result(PATIENCE).status_code for waiter in waiters] == [200] * 5
        callers.coalescer.clear()
    assert not any(waiter.done() for waiter in waiters)
    provider.release()
    assert {waiter.result(PATIENCE).status_code for waiter in waiters} == {200}
    assert len(provider.seen) == 1


def test_a_timeout_in_mid_answer_is_its_callers_own(callers, provider):
    provider.script = in_halves
    client = callers.client(timeout=PATIENT)
    leader = callers.open(client, provider.url, timeout=0.5).result(PATIENCE)
    waiter = callers.open(client, provider.url).result(PATIENCE)
    assert first_half(callers, leader) == first_half(callers, waiter) == b"one two "
    error = raised(callers.chunk(leader))
    assert type(error) is callers.library.ReadTimeout
    rest = callers.chunk(waiter)
    provider.release()
    assert rest.result(PATIENCE) == b"three"
    assert callers.read(waiter) == []
    assert not provider.seen[0].disconnected.is_set()
    assert len(provider.seen) == 1


@pytest.mark.parametrize("name", ["ConnectTimeout", "PoolTimeout", "WriteTimeout"])
def test_a_timeout_of_the_leaders_transport_is_its_own_and_the_next_caller_sends_anew(callers, name):
    library = callers.library

    def script(request, number):
        if number == 1:
            raise getattr(library, name)("the leader's")
        return library.Response(200, json={"number": number})

    inner = Inner(script, held=True)
    client = callers.client(inner)
    leader, *waiters = [callers.post(client) for _ in range(10)]
    inner.release()
    error = raised(leader)
    assert type(error) is getattr(library, name)
    assert str(error) == "the leader's"
    assert {waiter.result(PATIENCE).json()["number"] for waiter in waiters} == {2}
    assert len(inner.requests) == 2
    # Its time for reading is not the upstream request's.
    assert {sent.extensions["timeout"]["read"] for sent in inner.requests} == {None}
    assert {sent.extensions["timeout"]["connect"] for sent in inner.requests} == {PATIENCE}


def test_a_waiter_that_has_waited_for_its_own_connect_timeout_gets_that_and_does_not_begin_again(callers):
    library = callers.library

    def fail(request, number):
        raise library.ConnectTimeout("the leader's")

    inner = Inner(fail, held=True)
    client = callers.client(inner)
    leader = callers.post(client)
    waiters = [callers.post(client, timeout=library.Timeout(PATIENT, connect=1e-9)) for _ in range(10)]
    inner.release()
    assert str(raised(leader)) == "the leader's"
    for waiter in waiters:
        assert type(raised(waiter)) is library.ConnectTimeout
        assert "1e-09 seconds have passed" in str(raised(waiter))
    assert len(inner.requests) == 1


def test_patience_begins_anew_for_a_request_that_the_caller_sends_itself(callers, monkeypatch):
    library = callers.library
    passed = 0.0

    def script(request, number):
        nonlocal passed
        if number == 1:
            passed = 1000.0
            raise library.ConnectTimeout("the leader's")
        time.sleep(0.05)  # so that the caller has to wait
        return library.Response(200, content=b"slow")

    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + passed)
    monkeypatch.setattr(_http_sync, "time", clock)
    monkeypatch.setattr(_http_async, "time", clock)
    monkeypatch.setattr(_http_parts, "time", clock)
    inner = Inner(script, held=True)
    client = callers.client(inner)
    leader = callers.post(client)
    waiter = callers.post(client, timeout=library.Timeout(PATIENCE, connect=None))
    (flight,) = callers.coalescer.flights()
    wait_until(lambda: callers.coalescer._readers(flight.key) == (2, 2))
    inner.release()
    assert type(raised(leader)) is library.ConnectTimeout
    assert waiter.result(PATIENCE).content == b"slow"


# Leaving.


def test_closing_a_response_early_does_not_cut_the_others(callers, provider):
    provider.script = in_halves
    client = callers.client(timeout=PATIENT)
    responses = [callers.open(client, provider.url).result(PATIENCE) for _ in range(5)]
    for response in responses:
        first_half(callers, response)
    for response in responses[:4]:
        callers.leave(response).result(PATIENCE)
    provider.release()
    assert callers.read(responses[4]) == [b"three"]
    assert not provider.seen[0].disconnected.is_set()


def test_when_all_have_closed_their_responses_the_provider_sees_it(callers, provider):
    provider.script = in_halves
    client = callers.client(timeout=PATIENT)
    responses = [callers.open(client, provider.url).result(PATIENCE) for _ in range(5)]
    for response in responses:
        callers.leave(response).result(PATIENCE)
    # It is silent, and no callers are there.
    assert provider.seen[0].disconnected.wait(PATIENCE)
    # Nobody joins what was cut.
    provider.release()
    assert callers.ask(client, provider.url).content == b"one two three"
    assert len(provider.seen) == 2


def test_a_response_that_is_dropped_has_been_left(callers, provider):
    provider.script = in_halves
    client = callers.client(timeout=PATIENT)
    response = callers.open(client, provider.url).result(PATIENCE)
    assert response.status_code == 200
    del response

    def cut():
        # Whatever thread holds or has made it must run once more.
        callers.start(asyncio.sleep, 0) if isinstance(callers, Tasks) else callers.start(int)
        gc.collect()
        return provider.seen[0].disconnected.is_set()

    wait_until(cut)


def test_a_thread_that_leaves_before_the_head_has_its_request_closed_when_that_comes(provider, library):
    provider.script = in_halves
    provider.hold()
    with Threads(library) as callers:
        asked = callers.post(callers.client(), provider.url, timeout=0.05)
        assert type(raised(asked)) is library.ReadTimeout
        provider.wait_for(1)
        provider.release_heads()
        assert provider.seen[0].disconnected.wait(PATIENCE)


@pytest.mark.parametrize("leads", [True, False])
def test_a_cancelled_task_takes_nobody_with_it(provider, library, leads):
    provider.hold()
    with Tasks(library) as callers:
        client = callers.client()
        asked = [callers.post(client, provider.url) for _ in range(5)]
        cancelled = asked.pop(0 if leads else -1)
        cancelled.cancel()
        assert cancelled.cancelled()
        callers.thread.do(lambda: None)
        provider.release()
        assert {each.result(PATIENCE).status_code for each in asked} == {200}
    assert len(provider.seen) == 1


def test_when_all_tasks_are_cancelled_the_provider_sees_it_and_the_next_caller_asks_anew(provider, library):
    provider.hold()
    with Tasks(library) as callers:
        client = callers.client()
        asked = [callers.post(client, provider.url) for _ in range(5)]
        provider.wait_for(1)
        for each in asked:
            each.cancel()
        assert provider.seen[0].disconnected.wait(PATIENCE)
        provider.release()
        assert callers.ask(client, provider.url).status_code == 200
    assert len(provider.seen) == 2


def test_with_finish_an_abandoned_request_goes_on_and_is_retained(provider, library):
    provider.hold()
    with Tasks(library, on_abandoned="finish") as callers:
        client = callers.client()
        asked = callers.post(client, provider.url)
        provider.wait_for(1)
        asked.cancel()
        again = callers.start(client.post, provider.url, json={"term": "alpha"})
        provider.release()
        assert again.result(PATIENCE).status_code == 200
    assert len(provider.seen) == 1
    assert not provider.seen[0].disconnected.is_set()


# Clients.


def test_closing_the_leaders_client_does_not_cut_the_others(callers, provider):
    provider.script = in_halves
    mine, other = callers.client(timeout=PATIENT), callers.client(timeout=PATIENT)
    response = callers.open(mine, provider.url).result(PATIENCE)
    joined = callers.open(other, provider.url).result(PATIENCE)
    first_half(callers, joined)
    callers.leave(response).result(PATIENCE)
    callers.close_client(mine).result(PATIENCE)
    provider.release()
    assert callers.read(joined) == [b"three"]
    assert len(provider.seen) == 1


def test_the_transport_inside_is_closed_with_the_client_but_not_under_its_requests(callers):
    inner = Inner(ok(callers.library), held=True)
    mine, other = callers.client(inner), callers.client(inner)
    asked = callers.post(mine)
    waiter = callers.post(other)
    callers.close_client(mine).result(PATIENCE)
    assert inner.closed == 0
    inner.release()
    assert asked.result(PATIENCE).json() == waiter.result(PATIENCE).json() == {"number": 1}
    wait_until(lambda: inner.closed == 1)
    callers.close_client(other).result(PATIENCE)
    assert inner.closed == 2


def test_entering_and_leaving_a_client_reaches_the_transport_inside(library):
    inner = Inner(ok(library))
    with Threads(library) as callers:
        with callers.client(inner) as client:
            assert inner.entered == 1
            assert client.post(URL).json() == {"number": 1}
            assert inner.closed == 0
        assert inner.closed == 1


async def test_entering_and_leaving_an_async_client_reaches_the_transport_inside(library):
    inner = Inner(ok(library))
    transport = Tasks.transport_kind(inner, coalescer=Tasks.coalescer_kind())
    async with library.AsyncClient(transport=transport) as client:
        assert inner.entered == 1
        assert (await client.post(URL)).json() == {"number": 1}
        assert inner.closed == 0
    assert inner.closed == 1


def test_clients_that_never_sent_anything_close(callers):
    callers.close_client(callers.client()).result(PATIENCE)

"""The real SDKs through the transports: identical requests in flight are one upstream request."""

import asyncio
import contextlib

import pytest
from http_callers import present
from http_sdks import OPENAI, SDKS, warm
from loops import PATIENCE, wait_until
from provider import TEXT, sdk_answer

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce.httpx import AsyncCoalescingTransport, CoalescingTransport

CALLERS = 50


@pytest.fixture(scope="module")
def running(running):
    warm(running)
    return running


@pytest.fixture(params=SDKS, ids=lambda sdk: sdk.name)
def sdk(request):
    return request.param


def wait_for_callers(coalescer, count):
    """Return when so many lead or wait."""
    wait_until(lambda: present(coalescer) == count)


@contextlib.contextmanager
def threads(sdk, provider, coalescer, **options):
    with contextlib.closing(sdk.client(provider, CoalescingTransport(coalescer=coalescer), **options)) as client:
        yield client


def each_has_its_own(answers, sdk):
    """Check that the answers are equal, and that changing one changes no other."""
    assert len(answers) == CALLERS
    assert len({id(answer) for answer in answers}) == CALLERS
    assert all(answer == answers[0] for answer in answers)
    assert {sdk.text(answer) for answer in answers} == {TEXT}
    answers[0].id = "changed"
    answers[0].usage.injected = "changed"
    assert {answer.id for answer in answers[1:]} == {"answer 1"}
    assert not any(hasattr(answer.usage, "injected") for answer in answers[1:])


def test_fifty_threads_are_one_upstream_request(sdk, provider, crew):
    coalescer = BatchCoalescer()
    provider.hold()
    with threads(sdk, provider, coalescer) as client:
        crew.start(CALLERS, lambda _: sdk.ask(client))
        wait_for_callers(coalescer, CALLERS)
        provider.release()
        answers = crew.join()
        assert len(provider.seen) == 1
        # Inside the TTL, too.
        assert sdk.ask(client).id == "answer 1"
    assert len(provider.seen) == 1
    each_has_its_own(answers, sdk)


async def test_fifty_tasks_are_one_upstream_request(sdk, provider):
    coalescer = AsyncBatchCoalescer()
    provider.hold()
    async with sdk.async_client(provider, AsyncCoalescingTransport(coalescer=coalescer)) as client:
        asked = [asyncio.create_task(sdk.ask(client)) for _ in range(CALLERS)]
        await asyncio.to_thread(wait_for_callers, coalescer, CALLERS)
        provider.release()
        answers = await asyncio.gather(*asked)
        assert len(provider.seen) == 1
        assert (await sdk.ask(client)).id == "answer 1"
    assert len(provider.seen) == 1
    each_has_its_own(answers, sdk)


def test_fifty_threads_read_one_stream_while_it_comes(sdk, provider, crew):
    coalescer = BatchCoalescer()
    provider.script = lambda seen: sdk_answer(seen, hold=True)
    begun = []

    def read(_):
        words = []
        with sdk.ask(client, stream=True) as stream:
            for event in stream:
                words.append(sdk.word(event))
                if words[-1] and not any(words[:-1]):
                    begun.append(words[-1])
        return words

    with threads(sdk, provider, coalescer) as client:
        crew.start(CALLERS, read)
        # All have read of it before the provider sends the rest.
        wait_until(lambda: len(begun) == CALLERS)
        provider.release()
        read_words = crew.join()
        assert {"".join(words) for words in read_words} == {TEXT}
        assert len({tuple(words) for words in read_words}) == 1
        # Whoever comes later reads it from the start.
        assert "".join(read(0)) == TEXT
    assert len(provider.seen) == 1


async def test_fifty_tasks_read_one_stream_while_it_comes(sdk, provider):
    coalescer = AsyncBatchCoalescer()
    provider.script = lambda seen: sdk_answer(seen, hold=True)
    begun = asyncio.Semaphore(0)

    async def read():
        words = []
        async with await sdk.ask(client, stream=True) as stream:
            async for event in stream:
                words.append(sdk.word(event))
                if words[-1] and not any(words[:-1]):
                    begun.release()
        return "".join(words)

    async with sdk.async_client(provider, AsyncCoalescingTransport(coalescer=coalescer)) as client:
        asked = [asyncio.create_task(read()) for _ in range(CALLERS)]
        for _ in range(CALLERS):
            await asyncio.wait_for(begun.acquire(), PATIENCE)
        provider.release()
        assert set(await asyncio.gather(*asked)) == {TEXT}
        assert await read() == TEXT
    assert len(provider.seen) == 1


def test_a_stream_and_an_answer_at_once_are_two_requests(sdk, provider):
    with threads(sdk, provider, BatchCoalescer()) as client:
        assert sdk.text(sdk.ask(client)) == TEXT
        with sdk.ask(client, stream=True) as stream:
            assert "".join(sdk.word(event) for event in stream) == TEXT
    assert len(provider.seen) == 2


def test_callers_with_different_keys_never_share(sdk, provider, crew):
    coalescer = BatchCoalescer()
    provider.hold()
    keys = [f"key {number % 5}" for number in range(20)]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(threads(sdk, provider, coalescer, key=key)) for key in keys]
        crew.start(20, lambda number: sdk.ask(clients[number]).id)
        wait_for_callers(coalescer, 20)
        provider.release()
        ids = crew.join()
    assert len(provider.seen) == 5
    answered = {seen.headers["authorization"]: f"answer {seen.number}" for seen in provider.seen}
    assert [answered[f"Bearer {key}"] for key in keys] == ids


@pytest.mark.parametrize("option", ["organization", "project"])
def test_organisations_and_projects_never_share(provider, option):
    coalescer = BatchCoalescer()
    for name in ["one", "two", "one"]:
        with threads(OPENAI, provider, coalescer, **{option: name}) as client:
            OPENAI.ask(client)
    assert [seen.headers[f"openai-{option}"] for seen in provider.seen] == ["one", "two"]


def test_what_clients_send_anew_each_time_does_not_count(sdk, provider):
    """Other timeouts, retry counts, idempotency keys, trace headers and sorts of client are the same request."""
    coalescer = BatchCoalescer()
    with threads(sdk, provider, coalescer) as client:
        for number in range(3):
            sent = {"idempotency-key": f"k{number}", "traceparent": f"00-{number}", "X-Request-Id": f"r{number}"}
            sent |= {"user-agent": f"agent {number}", "x-stainless-retry-count": f"{number}"}
            assert sdk.ask(client, timeout=10 + number, extra_headers=sent).id == "answer 1"
    assert len(provider.seen) == 1


async def test_threads_and_tasks_share_one_request(sdk, provider):
    coalescer = AsyncBatchCoalescer()
    provider.hold()
    async with sdk.async_client(provider, AsyncCoalescingTransport(coalescer=coalescer)) as client:
        with threads(sdk, provider, coalescer.as_sync()) as sync_client:
            one = asyncio.create_task(sdk.ask(client))
            await asyncio.to_thread(provider.wait_for, 1)
            other = asyncio.create_task(asyncio.to_thread(sdk.ask, sync_client))
            await asyncio.to_thread(wait_for_callers, coalescer, 2)
            provider.release()
            assert await one == await other
    assert len(provider.seen) == 1


def test_an_sdks_retries_are_shared_and_a_retained_answer_does_not_take_their_place(sdk, provider, crew):
    coalescer = BatchCoalescer()

    def answer(seen):
        found = sdk_answer(seen)
        if seen.number == 1:
            found.status = 503
            found.headers["retry-after-ms"] = "1"
        return found

    provider.script = answer
    provider.hold()
    with threads(sdk, provider, coalescer, max_retries=1) as client:
        crew.start(10, lambda _: sdk.ask(client).id)
        wait_for_callers(coalescer, 10)
        provider.release()
        assert crew.join() == ["answer 2"] * 10
    assert len(provider.seen) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_retryable_status_is_shared_in_flight_and_not_retained(sdk, provider, crew, status):
    coalescer = BatchCoalescer()

    def answer(seen):
        found = sdk_answer(seen)
        found.status = status
        return found

    def ask(_):
        with pytest.raises(sdk.module.APIStatusError) as info:
            sdk.ask(client)
        assert info.value.status_code == status
        return info.value.response

    provider.script = answer
    provider.hold()
    with threads(sdk, provider, coalescer) as client:
        crew.start(CALLERS, ask)
        wait_for_callers(coalescer, CALLERS)
        provider.release()
        responses = crew.join()
        assert {response.headers["x-request-id"] for response in responses} == {"request 1"}
        assert len({id(response) for response in responses}) == CALLERS
        assert ask(0).headers["x-request-id"] == "request 2"
    assert len(provider.seen) == 2

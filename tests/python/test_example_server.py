"""`examples/server.py` over real HTTP: fifty clients at once of each endpoint, and two tenants."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import httpx2
import pytest
from example_runs import EXAMPLES, load_example, serving
from loops import PATIENCE, wait_until

example = load_example("server")

CLIENTS = 50
ACME, GLOBEX = {"X-API-Key": "key-of-acme"}, {"X-API-Key": "key-of-globex"}


class HeldProvider(example.Provider):
    """A provider that answers when a test lets it: whole answers at once, streams word by word."""

    def __init__(self):
        super().__init__()
        self.released = threading.Event()
        self.words = threading.Semaphore(0)
        self.embedded = Counter()
        self.closed = 0

    def complete(self, prompt):
        self.count("completions")
        assert self.released.wait(PATIENCE)
        return f"plain answer {self.calls['completions']} to {prompt}"

    async def acomplete(self, prompt):
        self.count("completions")
        await asyncio.to_thread(self.released.wait, PATIENCE)
        return f"async answer {self.calls['completions']} to {prompt}"

    async def stream(self, prompt):
        self.count("streams")
        try:
            for word in (f"answer {self.calls['streams']}", "to", prompt):
                await asyncio.to_thread(partial(self.words.acquire, timeout=PATIENCE))
                yield word
        finally:
            self.closed += 1

    async def embed(self, texts):
        self.count("embedding calls")
        self.embedded.update(texts)
        await asyncio.to_thread(self.released.wait, PATIENCE)
        return [[float(text.removeprefix("text ")), 1.0] for text in texts]

    def let_go(self):
        self.released.set()
        self.words.release(1_000)


class Site:
    """The server under test, as its clients and its owner see it."""

    def __init__(self, url, client, provider, coalescer):
        self.url, self.client, self.provider, self.coalescer = url, client, provider, coalescer

    def ask(self, path, prompt="a bond", headers=ACME):
        """Let a client ask; returns its task."""
        request = self.client.get(f"{self.url}{path}", params={"prompt": prompt}, headers=headers)
        return asyncio.create_task(request)

    async def answers(self, asked):
        """Let the provider answer, and return what the clients got."""
        self.provider.let_go()
        responses = await asyncio.gather(*asked)
        assert {response.status_code for response in responses} == {200}
        return [response.json() for response in responses]

    async def until(self, condition):
        await asyncio.to_thread(wait_until, condition)

    async def until_all_wait(self, count, tenant="acme", prompt="a bond"):
        """Return when so many callers wait beside the one that leads."""
        key = example.key_of(tenant, prompt=prompt)
        await self.until(lambda: self.coalescer._waiters(key) == count)

    async def until_all_read(self, count, waiting, tenant="acme"):
        """Return when a stream has so many readers, of whom so many wait for its next word."""
        key = example.key_of(tenant, prompt="a bond")
        await self.until(lambda: self.coalescer._readers(key) == (count, waiting))

    async def read(self, got, headers=ACME):
        """Read a stream as a client does; what it has got is added to the list as it comes."""
        asked = {"params": {"prompt": "a bond"}, "headers": headers}
        async with self.client.stream("GET", f"{self.url}/stream", **asked) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            async for line in response.aiter_lines():
                if line:
                    got.append(line.removeprefix("data: "))

    async def stats(self):
        return (await self.client.get(f"{self.url}/stats")).json()


@pytest.fixture
async def site():
    provider = HeldProvider()
    app = example.make_app(provider)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    with serving(app) as url:
        async with httpx2.AsyncClient(timeout=PATIENCE, trust_env=False, limits=limits) as client:
            yield Site(url, client, provider, app.state.coalescer)
        provider.let_go()


@pytest.mark.parametrize("path", ["/plain", "/async"])
async def test_50_clients_of_one_prompt_are_one_call(site, path):
    asked = [site.ask(path) for _ in range(CLIENTS)]
    await site.until_all_wait(CLIENTS - 1)
    answers = await site.answers(asked)
    assert answers == [{"answer": f"{path[1:]} answer 1 to a bond"}] * CLIENTS
    assert site.provider.calls == {"completions": 1}
    assert await site.answers([site.ask(path)]) == answers[:1]  # retained
    assert site.provider.calls == {"completions": 1}


async def test_clients_of_the_plain_and_the_async_endpoint_share_a_call(site):
    asked = [site.ask(path) for path in ("/plain", "/async") for _ in range(CLIENTS // 2)]
    await site.until_all_wait(CLIENTS - 1)
    answers = await site.answers(asked)
    assert len({answer["answer"] for answer in answers}) == 1
    assert site.provider.calls == {"completions": 1}


@pytest.mark.parametrize("path", ["/plain", "/async"])
async def test_two_tenants_do_not_share(site, path):
    asked = {name: [site.ask(path, headers=key) for _ in range(25)] for name, key in (("a", ACME), ("g", GLOBEX))}
    for tenant in ("acme", "globex"):
        await site.until_all_wait(24, tenant)
    site.provider.released.set()
    got = {name: {answer["answer"] for answer in await site.answers(tasks)} for name, tasks in asked.items()}
    assert site.provider.calls == {"completions": 2}
    assert len(got["a"]) == len(got["g"]) == 1
    # Nor does a tenant get what is retained for the other.
    await site.answers([site.ask(path, "new"), site.ask(path, "new")])
    await site.answers([site.ask(path, "new", GLOBEX)])
    assert site.provider.calls == {"completions": 4}


async def test_50_readers_get_one_stream_word_by_word_also_those_that_come_late(site):
    got = [[] for _ in range(CLIENTS)]
    readers = [asyncio.create_task(site.read(each)) for each in got[:30]]
    await site.until_all_read(30, 30)
    site.provider.words.release()
    await site.until(lambda: all(len(each) == 1 for each in got[:30]))
    readers += [asyncio.create_task(site.read(each)) for each in got[30:]]
    await site.until(lambda: all(len(each) == 1 for each in got))
    await site.until_all_read(CLIENTS, CLIENTS)
    site.provider.words.release(2)
    await asyncio.gather(*readers)
    assert got == [['"answer 1"', '"to"', '"a bond"', "[DONE]"]] * CLIENTS
    assert site.provider.calls == {"streams": 1}
    assert site.provider.closed == 1


async def test_streams_of_two_tenants_are_two(site):
    got = {"acme": [[] for _ in range(25)], "globex": [[] for _ in range(25)]}
    readers = [
        asyncio.create_task(site.read(each, headers))
        for tenant, headers in (("acme", ACME), ("globex", GLOBEX))
        for each in got[tenant]
    ]
    for tenant in got:
        await site.until_all_read(25, 25, tenant)
    site.provider.let_go()
    await asyncio.gather(*readers)
    assert site.provider.calls == {"streams": 2}
    firsts = [{each[0] for each in lists} for lists in got.values()]
    assert sorted(map(len, firsts)) == [1, 1]
    assert firsts[0] != firsts[1]


async def test_a_client_that_hangs_up_leaves_the_stream_and_the_last_one_closes_it(site):
    got = [[] for _ in range(3)]
    readers = [asyncio.create_task(site.read(each)) for each in got]
    await site.until_all_read(3, 3)
    site.provider.words.release()
    await site.until(lambda: all(got))
    for number, left in ((0, 2), (1, 1), (2, 0)):
        readers[number].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await readers[number]
        assert site.provider.closed == 0 or left == 0
        await site.until_all_read(left, left)
    await site.until(lambda: site.provider.closed == 1)
    assert site.provider.calls == {"streams": 1}


async def test_50_clients_with_texts_in_common_have_each_text_embedded_once(site):
    texts = [f"text {number}" for number in range(20)]
    wanted = [[texts[(client + step * 7) % 20] for step in range(3)] for client in range(CLIENTS)]
    keys = [example.key_of("acme", text=text) for text in texts]
    asked = [
        asyncio.create_task(site.client.post(f"{site.url}/embeddings", json={"texts": each}, headers=ACME))
        for each in wanted
    ]
    # Each of the 150 texts is either led or waited for.
    await site.until(lambda: sum(site.coalescer._waiters(key) for key in keys) + 20 == 3 * CLIENTS)
    answers = await site.answers(asked)
    assert answers == [{"embeddings": [[float(text.removeprefix("text ")), 1.0] for text in each]} for each in wanted]
    assert site.provider.embedded == Counter(texts)
    assert site.provider.calls["embedding calls"] < CLIENTS


async def test_embeddings_of_two_tenants_are_two_calls(site):
    requests = [
        site.client.post(f"{site.url}/embeddings", json={"texts": ["text 1", "text 2", "text 1"]}, headers=headers)
        for headers in (ACME, GLOBEX)
    ]
    answers = await site.answers(requests)
    assert answers == [{"embeddings": [[1.0, 1.0], [2.0, 1.0], [1.0, 1.0]]}] * 2
    assert site.provider.embedded == {"text 1": 2, "text 2": 2}
    assert site.provider.calls == {"embedding calls": 2}


async def test_the_stats_tell_what_was_called_and_what_was_saved(site):
    asked = [site.ask("/async") for _ in range(CLIENTS)]
    await site.until_all_wait(CLIENTS - 1)
    await site.answers([*asked])
    stats = await site.stats()
    assert stats["provider"] == {"completions": 1}
    assert (stats["coalescer"]["calls"], stats["coalescer"]["joined"]) == (1, CLIENTS - 1)
    assert stats["coalescer"]["saved_ratio"] == (CLIENTS - 1) / CLIENTS


@pytest.mark.parametrize("path", ["/plain", "/async", "/stream"])
@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "key-of-nobody"}])
async def test_nobody_else_is_served(site, path, headers):
    response = await site.ask(path, headers=headers)
    assert response.status_code == 401
    assert not site.provider.calls


def test_it_runs_as_a_program():
    command = [sys.executable, str(EXAMPLES / "server.py"), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8") as server:
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
            with httpx2.Client(timeout=PATIENCE, trust_env=False, headers=ACME) as client:
                answer = client.get(f"{url}/plain", params={"prompt": "a bond"}).json()
                assert answer == {"answer": "An answer to 'a bond'."}
                assert client.get(f"{url}/async", params={"prompt": "a bond"}).json() == answer
                words = client.get(f"{url}/stream", params={"prompt": "a bond"}).text.split("\n\n")
                assert "".join(json.loads(word[6:]) for word in words[:-2]).strip() == answer["answer"]
                vectors = client.post(f"{url}/embeddings", json={"texts": ["bond", "beta"]}).json()
                assert vectors == {"embeddings": [[4.0, 0.0]] * 2}
                assert client.get(f"{url}/stats").json()["provider"] == {
                    "completions": 1,
                    "streams": 1,
                    "embedding calls": 1,
                    "embedded texts": 2,
                }
        finally:
            server.terminate()

"""`store=` with the caches that people have: dicts, cachetools, cachebox, diskcache across a restart."""

import asyncio
import subprocess
import sys
import threading
from collections import OrderedDict, UserDict

import cachetools
import diskcache
import pytest
from faces import refused

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

INF = float("inf")


class Locked:
    """What the docs advise for caches that are not made for threads."""

    def __init__(self, cache):
        self._cache, self._lock = cache, threading.Lock()

    def get(self, key, default=None):
        with self._lock:
            return self._cache.get(key, default)

    def __setitem__(self, key, value):
        with self._lock:
            self._cache[key] = value


def cachebox_cache(directory):
    return pytest.importorskip("cachebox").TTLCache(100, 60)


STORES = {
    "dict": lambda directory: {},
    "ordered": lambda directory: OrderedDict(),
    "user": lambda directory: UserDict(),
    "lru": lambda directory: cachetools.LRUCache(100),
    "ttl": lambda directory: cachetools.TTLCache(100, 60),
    "tlru": lambda directory: cachetools.TLRUCache(100, ttu=lambda key, value, now: now + 60),
    "locked": lambda directory: Locked(cachetools.TTLCache(100, 60)),
    "cachebox": cachebox_cache,
    "disk": diskcache.Cache,
    "fanout": diskcache.FanoutCache,
}


@pytest.fixture(params=STORES.values(), ids=STORES)
def store(request, tmp_path):
    made = request.param(str(tmp_path))
    yield made
    if hasattr(made, "close"):
        made.close()


def ask_in_thread(store, fn):
    coalescer = BatchCoalescer(INF, store=store)
    return coalescer.get_or_call("k", fn), coalescer.stats()


def ask_in_task(store, fn):
    async def call():
        return fn()

    coalescer = AsyncBatchCoalescer(INF, store=store)
    return asyncio.run(coalescer.get_or_call("k", call)), coalescer.stats()


@pytest.mark.parametrize("ask", [ask_in_thread, ask_in_task])
@pytest.mark.parametrize("value", ["answer", None, 0, ("a", 1)], ids=repr)
def test_what_one_coalescer_has_called_for_another_finds_in_the_store(store, ask, value):
    got, stats = ask(store, lambda: value)
    assert (got, stats.calls, stats.store_hits, stats.store_errors) == (value, 1, 0, 0)
    assert store.get("k", "nothing") == value
    got, stats = ask(store, refused)
    assert (got, stats.calls, stats.store_hits, stats.store_errors) == (value, 0, 1, 0)


def test_a_none_that_the_store_holds_is_a_value_where_get_takes_a_default(store):
    store["k"] = None
    coalescer = BatchCoalescer(store=store)
    assert coalescer.get_or_call("k", refused) is None
    assert coalescer.stats().store_hits == 1


def test_threads_share_a_cache_of_cachetools_behind_a_lock(crew):
    store, calls, keys = Locked(cachetools.TTLCache(1_000, 600)), [], range(50)

    def ask(number):
        for turn in range(4):
            # Each has maps of its own: only the store is shared.
            coalescer = BatchCoalescer(store=store)
            for key in keys:
                wanted = (key + number + turn) % len(keys)
                assert coalescer.get_or_call(wanted, lambda wanted=wanted: calls.append(wanted) or str(wanted)) == str(
                    wanted
                )
            assert coalescer.stats().store_errors == 0
            assert coalescer.stats().calls + coalescer.stats().store_hits == len(keys)

    crew.start(8, ask).join()
    assert set(calls) == set(keys)
    # After its first turn each thread finds all of them there.
    assert len(calls) <= 8 * len(keys)
    assert BatchCoalescer(store=store).get_or_call_many(keys, refused) == {key: str(key) for key in keys}


@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_a_restarted_process_finds_what_the_one_before_has_stored(tmp_path, kind):
    script = f"""
import asyncio, diskcache, sys
from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

calls = []

def answer(missing):
    calls.extend(missing)
    return [dict(key=key, process=sys.argv[1]) for key in missing]

with diskcache.Cache({str(tmp_path)!r}) as cache:
    if {kind!r} == "threads":
        coalescer = BatchCoalescer(store=cache)
        got = coalescer.get_or_call_many(["a", ("b", 1)], answer)
        got["single"] = coalescer.get_or_call("single", lambda: answer(["single"])[0])
    else:
        coalescer = AsyncBatchCoalescer(store=cache)
        async def later(missing):
            return answer(missing)
        async def one():
            return answer(["single"])[0]
        async def main():
            got = await coalescer.get_or_call_many(["a", ("b", 1)], later)
            return got | dict(single=await coalescer.get_or_call("single", one))
        got = asyncio.run(main())
    stats = coalescer.stats()
    print(len(calls), stats.store_hits, stats.store_errors, *(value["process"] for value in got.values()))
"""

    def run(name):
        done = subprocess.run(
            [sys.executable, "-c", script, name], capture_output=True, text=True, timeout=50, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert run("first") == ["3", "0", "0", *["first"] * 3]
    assert run("second") == ["0", "3", "0", *["first"] * 3]


def test_tasks_may_put_the_work_of_a_plain_store_into_threads(tmp_path):
    """The way that the docs show for a store that is slow: an async one around it."""

    class InThreads:
        def __init__(self, cache):
            self._cache = cache

        async def get(self, key):
            return await asyncio.to_thread(self._cache.get, key)

        async def set(self, key, value, ttl_seconds):
            await asyncio.to_thread(self._cache.__setitem__, key, value)

    async def answer(missing):
        return [key.upper() for key in missing]

    async def refuse(missing):
        raise AssertionError(missing)

    store = InThreads(Locked(cachetools.LRUCache(10)))
    first, second = (AsyncBatchCoalescer(store=store) for _ in range(2))
    assert asyncio.run(first.get_or_call_many(["a", "b"], answer)) == {"a": "A", "b": "B"}
    assert asyncio.run(second.get_or_call_many(["a", "b"], refuse)) == {"a": "A", "b": "B"}

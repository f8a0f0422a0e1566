"""`store=`: what the leader asks before it calls, and tells when its call has succeeded."""

import asyncio
import gc
import logging
import threading
import weakref

import pytest
from batches import ask_many, batch, held_batch, lead_many
from faces import FACES, AskedInThread, Threads, outcomes, refused
from loops import PATIENCE, let_run, wait_for_waiters
from stores import (
    AsyncBrokenStore,
    AsyncStore,
    AwaitableStore,
    BrokenStore,
    DefaultStore,
    KeywordStore,
    MappingStore,
    TtlStore,
)

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, MissingKeysError, RecursiveCallError, Retain

INF = float("inf")


class Stop(BaseException):
    """For the leader alone; the next waiter leads."""


class LimitError(Exception):
    """Is private."""


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


def kinds(*of_all, of_tasks=AsyncStore):
    """Faces with the kinds of stores that they can use."""
    pairs = [(face, store) for face in FACES for store in (*of_all, *([] if face is Threads else [of_tasks]))]
    return pytest.mark.parametrize(
        ("face", "store"), pairs, ids=[f"{face.__name__}-{store.__name__}" for face, store in pairs], indirect=["face"]
    )


ALL = kinds(TtlStore, DefaultStore, KeywordStore, MappingStore)
TWO = kinds(TtlStore)


def counted(coalescer):
    """Calls, joined, hits, store hits and store errors."""
    stats = coalescer.stats()
    return stats.calls, stats.joined, stats.hits, stats.store_hits, stats.store_errors


# Asking and telling.


@ALL
def test_a_leader_whom_the_store_serves_makes_no_call_and_counts_as_a_hit(face, store):
    store = store(k="stored")
    coalescer = face.coalescer(INF, store=store)
    outcome = face.ask(coalescer, refused, method="outcome")
    assert (outcome.value, outcome.role, outcome.waiters) == ("stored", "hit", 0)
    assert counted(coalescer) == (0, 0, 1, 1, 0)
    # It is retained from then on, and the store is left alone.
    assert face.ask(coalescer, refused) == coalescer.peek("k") == "stored"
    assert (store.asked, store.told) == (["k"], [])
    assert counted(coalescer) == (0, 0, 2, 1, 0)
    assert coalescer.stats().saved_ratio == 1.0
    coalescer.reset_stats()
    assert counted(coalescer) == (0, 0, 0, 0, 0)


@ALL
def test_what_the_store_does_not_have_is_called_for_and_told_to_it(face, store):
    store, value = store(), object()
    coalescer = face.coalescer(5, store=store)
    outcome = face.ask(coalescer, face.callable(lambda: value), method="outcome")
    assert (outcome.value is value, outcome.role) == (True, "leader")
    assert store.asked == ["k"]
    assert store.told == [("k", value) if type(store) is MappingStore else ("k", value, 5.0)]
    assert counted(coalescer) == (1, 0, 0, 0, 0)
    # Another coalescer, perhaps of another process, finds it there.
    assert face.ask(face.coalescer(store=store), refused) is value


@TWO
@pytest.mark.parametrize(
    ("result", "options", "told"),
    [
        ("v", {}, 5.0),
        ("v", {"ttl_seconds": 7}, 7.0),
        ("v", {"ttl_seconds": 0.25}, 0.25),
        ("v", {"ttl_seconds": INF}, INF),
        (Retain("v", 3), {}, 3.0),
        (Retain("v", INF), {"ttl_seconds": 7}, INF),
        (Retain("v", 0), {}, None),
        ("v", {"ttl_seconds": 0}, None),
    ],
)
def test_the_store_is_told_how_long_the_value_is_retained(face, store, result, options, told):
    store = store()
    coalescer = face.coalescer(5, store=store)
    assert face.ask(coalescer, face.callable(lambda: result), **options) == "v"
    many = dict.fromkeys("ab", result)
    assert ask_many(face, coalescer, "ab", batch(face, lambda missing: many), **options) == {"a": "v", "b": "v"}
    # What is not retained is not written.
    assert store.told == ([] if told is None else [("k", "v", told), ("a", "v", told), ("b", "v", told)])


@TWO
@pytest.mark.parametrize("error", [LookupError, LimitError, Stop])
def test_errors_are_not_written(face, store, error):
    store = store()
    coalescer = face.coalescer(INF, store=store, private_errors=LimitError)

    def fail(*_):
        raise error

    assert type(outcomes([face.start(coalescer, face.callable(fail))])[0]) is error
    with pytest.raises(error):
        ask_many(face, coalescer, ["a", "b"], batch(face, fail))
    assert (store.asked, store.told) == (["k", "a", "b"], [])


@TWO
@pytest.mark.parametrize("drop", ["forget", "clear", "cancel", "put"])
def test_what_was_dropped_during_the_call_is_not_written(face, store, drop):
    store = store()
    coalescer, held, batch_held = face.coalescer(INF, store=store), face.held("value"), held_batch(face)
    callers = [face.lead(coalescer, held), *face.join(coalescer, 1)]
    leader = lead_many(face, coalescer, ["a", "b"], batch_held)
    for key in "ka":
        getattr(coalescer, drop)(*{"clear": (), "put": (key, "newer")}.get(drop, (key,)))
    held.release()
    batch_held.release()
    values = outcomes(callers)
    assert values[0] == "value"
    assert type(values[1]) is face.cancelled_error if drop == "cancel" else values[1] == "value"
    assert leader.result() == {"a": "of a", "b": "of b"}
    assert store.told == ([] if drop == "clear" else [("b", "of b", INF)])


@TWO
def test_a_coalescer_that_retains_nothing_reads_its_store_and_writes_nothing(face, store):
    store = store(k="stored")
    coalescer = face.coalescer(0, store=store)
    for _ in range(2):
        assert face.ask(coalescer, refused) == "stored"
    assert face.ask(coalescer, face.callable(lambda: "new"), "other") == "new"
    assert (store.asked, store.told, len(coalescer)) == (["k", "k", "other"], [], 0)


@TWO
def test_to_put_and_to_forget_does_not_reach_the_store(face, store):
    store = store()
    coalescer = face.coalescer(INF, store=store)
    coalescer.put("k", "primed")
    assert (store.asked, store.told) == ([], [])
    store.values["k"] = "stored"
    coalescer.forget("k")
    assert face.ask(coalescer, refused) == "stored"
    coalescer.clear()
    assert face.ask(coalescer, refused) == "stored"
    assert counted(coalescer) == (0, 0, 2, 2, 0)


def test_those_who_wait_while_the_store_is_asked_are_served_with_the_leader():
    coalescer = BatchCoalescer(INF, store=(store := TtlStore(k="stored")))
    asked, go, get = threading.Event(), threading.Event(), store.get

    def slow(key):
        asked.set()
        assert go.wait(PATIENCE)
        return get(key)

    coalescer._store._get = slow
    leader, waiter = (AskedInThread(lambda: coalescer.outcome("k", refused), None) for _ in range(2))
    assert asked.wait(PATIENCE)
    wait_for_waiters(coalescer, "k", 1)
    go.set()
    assert sorted((each.value, each.role) for each in outcomes([leader, waiter])) == [
        ("stored", "hit"),
        ("stored", "waiter"),
    ]
    assert counted(coalescer) == (0, 1, 1, 1, 0)


@TWO
def test_who_takes_over_asks_the_store_again(face, store):
    store = store()
    coalescer, held = face.coalescer(INF, store=store, private_errors=LimitError), face.held(error=LimitError())
    leader, heir = face.lead(coalescer, held), face.start(coalescer, refused, method="outcome")
    store.values["k"] = "stored meanwhile"
    held.release()
    assert outcomes([leader]) == [held.error]
    assert (heir.result().value, heir.result().role) == ("stored meanwhile", "hit")
    assert counted(coalescer) == (1, 0, 1, 1, 0)


@pytest.mark.parametrize("kind", [DefaultStore, KeywordStore, MappingStore])
@pytest.mark.parametrize("value", [None, False, 0, "", []], ids=repr)
def test_what_is_false_is_a_value_where_get_takes_a_default(face, kind, value):
    assert face.ask(face.coalescer(store=kind(k=value)), refused) is value


@TWO
def test_of_a_get_without_a_default_none_is_a_miss_and_what_is_false_is_not(face, store):
    store = store(none=None, zero=0, empty="")
    coalescer = face.coalescer(store=store)
    assert [face.ask(coalescer, refused, key) for key in ("zero", "empty")] == [0, ""]
    assert face.ask(coalescer, face.callable(lambda: "called"), "none") == "called"


# Many keys.


@TWO
def test_a_batch_asks_for_each_key_that_it_leads_and_calls_for_the_rest(face, store):
    store, asked = store(b="stored b", d="stored d", hit="stored, too"), []
    coalescer = face.coalescer(9, store=store)
    coalescer.put("hit", "retained")

    def work(missing):
        asked.append(list(missing))
        return [f"of {key}" for key in missing]

    values = {"a": "of a", "b": "stored b", "hit": "retained", "c": "of c", "d": "stored d"}
    assert list(ask_many(face, coalescer, list(values), batch(face, work)).items()) == list(values.items())
    assert (asked, store.asked) == ([["a", "c"]], ["a", "b", "c", "d"])
    assert store.told == [("a", "of a", 9.0), ("c", "of c", 9.0)]
    assert counted(coalescer) == (2, 0, 3, 2, 0)
    assert ask_many(face, coalescer, "abcd") == {key: values[key] for key in "abcd"}
    # Where the store has all, nothing is called.
    assert ask_many(face, face.coalescer(store=store), "abcd") == {key: values[key] for key in "abcd"}


@TWO
def test_a_batch_that_lacks_keys_writes_the_others(face, store):
    store = store(b="stored")
    with pytest.raises(MissingKeysError) as info:
        ask_many(face, face.coalescer(9, store=store), "abc", batch(face, lambda missing: {"a": "A"}))
    assert (info.value.missing, info.value.values) == (["c"], {"a": "A", "b": "stored"})
    assert store.told == [("a", "A", 9.0)]


async def test_what_nobody_waits_for_any_more_is_not_called_for():
    asked, go, called = asyncio.Event(), asyncio.Event(), []

    class Slow(AsyncStore):
        async def get(self, key):
            asked.set()
            await go.wait()
            return await super().get(key)

    async def work(missing):
        called.append(missing)
        return missing

    coalescer = AsyncBatchCoalescer(store=Slow(a="stored"))
    leader = asyncio.create_task(coalescer.get_or_call_many(["a", "b"], work))
    await asked.wait()
    waiter = asyncio.create_task(coalescer.get_or_call("a", refused))
    await let_run()
    leader.cancel()
    await asyncio.wait([leader])
    go.set()
    assert await waiter == "stored"
    await let_run()
    assert (called, coalescer.stats().in_flight) == ([], 0)


# Stores that fail.


@kinds(BrokenStore, of_tasks=AsyncBrokenStore)
@pytest.mark.parametrize("name", [None, "answers"])
@pytest.mark.parametrize("verb", ["get", "set"])
def test_a_store_that_raises_is_logged_and_counted_and_taken_for_a_miss(face, store, verb, name, caplog):
    store = store({verb: OSError("disk full")}, stored="in vain")
    coalescer = face.coalescer(INF, store=store, name=name)
    with caplog.at_level(logging.DEBUG):
        assert face.ask(coalescer, face.callable(lambda: "value"), "secret") == "value"
    (record,) = [record for record in caplog.records if record.name == "llm_batch_coalesce"]
    assert record.levelno == logging.WARNING
    said = f"the store{' in coalescer ' + repr(name) if name else ''} failed to {verb} a key of type str with digest "
    assert record.getMessage().startswith(said)
    assert "disk full" in record.getMessage()
    assert "secret" not in record.getMessage()
    assert record.exc_info[1].args == ("disk full",)
    assert counted(coalescer) == (1, 0, 0, 0, 1)
    assert coalescer.peek("secret") == "value"
    assert store.told == ([] if verb == "set" else [("secret", "value", INF)])
    # A batch counts each key.
    assert ask_many(face, coalescer, ["a", "b"], batch(face)) == {"a": "of a", "b": "of b"}
    assert counted(coalescer) == (3, 0, 0, 0, 3)


@kinds(BrokenStore, of_tasks=AsyncBrokenStore)
@pytest.mark.parametrize("verb", ["get", "set"])
def test_what_is_no_exception_out_of_a_store_is_for_the_leader_alone(face, store, verb):
    error = Stop()
    store = store({verb: error})
    coalescer = face.coalescer(INF, store=store)
    assert outcomes([face.start(coalescer, face.callable(lambda: "value"))]) == [error]
    with pytest.raises(Stop):
        ask_many(face, coalescer, ["a", "b"], batch(face))
    assert (len(coalescer), coalescer.stats().in_flight, coalescer.stats().store_errors) == (0, 0, 0)
    store.errors.clear()
    assert face.ask(coalescer, face.callable(lambda: "value")) == "value"


def test_a_store_that_asks_for_the_key_it_is_asked_for_is_told():
    told = []

    class Asking(TtlStore):
        def get(self, key):
            try:
                return coalescer.get_or_call(key, refused)
            except RecursiveCallError as error:
                told.append(error)
                raise

    coalescer = BatchCoalescer(store=Asking())
    assert coalescer.get_or_call("k", lambda: "value") == "value"
    assert coalescer.get_or_call_many(["a"], lambda missing: missing) == {"a": "a"}
    assert len(told) == coalescer.stats().store_errors == 2


# Stores to be awaited.


def test_threads_count_what_they_would_have_to_await_as_a_failure(caplog):
    coalescer = BatchCoalescer(store=AwaitableStore(k="stored"))
    assert coalescer.get_or_call("k", lambda: "value") == "value"
    assert coalescer.get_or_call_many(["a"], lambda missing: missing) == {"a": "a"}
    assert counted(coalescer) == (2, 0, 0, 0, 4)
    said = [record for record in caplog.records if "threads cannot await what the s" in record.getMessage()]
    assert len(said) == 4


async def test_tasks_await_whatever_is_awaitable():
    coalescer = AsyncBatchCoalescer(store=(store := AwaitableStore(k="stored")))
    assert await coalescer.get_or_call("k", refused) == "stored"
    assert await coalescer.get_or_call("new", lambda: asyncio.sleep(0, "value")) == "value"
    assert (store.told, counted(coalescer)) == ([("new", "value", 5.0)], (1, 0, 1, 1, 0))


def test_threads_refuse_an_async_store():
    with pytest.raises(TypeError, match="store must not be async for threads"):
        BatchCoalescer(store=AsyncStore())
    coalescer = AsyncBatchCoalescer(store=AsyncStore(), name="answers")
    with pytest.raises(TypeError, match="threads cannot await the store of <AsyncBatchCoalescer 'answers'"):
        coalescer.as_sync()
    with pytest.raises(TypeError, match="threads cannot await"):
        coalescer.coalesced()(len)


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize("store", [5, "text", [], object(), {1}, type("G", (), {"get": len})()], ids=type)
def test_what_is_no_store_is_refused(kind, store):
    with pytest.raises(TypeError, match=r"store must have get\(\) and __setitem__\(\), or get\(\) and set"):
        kind(store=store)


# What faces share, and who keeps whom alive.


def test_faces_share_the_store_and_what_is_counted():
    threads = BatchCoalescer(store=(store := TtlStore(a="A", b="B")))
    tasks = threads.as_async()
    assert (threads.get_or_call("a", refused), asyncio.run(tasks.get_or_call("b", refused))) == ("A", "B")
    assert tasks.as_sync().get_or_call("c", lambda: "C") == "C"
    assert counted(threads) == counted(tasks) == (1, 0, 2, 2, 0)
    assert store.told == [("c", "C", 5.0)]


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
def test_a_cycle_of_store_and_coalescer_is_collected(kind):
    store = TtlStore()
    store.coalescer = kind(store=store)
    watched = weakref.ref(store)
    gc.collect()
    assert watched().coalescer._store is not None
    del store
    gc.collect()
    assert watched() is None


def test_streams_do_not_use_the_store():
    coalescer = BatchCoalescer(store=(store := TtlStore(k="stored")))
    assert list(coalescer.stream("k", lambda: iter([1, 2]))) == [1, 2]
    assert (store.asked, store.told) == ([], [])

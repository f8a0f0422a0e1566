"""Any hashable object is a key, equal as in a dict, whatever its methods do."""

import threading

import pytest

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer


class Key:
    """Equal by name; `on_compare` runs whenever two of them are compared."""

    def __init__(self, name, hashed=42, on_compare=None):
        self.name, self.hashed, self.on_compare = name, hashed, on_compare

    def __hash__(self):
        return self.hashed

    def __eq__(self, other):
        if self.on_compare is not None:
            self.on_compare()
        if other.on_compare is not None:
            other.on_compare()
        return self.name == other.name


@pytest.fixture(params=["threads", "tasks"])
def ask(request):
    """Ask a new coalescer as threads or as tasks do, one request after the other."""
    if request.param == "threads":
        coalescer = BatchCoalescer(ttl_seconds=60.0)
        return coalescer, coalescer.get_or_call
    coalescer = AsyncBatchCoalescer(ttl_seconds=60.0)

    def run(key, fn):
        import asyncio

        async def call():
            return fn()

        return asyncio.run(coalescer.get_or_call(key, call))

    return coalescer, run


@pytest.mark.parametrize(
    "keys",
    [
        (1, 1.0, True),
        (0, 0.0, -0.0, False),
        ("word", str(b"word", "ascii")),
        (b"word", bytes(bytearray(b"word"))),
        (2**70, float(2**70)),
        (("a", 1), ("a", 1.0)),
        (frozenset({1, 2}), frozenset({2.0, 1})),
        (None,),
    ],
)
def test_keys_equal_in_a_dict_are_one(ask, keys):
    coalescer, get_or_call = ask
    results = [get_or_call(key, object) for key in keys]
    assert all(result is results[0] for result in results)
    assert len(coalescer) == 1


def test_keys_that_differ_are_kept_apart(ask):
    coalescer, get_or_call = ask
    keys = ["1", 1, b"1", (1,), 2, "2", -1, -2, 2**61 - 1, float("inf"), frozenset()]
    for key in keys:
        assert get_or_call(key, lambda key=key: [key]) == [key]
    for key in keys:
        assert get_or_call(key, pytest.fail) == [key]
    assert len(coalescer) == len(keys)


def test_nan_is_found_by_identity_as_in_a_dict(ask):
    _, get_or_call = ask
    nan, other = float("nan"), float("nan")
    assert get_or_call(nan, object) is get_or_call(nan, object)
    assert get_or_call(nan, object) is not get_or_call(other, object)


def test_a_thousand_keys_with_one_hash_work(ask):
    coalescer, get_or_call = ask
    for number in range(1_000):
        get_or_call(Key(number), lambda number=number: number)
    assert len(coalescer) == 1_000
    assert [get_or_call(Key(number), pytest.fail) for number in range(1_000)] == list(range(1_000))


def test_an_eq_that_raises_reaches_the_caller_and_changes_nothing(ask):
    coalescer, get_or_call = ask
    get_or_call(Key("a"), lambda: "a's")

    def explode():
        raise ZeroDivisionError("in __eq__")

    with pytest.raises(ZeroDivisionError, match="in __eq__"):
        get_or_call(Key("b", on_compare=explode), lambda: "b's")
    with pytest.raises(ZeroDivisionError, match="in __eq__"):
        Key("b", on_compare=explode) in coalescer  # noqa: B015 - the comparison is what is tested
    assert len(coalescer) == 1
    assert get_or_call(Key("a"), pytest.fail) == "a's"
    # The next request is not told of the old error.
    assert get_or_call(Key("b"), lambda: "b's") == "b's"


def test_a_hash_that_raises_reaches_the_caller(ask):
    coalescer, get_or_call = ask

    class Unhashed:
        def __hash__(self):
            raise ZeroDivisionError("in __hash__")

    with pytest.raises(ZeroDivisionError, match="in __hash__"):
        get_or_call(Unhashed(), lambda: 1)
    assert len(coalescer) == 0


def test_an_eq_that_calls_the_coalescer_again_is_harmless():
    coalescer = BatchCoalescer(ttl_seconds=60.0)
    numbers = iter(range(10**9))

    def insert():
        coalescer.get_or_call(("inserted", next(numbers)), lambda: None)
        coalescer.get_or_call(Key("a", on_compare=None), pytest.fail)

    coalescer.get_or_call(Key("a"), lambda: "a's")
    for _ in range(200):
        assert coalescer.get_or_call(Key("a", on_compare=insert), pytest.fail) == "a's"
    assert len(coalescer) == 1 + next(numbers)


def test_threads_whose_keys_insert_into_the_same_table_do_not_lock_each_other(crew):
    coalescer = BatchCoalescer(ttl_seconds=60.0)

    inserted = []

    def work(number):
        def insert():
            # Appending is atomic; other threads come here too, through the keys that they find stored.
            key = (number, len(inserted), threading.get_ident(), object())
            inserted.append(key)
            coalescer.get_or_call(key, lambda: number)

        for name in range(25):
            assert coalescer.get_or_call(Key(name, on_compare=insert), lambda name=name: name) == name

    crew.start(4, work).join()
    assert len(coalescer) == len(inserted) + 25
    assert all(key in coalescer for key in inserted)


def test_an_eq_that_sleeps_blocks_nobody_else(crews):
    coalescer = BatchCoalescer(ttl_seconds=60.0)
    comparing, go_on = threading.Event(), threading.Event()

    def block():
        comparing.set()
        assert go_on.wait(30)

    coalescer.get_or_call(Key("a"), lambda: "a's")
    sleeper = crews().start(1, lambda _: coalescer.get_or_call(Key("a", on_compare=block), pytest.fail))
    assert comparing.wait(30)
    # The same hash, so the same shard and slot.
    for name in range(300):
        assert coalescer.get_or_call(Key(name), lambda name=name: name) == name
    coalescer.clear()
    assert coalescer.get_or_call(Key("a"), lambda: "new") == "new"
    go_on.set()
    # What was dropped while it compared is not served.
    assert sleeper.join() == ["new"]
    assert coalescer.get_or_call(Key("a"), pytest.fail) == "new"

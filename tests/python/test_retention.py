"""How long an outcome is retained: TTLs by call, by result and by error, and the limit on their number."""

import asyncio
import logging
import types

import pytest
from faces import FACES, outcomes, refused

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, RecursiveCallError, Retain, _core

INF = float("inf")


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


class Work:
    """Counts its calls; each gives the next number, or the error."""

    def __init__(self, error=None, ttl=None):
        self.error, self.ttl = error, ttl
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.calls if self.ttl is None else Retain(self.calls, self.ttl)


def calls_after(face, coalescer, work, *pauses, **options):
    """How often the work has been called when it was asked for at once and after each pause."""
    calls = []
    for pause in (0, *pauses):
        _core._advance_clock(pause)
        outcomes([face.start(coalescer, face.callable(work), **options)])
        calls.append(work.calls)
    return calls


# By call.


@pytest.mark.parametrize(
    ("ttl", "calls"),
    [(None, [1, 1, 2]), (0, [1, 2, 3]), (1, [1, 2, 3]), (60, [1, 1, 1]), (INF, [1, 1, 1]), (60**9, [1, 1, 1])],
)
@pytest.mark.parametrize("error", [None, LookupError("no such model")])
def test_a_call_may_set_the_ttl_of_its_outcome(face, ttl, calls, error):
    assert calls_after(face, face.coalescer(10), Work(error), 5, 6, ttl_seconds=ttl) == calls


def test_the_ttl_of_a_call_is_its_leaders(face):
    coalescer, held = face.coalescer(10), face.held("value")
    callers = [face.lead(coalescer, held, ttl_seconds=60), *face.join(coalescer, 2, ttl_seconds=1)]
    held.release()
    assert outcomes(callers) == ["value"] * 3
    # Nor does a hit change it.
    assert face.ask(coalescer, refused, ttl_seconds=0) == "value"
    _core._advance_clock(50)
    assert face.ask(coalescer, refused) == "value"
    _core._advance_clock(11)
    assert "k" not in coalescer


def test_the_ttl_of_a_waiter_that_takes_over_is_its_own(face):
    coalescer = face.coalescer(10, private_errors=LookupError)
    held = face.held(error=LookupError())
    leader = face.lead(coalescer, held, ttl_seconds=0)
    (heir,) = face.join(coalescer, 1, face.callable(lambda: "value"), ttl_seconds=60)
    held.release()
    assert type(outcomes([leader])[0]) is LookupError
    assert heir.result() == "value"
    _core._advance_clock(50)
    assert face.ask(coalescer, refused) == "value"


@pytest.mark.parametrize("method", ["get_or_call", "outcome"])
def test_a_call_may_be_retained_where_the_coalescer_retains_nothing(face, method):
    work = Work()
    assert calls_after(face, face.coalescer(0), work, 5, 6, method=method, ttl_seconds=10) == [1, 1, 2]


# By result.


@pytest.mark.parametrize(("ttl", "calls"), [(0, [1, 2, 3]), (1, [1, 2, 3]), (60, [1, 1, 1]), (INF, [1, 1, 1])])
@pytest.mark.parametrize("by_call", [None, 0, 3])
def test_a_result_may_set_its_ttl_before_that_of_the_call(face, ttl, calls, by_call):
    assert calls_after(face, face.coalescer(10), Work(ttl=ttl), 5, 6, ttl_seconds=by_call) == calls


def test_callers_get_what_retain_holds(face):
    coalescer, value = face.coalescer(10), object()
    held = face.held(Retain(value, 60))
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    held.release()
    assert [outcome is value for outcome in outcomes(callers)] == [True] * 3
    assert face.ask(coalescer, refused) is value
    assert face.ask(coalescer, refused, method="outcome").value is value
    assert coalescer.peek("k") is value


def test_a_result_that_is_not_to_be_retained_is_shared_all_the_same(face):
    coalescer = face.coalescer(10)
    held = face.held(Retain("value", 0))
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    held.release()
    assert outcomes(callers) == ["value"] * 3
    assert "k" not in coalescer


def test_retain_shows_what_it_was_given():
    retain = Retain("value", ttl_seconds=2)
    assert (retain.value, retain.ttl_seconds) == ("value", 2.0)
    assert repr(retain) == "Retain('value', ttl_seconds=2)"
    assert repr(Retain([1], INF)) == "Retain([1], ttl_seconds=inf)"
    for name in ("value", "ttl_seconds"):
        with pytest.raises(AttributeError):
            setattr(retain, name, 1)


def test_retain_is_generic_in_annotations_and_final():
    alias = Retain[str]
    assert isinstance(alias, types.GenericAlias)
    assert (alias.__origin__, alias.__args__) == (Retain, (str,))
    assert alias("value", 1).value == "value"
    with pytest.raises(TypeError):
        type("Sub", (Retain,), {})


@pytest.mark.parametrize(
    ("ttl", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("5", TypeError), (None, TypeError)],
)
def test_retain_refuses_a_wrong_ttl(ttl, error):
    with pytest.raises(error, match="ttl_seconds") as info:
        Retain("value", ttl)
    assert repr(ttl) in str(info.value)
    with pytest.raises(TypeError, match="ttl_seconds"):
        Retain("value")


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
def test_put_refuses_a_retain(kind):
    coalescer = kind()
    coalescer.put("k", "old")
    with pytest.raises(TypeError, match="Retain"):
        coalescer.put("k", Retain("new", 60))
    assert coalescer.peek("k") == "old"


# By error.


@pytest.mark.parametrize(
    ("fixed", "by_call", "calls"),
    [(None, None, [1, 1, 2]), (0, None, [1, 2, 3]), (60, None, [1, 1, 1]), (0, 60, [1, 2, 3]), (60, 0, [1, 1, 1])],
)
def test_a_fixed_error_ttl_stands_before_those_of_values(face, fixed, by_call, calls):
    coalescer = face.coalescer(10, error_ttl_seconds=fixed)
    assert calls_after(face, coalescer, Work(LookupError()), 5, 6, ttl_seconds=by_call) == calls


@pytest.mark.parametrize(
    ("seconds", "by_call", "calls"),
    [
        (60, None, [1, 1, 1]),
        (3, None, [1, 2, 3]),
        (0, None, [1, 2, 3]),
        (INF, 1, [1, 1, 1]),
        (None, None, [1, 1, 2]),
        (None, 60, [1, 1, 1]),
        (None, 0, [1, 2, 3]),
    ],
)
def test_a_callable_tells_how_long_an_error_is_retained(face, caplog, seconds, by_call, calls):
    coalescer = face.coalescer(10, error_ttl_seconds=lambda error: error.args[0])
    assert calls_after(face, coalescer, Work(LookupError(seconds)), 5, 6, ttl_seconds=by_call) == calls
    assert not caplog.records


def test_the_callable_is_asked_once_a_call_with_the_very_error_and_never_of_values(face):
    seen = []
    coalescer, error = face.coalescer(10, error_ttl_seconds=seen.append), LookupError()
    held = face.held(error=error)
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    held.release()
    assert [type(caught) for caught in outcomes(callers)] == [LookupError] * 3
    assert type(outcomes([face.start(coalescer, refused)])[0]) is LookupError
    assert face.ask(coalescer, face.callable(lambda: "value"), "other") == "value"
    assert [asked is error for asked in seen] == [True]


def broken(_):
    raise ZeroDivisionError("in error_ttl_seconds")


@pytest.mark.parametrize(
    ("decide", "cause"),
    [
        (broken, ZeroDivisionError),
        (lambda: 1, TypeError),
        (lambda _: -1, ValueError),
        (lambda _: float("nan"), ValueError),
        (lambda _: True, TypeError),
        (lambda _: "60", TypeError),
        (lambda _: Retain("value", 60), TypeError),
    ],
)
def test_where_the_callable_fails_the_error_is_shared_and_not_retained_and_that_is_logged(face, caplog, decide, cause):
    coalescer, error = face.coalescer(10, error_ttl_seconds=decide), LookupError("no such model")
    held = face.held(error=error)
    callers = [face.lead(coalescer, held), *face.join(coalescer, 3)]
    held.release()
    caught = outcomes(callers)
    assert caught[0] is error
    assert [repr(copy) for copy in caught] == ["LookupError('no such model')"] * 4
    assert error.__context__ is None
    assert "k" not in coalescer
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("llm_batch_coalesce", logging.ERROR)
    assert "LookupError" in record.getMessage()
    assert record.exc_info[0] is cause
    assert face.ask(coalescer, face.callable(lambda: "value")) == "value"


def test_a_callable_that_asks_for_the_key_itself_is_told_so(caplog):
    coalescer = BatchCoalescer(error_ttl_seconds=lambda _: coalescer.get_or_call("k", refused))

    def fail():
        raise LookupError("no such model")

    with pytest.raises(LookupError):
        coalescer.get_or_call("k", fail)
    assert [record.exc_info[0] for record in caplog.records] == [RecursiveCallError]
    assert len(coalescer) == 0


def test_an_error_of_use_is_never_retained_whatever_the_callable_says():
    seen = []
    coalescer = AsyncBatchCoalescer(INF, error_ttl_seconds=seen.append)
    with pytest.raises(TypeError, match="awaitable"):
        asyncio.run(coalescer.get_or_call("k", lambda: "no awaitable"))
    assert len(coalescer) == 0
    assert not seen


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize(
    ("seconds", "error"), [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("5", TypeError)]
)
def test_a_wrong_error_ttl_is_named(kind, seconds, error):
    with pytest.raises(error, match="error_ttl_seconds"):
        kind(error_ttl_seconds=seconds)


# By number.


class Key:
    """All have one hash, and so are in one shard."""

    def __init__(self, name):
        self.name = name

    def __hash__(self):
        return 7

    def __eq__(self, other):
        return self.name == other.name


def kept(coalescer, names):
    return [name for name in names if Key(name) in coalescer]


def test_of_more_outcomes_than_may_be_retained_the_oldest_of_a_shard_leave(face):
    coalescer = face.coalescer(INF, max_retained=3)
    for name in range(3):
        face.ask(coalescer, face.callable(lambda name=name: name), Key(name))
    assert coalescer.stats().evicted == 0
    # A hit makes it no younger.
    assert face.ask(coalescer, refused, Key(0)) == 0
    for name in range(3, 6):
        face.ask(coalescer, face.callable(lambda name=name: name), Key(name))
        assert kept(coalescer, range(6)) == list(range(name - 2, name + 1))
    stats = coalescer.stats()
    assert (stats.evicted, stats.retained, stats.calls) == (3, 3, 6)
    assert face.ask(coalescer, face.callable(lambda: "anew"), Key(0)) == "anew"


def test_age_counts_from_completion_and_what_is_in_flight_does_not_count(face):
    coalescer = face.coalescer(INF, max_retained=2)
    held = [face.held(name) for name in range(2)]
    callers = [face.lead(coalescer, call, Key(name)) for name, call in enumerate(held)]
    for name in (2, 3):
        face.ask(coalescer, face.callable(lambda name=name: name), Key(name))
    assert kept(coalescer, range(4)) == [0, 1, 2, 3]
    assert coalescer.stats().evicted == 0
    # Begun first and completed last.
    held[0].release()
    assert callers[0].result() == 0
    assert kept(coalescer, range(4)) == [0, 1, 3]
    held[1].release()
    assert callers[1].result() == 1
    assert kept(coalescer, range(4)) == [0, 1]


def test_errors_and_what_was_put_are_counted_like_any_outcome(face):
    coalescer = face.coalescer(INF, max_retained=2)
    coalescer.put(Key(0), "put")
    outcomes([face.start(coalescer, face.callable(Work(LookupError())), Key(1))])
    coalescer.put(Key(2), "put")
    assert kept(coalescer, range(3)) == [1, 2]


def test_what_is_forgotten_replaced_cleared_or_expired_makes_room(face):
    coalescer = face.coalescer(INF, max_retained=2)
    coalescer.put(Key(0), "forgotten")
    coalescer.put(Key(1), "old")
    coalescer.forget(Key(0))
    coalescer.put(Key(1), "new")
    coalescer.put(Key(2), "short", 1)
    assert kept(coalescer, range(3)) == [1, 2]
    _core._advance_clock(2)
    face.ask(coalescer, face.callable(lambda: 3), Key(3))
    assert kept(coalescer, range(4)) == [1, 3]
    assert coalescer.stats().evicted == 0
    coalescer.clear()
    for name in (4, 5):
        coalescer.put(Key(name), "value")
    assert kept(coalescer, range(6)) == [4, 5]
    assert coalescer.stats().evicted == 0


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
def test_nothing_is_evicted_for_the_sake_of_what_has_expired_in_any_shard(kind):
    coalescer = kind(INF, max_retained=21)
    coalescer.put(Key(0), "value")
    for name in range(20):
        coalescer.put(str(name), "short", 1)
    _core._advance_clock(2)
    # At once, so that the sweeper has hardly had its turn.
    coalescer.put(Key(1), "value")
    assert kept(coalescer, range(2)) == [0, 1]
    assert coalescer.stats().evicted == 0


def test_a_limit_on_all_shards_is_kept_but_for_one_outcome_each(crew):
    coalescer, most, shards = BatchCoalescer(INF, max_retained=100), 100, 64

    def work(number):
        for name in range(500):
            key = (number, name)
            assert coalescer.get_or_call(key, lambda key=key: key) == key
            assert len(coalescer) <= most + shards

    crew.start(4, work).join()
    stats = coalescer.stats()
    assert most <= stats.retained <= most + shards
    assert stats.evicted == 2_000 - stats.retained


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
def test_a_limit_that_is_just_reached_evicts_nothing(kind):
    coalescer = kind(INF, max_retained=1_000)
    for name in range(1_000):
        coalescer.put(name, name)
    assert (coalescer.stats().retained, coalescer.stats().evicted) == (1_000, 0)
    coalescer.put("newest", "value")
    assert coalescer.peek("newest") == "value"


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize(
    ("most", "error"),
    [(0, ValueError), (-1, ValueError), (-(2**70), ValueError), (True, TypeError), (1.0, TypeError), ("9", TypeError)],
)
def test_a_wrong_limit_is_named(kind, most, error):
    with pytest.raises(error, match="max_retained") as info:
        kind(max_retained=most)
    assert repr(most) in str(info.value)


@pytest.mark.parametrize("most", [None, 1, 2**70])
def test_a_limit_may_be_small_huge_or_none(most):
    coalescer = BatchCoalescer(max_retained=most)
    for name in range(2):
        coalescer.put(Key(name), "value")
    assert kept(coalescer, range(2)) == ([1] if most == 1 else [0, 1])

"""How streams end in errors: which are shared, which are copied, and who starts over. In threads and in tasks."""

import asyncio
import concurrent.futures

import pytest
from faces import refused
from upstreams import Reader, Readers, Stop, wait_for_readers

from llm_batch_coalesce import CoalesceError, SharedCallError, _core


@pytest.fixture(params=[0, 1, 2], ids=["threads", "tasks", "loops"])
def readers(request):
    with Readers(request.param) as readers:
        yield readers


class FailedError(Exception):
    """Upstream's."""


class LimitedError(Exception):
    """For one caller only."""


def failed():
    error = FailedError("upstream", 5)
    error.add_note("of upstream")
    error.__cause__ = FailedError("cause")
    return error


def is_copy(error, original):
    return (
        type(error) is FailedError
        and error.args == original.args
        and error.__notes__[0] == "of upstream"
        and error.__cause__.args == ("cause",)
    )


# Shared errors.


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_every_reader_gets_the_items_and_then_the_error(readers, count):
    coalescer, original = readers.coalescer(), failed()
    held = readers.held(range(count), original)
    asked = [readers.lead(coalescer, held), *readers.join(coalescer, 4)]
    held.let(count + 1)
    results = [reader.result() for reader in asked]
    results += [readers.read(coalescer) for _ in range(3)]
    assert [items for items, _ in results] == [list(range(count))] * 8
    errors = [error for _, error in results]
    assert all(is_copy(error, original) for error in errors)
    assert sum(error is original for error in errors) == 1
    # No two of them, nor what hangs on them, are one object: threads must not raise the same one.
    for of_error in (lambda error: error, lambda error: error.__cause__, lambda error: error.__notes__):
        assert len({id(of_error(error)) for error in errors}) == len(errors)
    assert not any(error is original for error in errors[5:])
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.hits, stats.errors, stats.retained) == (1, 4, 3, 1, 1)


def test_the_original_is_for_the_reader_that_leads_or_pulled(readers):
    coalescer, original = readers.coalescer(), failed()
    held = readers.held("a", original)
    leader = readers.start(coalescer, held, pause_after=1)
    held.wait_for_pull()
    (waiter,) = readers.join(coalescer, 1)
    held.let(2)
    items, error = waiter.result()
    leader.go_on()
    others_items, others_error = leader.result()
    assert items == others_items == ["a"]
    # The waiter has pulled in the leader's place, where readers pull.
    assert (error is original) == readers.in_threads
    assert (others_error is original) == (not readers.in_threads)
    assert is_copy(error, original)
    assert is_copy(others_error, original)


def test_an_error_out_of_fn_is_shared_like_one_of_upstream(readers):
    coalescer = readers.coalescer()

    def fn():
        raise FailedError("fn's")

    for each in (fn, refused):
        items, error = readers.read(coalescer, each)
        assert (items, type(error), error.args) == ([], FailedError, ("fn's",))
    assert coalescer.stats().errors == coalescer.stats().hits == 1


@pytest.mark.parametrize(
    ("options", "own", "seconds"),
    [
        ({"ttl_seconds": 20}, {}, 20),
        ({"ttl_seconds": 20}, {"ttl_seconds": 50}, 50),
        ({"ttl_seconds": 20}, {"ttl_seconds": 0}, 0),
        ({"ttl_seconds": 20, "error_ttl_seconds": 0}, {}, 0),
        ({"ttl_seconds": 20, "error_ttl_seconds": 30}, {"ttl_seconds": 50}, 30),
        ({"ttl_seconds": 20, "error_ttl_seconds": lambda error: error.args[1]}, {}, 5),
        ({"ttl_seconds": 20, "error_ttl_seconds": lambda error: None}, {}, 20),
        ({"ttl_seconds": 20, "error_ttl_seconds": lambda error: 1 / 0}, {}, 0),
    ],
)
@pytest.mark.parametrize("count", [0, 2])
def test_how_long_an_error_is_retained(readers, count, options, own, seconds):
    coalescer = readers.coalescer(**options)
    items = list(range(count))
    assert readers.read(coalescer, readers.yields(*items, error=failed()), **own)[0] == items
    if seconds:
        _core._advance_clock(seconds - 1)
        got, error = readers.read(coalescer)
        assert (got, type(error)) == (items, FailedError)
        _core._advance_clock(1.1)
    assert "k" not in coalescer
    assert readers.read(coalescer, readers.yields("new")) == (["new"], None)


# Errors for one reader only.


@pytest.fixture(params=[LimitedError, Stop, KeyboardInterrupt, GeneratorExit], ids=lambda kind: kind.__name__)
def private(request):
    return request.param("private")


def test_before_the_first_item_the_next_reader_starts_over_with_its_own_fn(readers, private):
    coalescer = readers.coalescer(private_errors=LimitedError)
    held, own = readers.held(error=private), readers.held("ab")
    leader = readers.lead(coalescer, held)
    others = readers.join(coalescer, 4, own)
    held.let()
    items, error = leader.result()
    assert items == []
    assert error is private
    own.wait_for_pull()
    wait_for_readers(coalescer, 4, 3 if readers.in_threads else 4)
    own.let(3)
    assert [other.result() for other in others] == [(["a", "b"], None)] * 4
    assert (held.calls, own.calls) == (1, 1)
    assert readers.read(coalescer) == (["a", "b"], None)
    stats = coalescer.stats()
    assert (stats.calls, stats.errors, stats.in_flight) == (2, 1, 0)


def test_after_items_the_others_get_an_error_of_their_own(readers, private):
    coalescer = readers.coalescer(private_errors=[LimitedError])
    held = readers.held("ab", private)
    asked = [readers.lead(coalescer, held), *readers.join(coalescer, 4)]
    held.let(2)
    for reader in asked:
        reader.wait_for(2)
    wait_for_readers(coalescer, 5, 4 if readers.in_threads else 5)
    held.let()
    results = [reader.result() for reader in asked]
    assert [items for items, _ in results] == [["a", "b"]] * 5
    errors = [error for _, error in results]
    assert sum(error is private for error in errors) == 1
    if not readers.in_threads:
        assert errors[0] is private
    others = [error for error in errors if error is not private]
    assert len({id(error) for error in others}) == 4
    for error in others:
        assert type(error) is SharedCallError
        assert isinstance(error, CoalesceError)
        assert type(private).__qualname__ in error.error_type
    assert "k" not in coalescer
    assert readers.read(coalescer, readers.yields("new")) == (["new"], None)
    assert coalescer.stats().errors == 1


def test_a_reader_that_has_all_items_but_has_not_seen_the_end_gets_it_too(readers):
    """Even a reader that comes back when the stream is long over."""
    coalescer = readers.coalescer(private_errors=LimitedError)
    held = readers.held("abc", LimitedError())
    leader = readers.lead(coalescer, held)
    late = readers.start(coalescer, refused, pause_after=1)
    wait_for_readers(coalescer, 2, 1 if readers.in_threads else 2)
    held.let(4)
    assert type(leader.result()[1]) is LimitedError
    late.go_on()
    items, error = late.result()
    assert (items, type(error)) == (["a", "b", "c"], SharedCallError)


@pytest.mark.parametrize("kind", [concurrent.futures.CancelledError, asyncio.CancelledError])
def test_a_cancelled_error_out_of_an_upstream_of_threads_is_private(kind):
    with Readers() as readers:
        coalescer = readers.coalescer()
        held = readers.held(error=kind())
        leader = readers.lead(coalescer, held)
        (waiter,) = readers.join(coalescer, 1, readers.yields("own"))
        held.let()
        assert type(leader.result()[1]) is kind
        assert waiter.result() == (["own"], None)


def test_an_error_that_cannot_be_copied_is_stood_in_for(readers):
    class StubbornError(Exception):
        def __new__(cls, *args):
            return super().__new__(cls, *args)

        __slots__ = ("lock",)

    coalescer, original = readers.coalescer(), StubbornError("upstream")
    held = readers.held("a", original)
    asked = [readers.lead(coalescer, held), *readers.join(coalescer, 2)]
    held.let(2)
    errors = [reader.result()[1] for reader in asked]
    assert sum(error is original for error in errors) == 1
    assert len({id(error) for error in errors}) == 3
    assert all("upstream" in str(error) for error in errors)


def test_a_reader_that_comes_back_after_its_error_is_at_its_end():
    with Readers() as readers:
        stream = readers.coalescer().stream("k", readers.yields(1, error=failed()))
        assert next(stream) == 1
        with pytest.raises(FailedError):
            next(stream)
        assert list(stream) == []


# The error of many.


def test_errors_in_many_threads_at_once(crew):
    """Raising one object in several threads crashes a free-threaded interpreter."""
    with Readers() as readers:
        coalescer = readers.coalescer(ttl_seconds=0)

        def work(_):
            return [
                Reader().read(coalescer.stream(number % 5, readers.yields(number, error=failed())))[1]
                for number in range(100)
            ]

        errors = [error for errors in crew.start(16, work).join() for error in errors]
    assert len({id(error) for error in errors}) == 1_600
    assert {type(error) for error in errors} == {FailedError}

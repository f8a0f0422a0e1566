"""Errors that concern one caller only: it alone gets them, and the next one makes the call with its own callable."""

import asyncio
import threading

import pytest
from faces import FACES, Loops, outcomes, refused
from loops import PATIENCE, wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

INF = float("inf")


class RateLimitError(Exception):
    """Of one caller's own limiter."""


class BurstLimitError(RateLimitError):
    """A subclass."""


class BudgetError(Exception):
    """Another one."""


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


def test_of_20_callers_whose_first_is_limited_19_share_the_second_call(face):
    coalescer = face.coalescer(10, private_errors=RateLimitError)
    error = RateLimitError("slow down")
    first, second = face.held(error=error), face.held("value")
    callers = [face.lead(coalescer, first), *face.join(coalescer, 19, second)]
    first.release()
    second.release()
    assert outcomes(callers) == [error] + ["value"] * 19
    assert (first.calls, second.calls) == (1, 1)
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.errors, stats.handed_over) == (2, 18, 1, 1)
    assert face.ask(coalescer, refused) == "value"


def test_it_is_the_same_when_20_threads_ask_at_the_same_moment(crew):
    coalescer, calls = BatchCoalescer(10, private_errors=RateLimitError), []

    def limited_at_first():
        calls.append(threading.get_ident())
        if len(calls) == 1:
            wait_for_waiters(coalescer, "k", 19)
            raise RateLimitError
        return "value"

    def ask(_):
        try:
            return coalescer.get_or_call("k", limited_at_first)
        except RateLimitError:
            return threading.get_ident()

    results = crew.start(20, ask).join()
    assert len(set(calls)) == len(calls) == 2
    assert sorted(results, key=str) == [calls[0], *["value"] * 19]


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_chain_of_errors_costs_a_call_each_and_goes_in_the_order_of_arrival(face, length):
    coalescer = face.coalescer(10, private_errors=RateLimitError)
    calls = []

    def limited(number):
        def call():
            calls.append(number)
            raise RateLimitError(number)

        return face.callable(call)

    first = face.held(error=RateLimitError(0))
    callers = [face.lead(coalescer, first)]
    callers += [face.start(coalescer, limited(number)) for number in range(1, length)]
    callers += face.join(coalescer, 5, face.callable(lambda: calls.append("last") or "value"))
    first.release()
    results = outcomes(callers)
    assert [error.args for error in results[:length]] == [(number,) for number in range(length)]
    assert results[length:] == ["value"] * 5
    assert calls == [*range(1, length), "last"]
    stats = coalescer.stats()
    assert (stats.calls, stats.errors, stats.joined, stats.handed_over) == (length + 1, length, 4, length)


def test_when_all_are_limited_each_has_called_once_and_nothing_is_retained(face):
    coalescer = face.coalescer(INF, private_errors=RateLimitError)
    held = [face.held(error=RateLimitError(number)) for number in range(8)]
    callers = [face.lead(coalescer, held[0]), *(face.start(coalescer, call) for call in held[1:])]
    for call in held:
        call.release()
    # Each gets the very error of its own call.
    assert outcomes(callers) == [call.error for call in held]
    assert [call.calls for call in held] == [1] * 8
    assert "k" not in coalescer
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.errors, stats.handed_over, stats.in_flight) == (8, 0, 8, 7, 0)


def test_a_private_error_with_nobody_waiting_leaves_the_key_free(face):
    asked = []
    coalescer = face.coalescer(INF, private_errors=RateLimitError, error_ttl_seconds=asked.append)
    error = RateLimitError()

    def limited():
        raise error

    for _ in range(2):
        assert outcomes([face.start(coalescer, face.callable(limited))]) == [error]
        assert len(coalescer) == 0
    assert face.ask(coalescer, face.callable(lambda: "value")) == "value"
    # How long it is retained was no question.
    assert not asked


def test_a_shared_error_after_a_private_one_is_shared_among_those_left(face):
    coalescer = face.coalescer(10, private_errors=RateLimitError)
    limited, failed = face.held(error=RateLimitError()), face.held(error=LookupError("no such model"))
    callers = [face.lead(coalescer, limited), *face.join(coalescer, 4, failed)]
    limited.release()
    failed.release()
    results = outcomes(callers)
    assert results[0] is limited.error
    assert [repr(error) for error in results[1:]] == ["LookupError('no such model')"] * 4
    assert results[1] is failed.error
    assert len({id(error) for error in results}) == 5
    assert repr(outcomes([face.start(coalescer, refused)])) == "[LookupError('no such model')]"


def test_what_a_limited_leader_leaves_behind_is_not_in_the_errors_of_the_others(face):
    coalescer = face.coalescer(0, private_errors=RateLimitError)
    limited, failed = face.held(error=RateLimitError("mine")), face.held(error=LookupError("ours"))
    callers = [face.lead(coalescer, limited), *face.join(coalescer, 2, failed)]
    limited.release()
    failed.release()
    for error in outcomes(callers)[1:]:
        assert (error.__context__, error.__cause__) == (None, None)
        assert "mine" not in "".join(getattr(error, "__notes__", ()))


@pytest.mark.parametrize(
    ("private", "error", "is_private"),
    [
        ((), RateLimitError, False),
        (RateLimitError, RateLimitError, True),
        (RateLimitError, BurstLimitError, True),
        (BurstLimitError, RateLimitError, False),
        ((RateLimitError,), RateLimitError, True),
        ((BudgetError, RateLimitError), BurstLimitError, True),
        ([BudgetError, RateLimitError], BudgetError, True),
        ({BudgetError}, BudgetError, True),
        ((BudgetError,), RateLimitError, False),
        (Exception, RateLimitError, True),
        (BaseException, RateLimitError, True),
        ((KeyboardInterrupt, asyncio.CancelledError), RateLimitError, False),
        (TimeoutError, TimeoutError, True),
        (OSError, TimeoutError, True),
        (ExceptionGroup, RateLimitError, False),
    ],
)
def test_classes_are_taken_as_except_takes_them(face, private, error, is_private):
    coalescer = face.coalescer(10, private_errors=private)
    held = face.held(error=error())
    leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1, face.callable(lambda: "value"))
    held.release()
    assert outcomes([leader]) == [held.error]
    assert [outcomes([waiter]) == ["value"], coalescer.stats().calls == 2] == [is_private, is_private]


def test_classes_may_come_from_an_iterator_which_is_used_once(face):
    coalescer = face.coalescer(10, private_errors=(kind for kind in (BudgetError, RateLimitError)))
    for error in (RateLimitError(), BudgetError()):
        held = face.held(error=error)
        leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1, face.callable(lambda: "value"))
        held.release()
        assert outcomes([leader, waiter]) == [error, "value"]
        coalescer.clear()


@pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])
@pytest.mark.parametrize(
    "private",
    [None, 5, "RateLimitError", RateLimitError(), int, (RateLimitError, int), [RateLimitError()], ((RateLimitError,),)],
    ids=repr,
)
def test_what_is_no_class_of_errors_is_named(kind, private):
    with pytest.raises(TypeError, match="private_errors must be classes of exceptions") as info:
        kind(private_errors=private)
    assert repr(private) in str(info.value)


def test_a_waiter_that_takes_over_leads_its_own_flight_in_the_reports(face):
    coalescer = face.coalescer(10, private_errors=RateLimitError)
    limited, held = face.held(error=RateLimitError()), face.held("value")
    leader = face.lead(coalescer, limited)
    (heir,) = face.join(coalescer, 1, held, method="outcome", name="heir")
    (waiter,) = face.join(coalescer, 1, method="outcome")
    limited.release()
    assert type(outcomes([leader])[0]) is RateLimitError
    assert held.started.wait(PATIENCE)
    assert [(flight.leader, flight.waiters) for flight in coalescer.flights()] == [("heir", 1)]
    held.release()
    assert [(outcome.role, outcome.waiters) for outcome in outcomes([heir, waiter])] == [("leader", 1), ("waiter", 1)]


def test_while_the_lead_is_offered_to_a_task_that_has_not_come_for_it_a_flight_has_no_leader():
    with Loops() as face:
        coalescer, limited = face.coalescer(10, private_errors=RateLimitError), face.held(error=RateLimitError())
        leader, (waiter,) = face.lead(coalescer, limited), face.join(coalescer, 1, face.callable(lambda: "value"))
        face.loops[1].hold()
        limited.release()
        assert outcomes([leader]) == [limited.error]
        assert [(flight.key, flight.leader, flight.waiters) for flight in coalescer.flights()] == [("k", None, 1)]
        face.loops[1].let_go()
        assert waiter.result() == "value"


async def test_the_task_that_takes_over_uses_its_own_callable_and_context():
    coalescer = AsyncBatchCoalescer(private_errors=RateLimitError)
    gate = asyncio.Event()

    async def limited():
        await gate.wait()
        raise RateLimitError

    async def whose(name):
        return name

    first = asyncio.create_task(coalescer.get_or_call("k", limited))
    others = [asyncio.create_task(coalescer.get_or_call("k", lambda name=name: whose(name))) for name in "abc"]
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert type(results[0]) is RateLimitError
    assert results[1:] == ["a", "a", "a"]


async def test_a_limited_call_whose_caller_was_cancelled_hands_over_in_silence():
    coalescer = AsyncBatchCoalescer(private_errors=RateLimitError)
    gate = asyncio.Event()

    async def limited():
        await gate.wait()
        raise RateLimitError

    async def own():
        return "own"

    leader = asyncio.create_task(coalescer.get_or_call("k", limited))
    waiter = asyncio.create_task(coalescer.get_or_call("k", own))
    await asyncio.sleep(0)
    leader.cancel()
    await asyncio.wait([leader])
    gate.set()
    assert await waiter == "own"
    assert leader.cancelled()

"""`timeout=` bounds how long one caller waits, and nothing else."""

import asyncio
import threading
from decimal import Decimal

import pytest
from faces import FACES, Tasks, Threads, outcomes, refused
from loops import PATIENCE, HeldCall, let_run, wait_for_waiters, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, CoalesceError, _core

INF = float("inf")
SHORT = 0.02


class TryAgainError(Exception):
    """Is private."""


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


# Zero, seconds, for ever.


@pytest.mark.parametrize("timeout", [0, SHORT, Decimal("0.02")], ids=repr)
def test_a_waiter_whose_timeout_passes_gets_a_timeout_error_and_disturbs_nobody(face, timeout):
    coalescer, held = face.coalescer(10, name="answers"), face.held("value")
    others = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    with pytest.raises(TimeoutError) as info:
        face.ask(coalescer, refused, timeout=timeout)
    assert type(info.value) is TimeoutError
    assert str(info.value) == f"the call of 'k' in coalescer 'answers' was not done within {timeout} seconds"
    assert not isinstance(info.value, CoalesceError)
    assert info.value.__context__ is None
    assert not any(caller.done() for caller in others)
    assert coalescer._waiters("k") == 2
    held.release()
    assert outcomes(others) == ["value"] * 3
    assert face.ask(coalescer, refused) == "value"
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.hits, stats.timeouts, stats.cancelled) == (1, 2, 1, 1, 0)


@pytest.mark.parametrize("timeout", [None, 60, INF, 1e18, 1e300, 10**100], ids=repr)
def test_a_waiter_with_patience_gets_the_value(face, timeout):
    coalescer, held = face.coalescer(10), face.held("value")
    leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1, timeout=timeout)
    held.release()
    assert outcomes([leader, waiter]) == ["value", "value"]


@pytest.mark.parametrize("timeout", [0, SHORT, INF])
def test_a_timeout_is_no_hindrance_where_there_is_nothing_to_wait_for(face, timeout):
    coalescer = face.coalescer(10)
    assert face.ask(coalescer, face.callable(lambda: "value"), timeout=timeout) == "value"
    assert face.ask(coalescer, refused, timeout=timeout) == "value"
    assert face.ask(coalescer, refused, timeout=timeout, method="outcome").role == "hit"
    stats = coalescer.stats()
    assert (stats.calls, stats.hits, stats.timeouts) == (1, 2, 0)


def test_a_retained_error_is_told_though_the_timeout_is_zero(face):
    coalescer = face.coalescer(10)

    def fail():
        raise LookupError("no such model")

    for _ in range(2):
        with pytest.raises(LookupError):
            face.ask(coalescer, face.callable(fail), timeout=0)
    assert coalescer.stats().hits == 1


@pytest.mark.parametrize("timeout", [0, SHORT])
def test_a_timeout_never_bounds_the_call(face, timeout):
    coalescer, held = face.coalescer(10), face.held("value")
    leader = face.lead(coalescer, held, timeout=timeout)
    # It began later and waits longer, so the leader's time is over when its own is.
    with pytest.raises(TimeoutError):
        face.ask(coalescer, refused, timeout=2 * SHORT)
    assert not leader.done()
    held.release()
    assert leader.result() == "value"


def test_a_waiter_that_takes_over_has_no_more_timeout(face):
    coalescer = face.coalescer(10, private_errors=TryAgainError)
    first, second = face.held(error=TryAgainError()), face.held("value")
    leader = face.lead(coalescer, first)
    heir, other = face.join(coalescer, 1, second, timeout=1)[0], face.join(coalescer, 1)[0]
    first.release()
    assert second.started.wait(PATIENCE)
    with pytest.raises(TimeoutError):
        face.ask(coalescer, refused, timeout=1.1)
    assert not heir.done()
    second.release()
    assert [type(outcome) for outcome in outcomes([leader])] == [TryAgainError]
    assert outcomes([heir, other]) == ["value", "value"]
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.timeouts, stats.handed_over) == (2, 1, 1, 1)


def test_a_waiter_whose_timeout_has_passed_is_not_offered_the_lead(face):
    coalescer = face.coalescer(10, private_errors=TryAgainError)
    first = face.held(error=TryAgainError())
    leader = face.lead(coalescer, first)
    impatient = face.start(coalescer, refused, timeout=SHORT)
    patient = face.begin(coalescer, face.callable(lambda: "value"))
    assert type(outcomes([impatient])[0]) is TimeoutError
    wait_until(lambda: coalescer._waiters("k") == 1)
    first.release()
    assert patient.result() == "value"
    assert type(outcomes([leader])[0]) is TryAgainError


def test_a_timeout_goes_on_while_the_lead_passes_from_one_to_the_next(face):
    coalescer = face.coalescer(10, private_errors=TryAgainError)
    first, second = face.held(error=TryAgainError()), face.held("value")
    callers = [face.lead(coalescer, first), face.start(coalescer, second)]
    impatient = face.start(coalescer, refused, timeout=0.1)
    first.release()
    assert second.started.wait(PATIENCE)
    assert type(outcomes([impatient])[0]) is TimeoutError
    second.release()
    assert callers[1].result() == "value"
    assert type(outcomes(callers[:1])[0]) is TryAgainError


def test_a_timeout_error_that_the_call_raises_is_an_error_like_any_other(face):
    coalescer, held = face.coalescer(0), face.held(error=TimeoutError("the provider's"))
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2, timeout=60)]
    held.release()
    assert [str(error) for error in outcomes(callers)] == ["the provider's"] * 3
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.errors, stats.timeouts) == (1, 2, 1, 0)


def test_when_all_waiters_are_gone_the_leader_still_gets_its_value(face):
    coalescer, held = face.coalescer(10), face.held("value")
    leader = face.lead(coalescer, held)
    waiters = [face.start(coalescer, refused, timeout=SHORT) for _ in range(5)]
    assert [type(error) for error in outcomes(waiters)] == [TimeoutError] * 5
    held.release()
    assert leader.result() == "value"


@pytest.mark.parametrize("kind", FACES, ids=lambda kind: kind.__name__)
def test_whoever_times_out_in_the_moment_of_completion_is_counted_once(kind):
    with kind() as face:
        for turn in range(5):
            coalescer, held = face.coalescer(0), face.held("value")
            leader = face.lead(coalescer, held)
            waiters = [face.start(coalescer, held, timeout=0.001 * (1 + number)) for number in range(20)]
            wait_until(lambda waiters=waiters, turn=turn: waiters[3 * turn].done())
            held.release()
            results = outcomes([leader, *waiters])
            # One that came after completion led a call of its own, which was not held by then.
            values = [result for result in results if result == "value"]
            stats = coalescer.stats()
            assert stats.timeouts == len([result for result in results if type(result) is TimeoutError])
            assert stats.calls + stats.joined == len(values)
            assert stats.calls + stats.joined + stats.timeouts == len(results) == 21


def test_the_main_thread_has_a_timeout_too():
    with Threads() as face:
        coalescer, held = BatchCoalescer(), face.held("value")
        leader = face.lead(coalescer, held)
        # It looks for signals every 50 ms, which is less than the second and more than the first.
        for timeout in (SHORT, 0.12):
            with pytest.raises(TimeoutError, match=f"within {timeout} seconds"):
                coalescer.get_or_call("k", refused, timeout=timeout)
        release = threading.Timer(SHORT, held.release)
        release.start()
        assert coalescer.get_or_call("k", refused, timeout=PATIENCE) == "value"
        assert leader.result() == "value"
        release.join()


# Wrong values.


@pytest.mark.parametrize("option", ["timeout", "ttl_seconds"])
@pytest.mark.parametrize("method", ["get_or_call", "outcome"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (-0.5, ValueError),
        (-INF, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        (False, TypeError),
        ("5", TypeError),
        ([], TypeError),
        (1j, TypeError),
    ],
    ids=repr,
)
def test_a_wrong_number_of_seconds_is_named_and_changes_nothing(face, option, method, value, error):
    coalescer = face.coalescer(10)
    with pytest.raises(error, match=option) as info:
        face.ask(coalescer, refused, method=method, **{option: value})
    assert repr(value) in str(info.value)
    assert len(coalescer) == 0
    coalescer.put("k", "value")
    with pytest.raises(error, match=option):
        face.ask(coalescer, refused, method=method, **{option: value})
    stats = coalescer.stats()
    assert (stats.calls, stats.hits, stats.timeouts) == (0, 0, 0)


# Tasks, on a loop whose clock the test moves.


@pytest.fixture
def advance(monkeypatch):
    """Moves the time of the running loop, on which timers depend."""
    loops = {}

    async def move(seconds):
        loop = asyncio.get_running_loop()
        if loop not in loops:
            loops[loop] = 0.0
            real = loop.time
            monkeypatch.setattr(loop, "time", lambda: real() + loops[loop])
        loops[loop] += seconds

    return move


async def started(coalescer, *requests):
    """A task for each pair of callable and timeout; the first leads."""
    tasks = []
    for fn, timeout in requests:
        tasks.append(asyncio.create_task(coalescer.get_or_call("k", fn, timeout=timeout)))
        await let_run()
    return tasks


@pytest.mark.parametrize("cancel_first", [False, True])
async def test_a_task_cancelled_in_the_moment_that_its_timeout_passes_is_cancelled(advance, cancel_first):
    coalescer, held = AsyncBatchCoalescer(), HeldCall("value")
    leader, waiter = await started(coalescer, (held, None), (refused, 10))
    if cancel_first:
        waiter.cancel()
    await advance(11)
    if not cancel_first:
        # In one turn of the loop the timer comes first, then this.
        asyncio.get_running_loop().call_later(0, waiter.cancel)
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    assert waiter.cancelling() > 0
    stats = coalescer.stats()
    assert (stats.timeouts, stats.cancelled) == (0, 1)
    held.release()
    assert await leader == "value"


async def test_a_value_that_comes_in_the_moment_that_the_timeout_passes_is_served(advance):
    coalescer, held = AsyncBatchCoalescer(), HeldCall("value")
    leader, waiter = await started(coalescer, (held, None), (refused, 10))
    held.release()
    await let_run(1)
    await advance(11)
    assert await asyncio.gather(leader, waiter) == ["value", "value"]
    assert coalescer.stats().timeouts == 0


@pytest.mark.parametrize(("own", "around"), [(10, 20), (10, 10), (20, 10), (None, 10), (10, None)])
async def test_of_a_timeout_and_one_around_it_the_earlier_counts(advance, own, around):
    coalescer, held, expired = AsyncBatchCoalescer(), HeldCall("value"), []
    leader = (await started(coalescer, (held, None)))[0]

    async def ask():
        scope = asyncio.timeout(around)
        try:
            async with scope:
                await coalescer.get_or_call("k", refused, timeout=own)
        finally:
            expired.append(scope.expired())

    waiter = asyncio.create_task(ask())
    await let_run()
    await advance(10.5)
    with pytest.raises(TimeoutError) as info:
        await waiter
    stats = coalescer.stats()
    assert stats.timeouts + stats.cancelled == 1
    if own != around:
        assert expired == [own != 10]
        assert (stats.timeouts == 1) is ("the call of 'k'" in str(info.value)) is (own == 10)
    assert waiter.cancelling() == 0
    held.release()
    assert await leader == "value"


async def test_a_task_whose_timeout_has_passed_may_ask_again(advance):
    coalescer, held = AsyncBatchCoalescer(), HeldCall("value")

    async def ask():
        with pytest.raises(TimeoutError):
            await coalescer.get_or_call("k", refused, timeout=10)
        again.set()
        return await coalescer.get_or_call("k", refused, timeout=10)

    again = asyncio.Event()
    leader = (await started(coalescer, (held, None)))[0]
    waiter = asyncio.create_task(ask())
    await let_run()
    await advance(10.5)
    await again.wait()
    held.release()
    assert await asyncio.gather(leader, waiter) == ["value", "value"]
    assert waiter.cancelling() == 0


async def test_the_last_caller_of_a_call_cancels_it_when_its_timeout_passes(advance):
    coalescer, held = AsyncBatchCoalescer(), HeldCall("value")
    leader, waiter = await started(coalescer, (held, None), (refused, 10))
    leader.cancel()
    await let_run()
    assert not held.cancelled.is_set()
    await advance(10.5)
    with pytest.raises(TimeoutError):
        await waiter
    await let_run()
    assert held.cancelled.is_set()
    assert "k" not in coalescer
    assert leader.cancelled()


def test_a_task_with_a_timeout_that_is_cancelled_counts_as_cancelled():
    with Tasks() as face:
        coalescer, held = face.coalescer(), face.held("value")
        leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1, timeout=60)
        waiter.cancel()
        assert type(outcomes([waiter])[0]) is asyncio.CancelledError
        held.release()
        assert leader.result() == "value"
        stats = coalescer.stats()
        assert (stats.calls, stats.timeouts, stats.cancelled) == (1, 0, 1)


def test_the_clock_of_the_ttl_has_no_part_in_a_timeout(face):
    coalescer, held = face.coalescer(10), face.held("value")
    leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1, timeout=60)
    _core._advance_clock(1_000)
    wait_for_waiters(coalescer, "k", 1)
    held.release()
    assert outcomes([leader, waiter]) == ["value", "value"]

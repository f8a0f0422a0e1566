"""What can be done with a key besides asking for it: peek, put, forget, cancel, clear; and abandoning its call."""

import asyncio
import inspect

import pytest
from faces import FACES, Loops, Tasks, outcomes, refused
from loops import PATIENCE, HeldCall, let_run

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, _core

INF = float("inf")


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


@pytest.fixture(params=[BatchCoalescer, AsyncBatchCoalescer])
def coalescer(request):
    """For what needs no caller."""
    return request.param(ttl_seconds=10)


def fail():
    raise LookupError("no such model")


# Peek.


def test_peek_tells_a_retained_value_and_counts_as_nothing(face):
    coalescer = face.coalescer(10)
    value = face.ask(coalescer, face.callable(object))
    before = coalescer.stats()
    assert coalescer.peek("k") is value
    assert coalescer.peek("other") is None
    assert coalescer.peek(key="other", default="default") == "default"
    assert coalescer.stats() == before


def test_peek_tells_none_where_none_is_the_value(coalescer):
    coalescer.put("k", None)
    assert coalescer.peek("k", "default") is None


def test_peek_gives_the_default_for_a_flight_and_for_a_retained_error(face):
    coalescer, held = face.coalescer(10), face.held("value")
    leader = face.lead(coalescer, held)
    assert coalescer.peek("k", "default") == "default"
    held.release()
    leader.result()
    with pytest.raises(LookupError):
        face.ask(coalescer, face.callable(fail), "failed")
    assert "failed" in coalescer
    assert coalescer.peek("failed", "default") == "default"


def test_peek_does_not_prolong_what_it_sees(coalescer):
    coalescer.put("k", "value")
    _core._advance_clock(9)
    assert coalescer.peek("k") == "value"
    _core._advance_clock(2)
    assert coalescer.peek("k") is None


# Put.


def test_put_primes_a_key_for_the_coalescers_ttl(face):
    coalescer, value = face.coalescer(10), object()
    coalescer.put("k", value)
    assert face.ask(coalescer, refused) is value
    stats = coalescer.stats()
    assert (stats.calls, stats.hits, stats.retained, stats.in_flight) == (0, 1, 1, 0)
    _core._advance_clock(11)
    assert face.ask(coalescer, face.callable(lambda: "called")) == "called"


@pytest.mark.parametrize(
    ("ttl", "kept_at_9", "kept_at_99"), [(None, True, False), (5, False, False), (INF, True, True)]
)
def test_put_takes_a_ttl_of_its_own(coalescer, ttl, kept_at_9, kept_at_99):
    coalescer.put("k", "value", ttl_seconds=ttl)
    _core._advance_clock(9)
    assert (coalescer.peek("k") == "value") is kept_at_9
    _core._advance_clock(90)
    assert (coalescer.peek("k") == "value") is kept_at_99


def test_put_with_a_ttl_of_zero_only_forgets(coalescer):
    coalescer.put("k", "old")
    coalescer.put("k", "new", 0)
    assert ("k" in coalescer, len(coalescer)) == (False, 0)
    assert type(coalescer)(0).put("k", "value") is None


def test_put_takes_the_place_of_what_is_retained_and_starts_its_ttl_anew(face):
    coalescer = face.coalescer(10)
    with pytest.raises(LookupError):
        face.ask(coalescer, face.callable(fail))
    coalescer.put("k", "first")
    assert face.ask(coalescer, refused) == "first"
    _core._advance_clock(9)
    coalescer.put("k", "second")
    _core._advance_clock(9)
    assert face.ask(coalescer, refused) == "second"
    assert len(coalescer) == coalescer.stats().retained == 1


def test_put_over_a_flight_leaves_it_its_waiters_and_none_of_the_key(face):
    coalescer, held = face.coalescer(INF), face.held("old")
    leader = face.lead(coalescer, held)
    waiters = face.join(coalescer, 3)
    coalescer.put("k", "put")
    assert face.ask(coalescer, refused) == "put"
    assert not any(caller.done() for caller in (leader, *waiters))
    held.release()
    assert outcomes([leader, *waiters]) == ["old"] * 4
    assert face.ask(coalescer, refused) == "put"
    assert coalescer.stats().retained == 1


@pytest.mark.parametrize(
    ("ttl", "error"), [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("5", TypeError)]
)
def test_put_with_a_wrong_ttl_changes_nothing(coalescer, ttl, error):
    coalescer.put("k", "old")
    with pytest.raises(error, match=f"ttl_seconds .*{ttl!r}"):
        coalescer.put("k", "new", ttl)
    assert coalescer.peek("k") == "old"


# Forget.


def test_forget_drops_what_is_retained_and_tells_if_it_was_there(face):
    coalescer, work = face.coalescer(10), iter(range(10))
    call = face.callable(lambda: next(work))
    assert coalescer.forget("k") is False
    assert face.ask(coalescer, call) == 0
    assert coalescer.forget("k") is True
    assert "k" not in coalescer
    assert coalescer.forget("k") is False
    assert face.ask(coalescer, call) == 1
    _core._advance_clock(11)
    assert coalescer.forget("k") is False
    with pytest.raises(LookupError):
        face.ask(coalescer, face.callable(fail))
    assert coalescer.forget("k") is True


def test_forget_finds_a_key_by_equality_and_leaves_the_others(coalescer):
    coalescer.put(1, "one")
    coalescer.put("1", "text")
    assert coalescer.forget(1.0) is True
    assert (coalescer.peek(1), coalescer.peek("1")) == (None, "text")


def test_a_forgotten_flight_keeps_its_waiters_and_gets_no_new_ones(face):
    coalescer, old, new = face.coalescer(INF), face.held("old"), face.held("new")
    of_old = [face.lead(coalescer, old), *face.join(coalescer, 3)]
    assert coalescer.forget("k") is True
    # It is out of reach now.
    assert coalescer.forget("k") is coalescer.cancel("k") is False
    of_new = [face.lead(coalescer, new), *face.join(coalescer, 2)]
    new.release()
    assert outcomes(of_new) == ["new"] * 3
    assert not any(caller.done() for caller in of_old)
    old.release()
    assert outcomes(of_old) == ["old"] * 4
    # It came last and is the older one all the same.
    assert face.ask(coalescer, refused) == "new"


@pytest.mark.parametrize("error", [None, LookupError("old")])
def test_a_forgotten_flight_that_ends_first_leaves_the_second_alone(face, error):
    coalescer, old, new = face.coalescer(INF), face.held("old", error), face.held("new")
    leader = face.lead(coalescer, old)
    coalescer.forget("k")
    second = face.lead(coalescer, new)
    old.release()
    assert outcomes([leader]) == [error or "old"]
    joiner = face.start(coalescer, refused)
    new.release()
    assert outcomes([second, joiner]) == ["new", "new"]
    assert face.ask(coalescer, refused) == "new"


def test_what_a_forgotten_flight_brings_is_not_retained(face):
    coalescer, held = face.coalescer(INF), face.held("old")
    leader = face.lead(coalescer, held)
    coalescer.forget("k")
    held.release()
    assert leader.result() == "old"
    assert ("k" in coalescer, coalescer.stats().retained) == (False, 0)


# Cancel.


def test_cancel_wakes_the_waiters_and_leaves_the_leader_its_result(face):
    coalescer, held = face.coalescer(INF, name="answers"), face.held("value")
    leader, waiters = face.lead(coalescer, held), face.join(coalescer, 3)
    assert coalescer.cancel("k") is True
    errors = outcomes(waiters)
    assert [type(error) for error in errors] == [face.cancelled_error] * 3
    assert len({id(error) for error in errors}) == 3
    assert all("'k'" in str(error) and "'answers'" in str(error) for error in errors)
    assert not leader.done()
    assert coalescer.cancel("k") is False
    held.release()
    assert leader.result() == "value"
    assert "k" not in coalescer
    stats = coalescer.stats()
    assert (stats.calls, stats.joined, stats.cancelled, stats.errors, stats.in_flight) == (1, 0, 3, 0, 0)


def test_cancel_does_nothing_to_what_is_retained_or_unknown(face):
    coalescer = face.coalescer(10)
    face.ask(coalescer, face.callable(lambda: "value"))
    assert coalescer.cancel("k") is False
    assert coalescer.cancel("other") is False
    assert face.ask(coalescer, refused) == "value"


@pytest.mark.parametrize("error", [None, LookupError("old")])
def test_after_cancel_the_next_caller_leads_and_the_old_outcome_never_overwrites(face, error):
    coalescer, old, new = face.coalescer(INF), face.held("old", error), face.held("new")
    leader = face.lead(coalescer, old)
    coalescer.cancel("k")
    second = face.lead(coalescer, new)
    old.release()
    assert outcomes([leader]) == [error or "old"]
    new.release()
    assert second.result() == "new"
    assert face.ask(coalescer, refused) == "new"


def test_cancel_may_come_from_the_call_itself(face):
    coalescer = face.coalescer(10)

    def cancel():
        return coalescer.cancel("k"), coalescer.cancel("k")

    assert face.ask(coalescer, face.callable(cancel)) == (True, False)
    assert "k" not in coalescer


@pytest.mark.parametrize("on_abandoned", ["cancel", "finish"])
def test_cancel_ends_the_call_of_a_task_whose_caller_has_gone(on_abandoned):
    with Tasks() as face:
        coalescer, held = face.coalescer(INF, on_abandoned=on_abandoned), face.held("value")
        leader, (waiter,) = face.lead(coalescer, held), face.join(coalescer, 1)
        leader.cancel()
        assert type(outcomes([leader])[0]) is asyncio.CancelledError
        assert coalescer.cancel("k") is True
        assert type(outcomes([waiter])[0]) is asyncio.CancelledError
        if on_abandoned == "finish":
            assert coalescer.stats().in_flight == 1
            held.release()
        ended = face.loops[0].start(asyncio.wait([held.task]))
        ended.result()
        assert held.task.cancelled() is (on_abandoned == "cancel")
        assert "k" not in coalescer
        assert coalescer.stats().in_flight == 0


async def test_cancel_on_the_loop_of_its_tasks_cancels_the_waiters_and_asks_no_task_to_stop():
    coalescer, gate = AsyncBatchCoalescer(), asyncio.Event()
    leader = asyncio.create_task(coalescer.get_or_call("k", gate.wait))
    waiter = asyncio.create_task(coalescer.get_or_call("k", refused))
    await asyncio.sleep(0)
    assert coalescer.cancel("k") is True
    gate.set()
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait([leader, waiter])
    assert leader.result() is True
    assert waiter.cancelled()
    assert waiter.cancelling() == 0


# When the last caller of a task's call has gone.


@pytest.mark.parametrize("kind", [Tasks, Loops])
@pytest.mark.parametrize("waiters", [0, 2])
def test_an_abandoned_call_that_may_finish_can_be_joined_and_is_retained(kind, waiters):
    with kind() as face:
        coalescer, held = face.coalescer(60, on_abandoned="finish"), face.held("value")
        callers = [face.lead(coalescer, held), *face.join(coalescer, waiters)]
        for caller in callers:
            caller.cancel()
        assert {type(error) for error in outcomes(callers)} == {asyncio.CancelledError}
        assert "k" in coalescer
        assert not held.cancelled.is_set()
        (late,) = face.join(coalescer, 1)
        held.release()
        assert late.result() == "value"
        assert face.ask(coalescer, refused) == "value"


async def test_by_default_an_abandoned_call_is_cancelled():
    coalescer, held = AsyncBatchCoalescer(), HeldCall("value")
    leader = asyncio.create_task(coalescer.get_or_call("k", held))
    await let_run()
    leader.cancel()
    await let_run()
    assert held.cancelled.is_set()
    assert len(coalescer) == coalescer.stats().in_flight == 0


async def test_a_call_that_finishes_alone_may_fail_in_silence_and_is_retained():
    coalescer, held = AsyncBatchCoalescer(60, on_abandoned="finish"), HeldCall(error=LookupError("no such model"))
    leader = asyncio.create_task(coalescer.get_or_call("k", held))
    await let_run()
    leader.cancel()
    await asyncio.wait([leader])
    held.release()
    await asyncio.wait([held.task])
    with pytest.raises(LookupError, match="no such model"):
        await coalescer.get_or_call("k", refused)


@pytest.mark.parametrize("word", ["stop", "", "Finish", None, True, 1], ids=repr)
def test_another_word_for_on_abandoned_is_refused(word):
    with pytest.raises(ValueError, match="on_abandoned must be 'cancel' or 'finish'") as info:
        AsyncBatchCoalescer(on_abandoned=word)
    assert repr(word) in str(info.value)
    with pytest.raises(TypeError, match="on_abandoned"):
        BatchCoalescer(on_abandoned="cancel")


# Clear.


def test_clear_drops_what_is_retained_and_disowns_the_flights(face):
    coalescer, held = face.coalescer(INF), face.held("old")
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    for key in range(50):
        coalescer.put(key, "value")
    coalescer.clear()
    assert len(coalescer) == ("k" in coalescer) == 0
    assert not any(key in coalescer for key in range(50))
    assert (coalescer.stats().in_flight, coalescer.stats().retained) == (1, 0)
    assert face.ask(coalescer, face.callable(lambda: "new")) == "new"
    held.release()
    assert outcomes(callers) == ["old"] * 3
    assert face.ask(coalescer, refused) == "new"
    assert (coalescer.stats().in_flight, coalescer.stats().retained) == (0, 1)


# All of them.


CONTROLS = {
    "peek": lambda coalescer, key: coalescer.peek(key),
    "put": lambda coalescer, key: coalescer.put(key, "new"),
    "forget": lambda coalescer, key: coalescer.forget(key),
    "cancel": lambda coalescer, key: coalescer.cancel(key),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_an_unhashable_key_is_a_type_error(coalescer, name):
    with pytest.raises(TypeError, match="unhashable"):
        CONTROLS[name](coalescer, ["k"])
    assert len(coalescer) == 0


@pytest.mark.parametrize("name", CONTROLS)
def test_a_key_whose_comparison_raises_changes_nothing(coalescer, name):
    class Key:
        def __init__(self, broken):
            self.broken = broken

        def __hash__(self):
            return 1

        def __eq__(self, other):
            if self.broken or other.broken:
                raise ZeroDivisionError("in __eq__")
            return True

    coalescer.put(Key(broken=False), "old")
    with pytest.raises(ZeroDivisionError, match="in __eq__"):
        CONTROLS[name](coalescer, Key(broken=True))
    assert len(coalescer) == 1
    assert coalescer.peek(Key(broken=False)) == "old"


@pytest.mark.parametrize("name", [*CONTROLS, "clear", "stats", "flights", "reset_stats"])
def test_it_is_a_plain_method_that_needs_no_event_loop(coalescer, name):
    method = getattr(coalescer, name)
    assert not inspect.iscoroutinefunction(method)
    arguments = ("k", "value") if name == "put" else ("k",) if name in CONTROLS else ()
    assert not inspect.isawaitable(method(*arguments))

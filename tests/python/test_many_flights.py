"""`get_or_call_many` of threads and tasks among others: joining, hand-over, cancellation, timeouts."""

import asyncio
import threading
from decimal import Decimal

import pytest
from batches import ask_many, batch, held_batch, lead_many, named, nobody, raising, start_many
from faces import FACES, outcomes, refused
from loops import PATIENCE, wait_for_waiters, wait_until

from llm_batch_coalesce import MissingKeysError, _core

INF = float("inf")
SHORT = 0.02


class Stop(BaseException):
    """For the leader alone; the next waiter leads."""


class LimitError(Exception):
    """Is private."""


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


def counted(coalescer):
    """Calls, joined, hits, timeouts, cancelled, handed over, and flights under way."""
    stats = coalescer.stats()
    return (
        *(stats.calls, stats.joined, stats.hits, stats.timeouts, stats.cancelled),
        *(stats.handed_over, stats.in_flight),
    )


# Joining.


@pytest.mark.parametrize("ttl_seconds", [INF, 0])
@pytest.mark.parametrize("others_first", [True, False])
def test_what_is_in_flight_is_joined_and_the_rest_is_led(face, ttl_seconds, others_first):
    """The value of what was joined is there though its flight ended, unretained, before anybody waited for it."""
    coalescer, others, own = face.coalescer(ttl_seconds), face.held("other"), held_batch(face)
    leader = face.lead(coalescer, others, "x")
    caller = lead_many(face, coalescer, ["a", "x", "b"], own)
    assert own.asked == [["a", "b"]]
    assert coalescer._waiters("x") == 1
    for held in (others, own) if others_first else (own, others):
        assert not caller.done()
        held.release()
        if held is others:
            assert leader.result() == "other"
        else:
            wait_until(lambda: coalescer.stats().in_flight == (0 if others_first else 1))
    assert list(caller.result().items()) == [("a", "of a"), ("x", "other"), ("b", "of b")]
    assert own.asked == [["a", "b"]]
    assert counted(coalescer) == (3, 1, 0, 0, 0, 0, 0)
    assert len(coalescer) == (3 if ttl_seconds else 0)


def test_others_join_each_key_that_a_batch_leads(face):
    coalescer, values = face.coalescer(0), {"a": object(), "b": object()}
    held = held_batch(face, lambda keys: values)
    leader = lead_many(face, coalescer, ["a", "b"], held)
    singles = [*face.join(coalescer, 2, key="a"), *face.join(coalescer, 1, key="b", method="outcome")]
    batches = [start_many(face, coalescer, keys, nobody) for keys in (["b", "a"], ["a"])]
    wait_for_waiters(coalescer, "a", 4)
    wait_for_waiters(coalescer, "b", 2)
    held.release()
    assert leader.result() == batches[0].result() == values
    assert leader.result()["a"] is singles[0].result() is singles[1].result() is batches[1].result()["a"]
    outcome = singles[2].result()
    assert (outcome.value is values["b"], outcome.role, outcome.waiters) == (True, "waiter", 2)
    assert counted(coalescer) == (2, 6, 0, 0, 0, 0, 0)


def test_batches_that_overlap_share_what_each_leads(face):
    coalescer, first, second = face.coalescer(INF), held_batch(face), held_batch(face, lambda keys: ["C"])
    callers = [lead_many(face, coalescer, ["a", "b"], first), lead_many(face, coalescer, ["c", "b", "a"], second)]
    third = start_many(face, coalescer, ["c", "a"], nobody)
    wait_for_waiters(coalescer, "a", 2)
    assert (first.asked, second.asked) == ([["a", "b"]], [["c"]])
    second.release()
    first.release()
    assert callers[0].result() == {"a": "of a", "b": "of b"}
    assert callers[1].result() == {"c": "C", "b": "of b", "a": "of a"}
    assert third.result() == {"c": "C", "a": "of a"}
    assert counted(coalescer) == (3, 4, 0, 0, 0, 0, 0)


class Gate:
    """A key that blocks when its hash is asked for and another key is in flight, until two such do."""

    def __init__(self, coalescer, other, barrier):
        self._coalescer, self._other, self._barrier = coalescer, other, barrier

    def __hash__(self):
        if self._barrier is not None and self._other in self._coalescer:
            barrier, self._barrier = self._barrier, None
            barrier.wait(PATIENCE)
        return hash(id(self))


@pytest.mark.parametrize("kind", [FACES[0], FACES[2]], ids=["Threads", "Loops"])
def test_two_batches_that_lead_what_the_other_wants_do_not_deadlock(kind):
    """Each has claimed one key before either looks at the other's: either would wait for ever if it waited first."""
    with kind() as face:
        coalescer, barrier, asked = face.coalescer(INF), threading.Barrier(2), []

        def work(missing):
            barrier.wait(PATIENCE)
            asked.extend(key for key in missing if isinstance(key, str))
            return named(missing)

        orders = [["a", Gate(coalescer, "a", barrier), "b"], ["b", Gate(coalescer, "b", barrier), "a"]]
        callers = [start_many(face, coalescer, keys, batch(face, work)) for keys in orders]
        for caller in callers:
            got = caller.result()
            assert (got["a"], got["b"]) == ("of a", "of b")
        assert sorted(asked) == ["a", "b"]
        assert counted(coalescer)[:2] == (4, 2)


# Errors.


def test_an_error_is_the_leaders_own_and_a_copy_for_each_other(face):
    coalescer, error = face.coalescer(INF), LookupError("no such model")
    held = held_batch(face, raising(error))
    leader = lead_many(face, coalescer, ["a", "b"], held)
    waiters = [face.start(coalescer, refused, "a"), start_many(face, coalescer, ["b", "a"], nobody)]
    wait_for_waiters(coalescer, "a", 2)
    held.release()
    waiters += [start_many(face, coalescer, ["a"], nobody)]
    errors = outcomes([leader, *waiters])
    assert errors[0] is error
    assert [str(other) for other in errors[1:]] == ["no such model"] * 3
    assert len({id(other) for other in errors}) == 4
    assert coalescer.stats().errors == 2


@pytest.mark.parametrize("seconds", [0, lambda error: 0, None], ids=["zero", "callable", "as values"])
def test_an_error_is_retained_as_its_ttl_says(face, seconds):
    coalescer = face.coalescer(INF, error_ttl_seconds=seconds)
    with pytest.raises(LookupError):
        ask_many(face, coalescer, ["a", "b"], batch(face, raising(LookupError())))
    assert ("a" in coalescer, "b" in coalescer) == ((True, True) if seconds is None else (False, False))


def test_a_joined_key_that_fails_fails_the_batch_when_it_has_done_its_own(face):
    coalescer, others, own = face.coalescer(0), face.held(error=LookupError("of x")), held_batch(face)
    leader = face.lead(coalescer, others, "x")
    caller, watcher = lead_many(face, coalescer, ["x", "a"], own), face.start(coalescer, refused, "a")
    others.release()
    assert outcomes([leader]) == [others.error]
    assert not caller.done()
    own.release()
    (error,) = outcomes([caller])
    assert (str(error), error is others.error) == ("of x", False)
    assert watcher.result() == "of a"


@pytest.mark.parametrize("error", [Stop, LimitError])
def test_a_private_error_is_the_leaders_and_the_next_of_each_key_leads(face, error):
    coalescer = face.coalescer(INF, private_errors=LimitError)
    raised = error()
    held = held_batch(face, raising(raised))
    leader = lead_many(face, coalescer, ["a", "b"], held)
    single = face.start(coalescer, face.callable(lambda: "own"), "a")
    other = start_many(face, coalescer, ["a", "b"], batch(face))
    wait_for_waiters(coalescer, "b", 1)
    held.release()
    assert outcomes([leader]) == [raised]
    assert single.result() == "own"
    assert other.result() == {"a": "own", "b": "of b"}
    # While it waits for "a" it cannot come for "b": it takes that over, or leads it anew.
    assert counted(coalescer) in [(4, 1, 0, 0, 0, handed_over, 0) for handed_over in (1, 2)]


# Busy waiters.


@pytest.mark.parametrize("error", [Stop, LimitError])
def test_a_batch_that_is_in_its_call_is_passed_over_in_a_hand_over(face, error):
    coalescer = face.coalescer(0, private_errors=LimitError)
    first, second, own = face.held(error=error()), face.held("second"), held_batch(face)
    leader = face.lead(coalescer, first, "x")
    caller = lead_many(face, coalescer, ["x", "a"], own)
    heir, last = face.start(coalescer, second, "x"), face.start(coalescer, refused, "x")
    first.release()
    assert second.started.wait(PATIENCE)
    assert coalescer._waiters("x") == 2
    second.release()
    assert outcomes([leader, heir, last]) == [first.error, "second", "second"]
    own.release()
    assert caller.result() == {"x": "second", "a": "of a"}
    assert own.asked == [["a"]]
    assert counted(coalescer) == (3, 2, 0, 0, 0, 1, 0)


@pytest.mark.parametrize("error", [Stop, LimitError])
def test_a_batch_leads_the_key_itself_when_its_leader_failed_privately_and_nobody_else_waits(face, error):
    coalescer = face.coalescer(INF, private_errors=LimitError)
    others, own = face.held(error=error()), held_batch(face)
    leader = face.lead(coalescer, others, "x")
    caller = lead_many(face, coalescer, ["x", "a"], own)
    others.release()
    assert outcomes([leader]) == [others.error]
    assert "x" not in coalescer
    own.release()
    assert caller.result() == {"x": "of x", "a": "of a"}
    assert own.asked == [["a"], ["x"]]
    assert face.ask(coalescer, refused, "x") == "of x"
    assert counted(coalescer) == (3, 0, 1, 0, 0, 0, 0)


def test_a_batch_that_waits_is_offered_the_lead_like_any_other(face):
    coalescer = face.coalescer(INF, private_errors=LimitError)
    others, own = face.held(error=LimitError()), held_batch(face)
    leader, last = face.lead(coalescer, others, "x"), face.held("of y")
    second = face.lead(coalescer, last, "y")
    coalescer.put("a", "retained")
    caller = start_many(face, coalescer, ["a", "x", "y"], own)
    wait_for_waiters(coalescer, "y", 1)
    follower = face.start(coalescer, refused, "x")
    others.release()
    assert outcomes([leader]) == [others.error]
    assert own.started.wait(PATIENCE)
    assert own.asked == [["x"]]
    last.release()
    own.release()
    assert caller.result() == {"a": "retained", "x": "of x", "y": "of y"}
    assert outcomes([follower, second]) == ["of x", "of y"]
    assert counted(coalescer) == (3, 2, 1, 0, 0, 1, 0)


def test_a_batch_that_takes_over_a_key_and_gets_no_value_for_it_names_it(face):
    coalescer = face.coalescer(INF, private_errors=LimitError)
    others = face.held(error=LimitError())
    leader = face.lead(coalescer, others, "x")
    caller = start_many(face, coalescer, ["x"], batch(face, lambda keys: {"z": 1}))
    wait_for_waiters(coalescer, "x", 1)
    others.release()
    assert outcomes([leader]) == [others.error]
    (error,) = outcomes([caller])
    assert (type(error), error.missing, error.surplus, error.values) == (MissingKeysError, ["x"], ["z"], {})


# Cancelling and forgetting in mid-batch.


@pytest.mark.parametrize("drop", ["cancel", "forget", "clear", "put"])
def test_a_key_that_is_dropped_in_mid_batch_still_has_its_value_for_the_leader(face, drop):
    coalescer, held = face.coalescer(INF), held_batch(face)
    leader = lead_many(face, coalescer, ["a", "b"], held)
    waiters = [face.start(coalescer, refused, key) for key in "ab"]
    arguments = {"clear": (), "put": ("a", "put")}.get(drop, ("a",))
    assert getattr(coalescer, drop)(*arguments) in (True, None)
    assert ask_many(face, coalescer, ["a"], batch(face, lambda keys: ["new"])) == {
        "a": "put" if drop == "put" else "new"
    }
    held.release()
    assert leader.result() == {"a": "of a", "b": "of b"}
    first, second = outcomes(waiters)
    assert second == "of b"
    assert type(first) is face.cancelled_error if drop == "cancel" else first == "of a"
    # What was dropped never overwrites the newer one.
    assert coalescer.peek("a") == ("put" if drop == "put" else "new")
    assert coalescer.peek("b") == (None if drop == "clear" else "of b")


def test_who_waits_for_a_key_that_is_cancelled_is_cancelled_when_it_has_done_its_own(face):
    coalescer, others, own = face.coalescer(INF), face.held("other"), held_batch(face)
    leader = face.lead(coalescer, others, "x")
    caller = lead_many(face, coalescer, ["x", "a"], own)
    assert coalescer.cancel("x")
    assert not caller.done()
    own.release()
    (error,) = outcomes([caller])
    assert type(error) is face.cancelled_error
    assert coalescer.peek("a") == "of a"
    others.release()
    assert leader.result() == "other"
    assert counted(coalescer) == (2, 0, 0, 0, 1, 0, 0)


def test_who_joined_a_key_that_is_forgotten_gets_its_value(face):
    coalescer, others, own = face.coalescer(INF), face.held("other"), held_batch(face)
    leader = face.lead(coalescer, others, "x")
    caller = lead_many(face, coalescer, ["x", "a"], own)
    assert coalescer.forget("x")
    coalescer.put("x", "newer")
    others.release()
    own.release()
    assert leader.result() == "other"
    assert caller.result() == {"x": "other", "a": "of a"}
    assert coalescer.peek("x") == "newer"


# Timeouts.


def test_a_timeout_of_zero_does_not_wait_but_leads(face):
    coalescer, others, asked = face.coalescer(INF, name="answers"), face.held("other"), []
    leader = face.lead(coalescer, others, "x")
    coalescer.put("hit", 1)
    with pytest.raises(TimeoutError, match="of 'x' in coalescer 'answers' was not done within 0 seconds"):
        ask_many(face, coalescer, ["x", "a", "hit"], batch(face, lambda keys: asked.extend(keys) or keys), timeout=0)
    assert asked == ["a"]
    assert coalescer.peek("a") == "a"
    others.release()
    assert leader.result() == "other"
    assert counted(coalescer) == (2, 0, 1, 1, 0, 0, 0)


def test_a_timeout_is_for_all_waits_together(face):
    """3,000 waits of 0.02 seconds would take a minute."""
    coalescer, others = face.coalescer(INF), held_batch(face)
    leader = lead_many(face, coalescer, range(3_000), others)
    caller = start_many(face, coalescer, range(3_000), nobody, timeout=SHORT)
    wait_until(caller.done)
    (error,) = outcomes([caller])
    assert type(error) is TimeoutError
    assert f"within {SHORT} seconds" in str(error)
    others.release()
    assert leader.result() == named(range(3_000))
    assert counted(coalescer) == (3_000, 0, 0, 3_000, 0, 0, 0)


@pytest.mark.parametrize("timeout", [0, SHORT])
def test_a_timeout_never_bounds_the_callers_own_call(face, timeout):
    coalescer, held = face.coalescer(INF), held_batch(face)
    leader = lead_many(face, coalescer, ["a"], held, timeout=timeout)
    # It began later and waits longer, so the leader's time is over when its own is.
    with pytest.raises(TimeoutError):
        face.ask(coalescer, refused, "a", timeout=2 * SHORT)
    assert not leader.done()
    held.release()
    assert leader.result() == {"a": "of a"}


@pytest.mark.parametrize("timeout", [60, INF, Decimal("59.5"), 1e18, 1e300, 10**100, 10**400], ids=type)
def test_any_number_is_a_timeout(face, timeout):
    coalescer, others = face.coalescer(INF), face.held("other")
    leader = face.lead(coalescer, others, "x")
    caller = start_many(face, coalescer, ["a", "x"], batch(face), timeout=timeout)
    wait_for_waiters(coalescer, "x", 1)
    others.release()
    assert caller.result() == {"a": "of a", "x": leader.result()}


def test_what_was_done_in_time_is_kept_for_others_when_the_time_is_over(face):
    coalescer, others = face.coalescer(INF), face.held("other")
    leader = face.lead(coalescer, others, "x")
    with pytest.raises(TimeoutError):
        ask_many(face, coalescer, ["a", "x"], batch(face), timeout=SHORT)
    assert coalescer.peek("a") == "of a"
    others.release()
    assert leader.result() == "other"


# Flights over age, and what is told.


def test_a_batch_does_not_join_a_flight_over_age(face):
    coalescer, others = face.coalescer(INF, max_flight_seconds=60), face.held("old")
    leader = face.lead(coalescer, others, "x")
    _core._advance_clock(61)
    assert ask_many(face, coalescer, ["x", "a"], batch(face)) == {"x": "of x", "a": "of a"}
    others.release()
    assert leader.result() == "old"
    assert coalescer.peek("x") == "of x"


def test_flights_of_a_batch_tell_their_leader(face):
    coalescer, held = face.coalescer(INF), held_batch(face)
    leader = lead_many(face, coalescer, ["a", "b"], held)
    follower = face.start(coalescer, refused, "b")
    flights = coalescer.flights()
    assert {flight.key: flight.waiters for flight in flights} == {"a": 0, "b": 1}
    assert len({flight.leader for flight in flights}) == 1
    assert isinstance(flights[0].leader, str)
    held.release()
    assert outcomes([leader, follower]) == [{"a": "of a", "b": "of b"}, "of b"]
    assert coalescer.flights() == []
    assert asyncio.iscoroutinefunction(type(coalescer).get_or_call_many) is (type(face).__name__ != "Threads")

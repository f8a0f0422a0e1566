"""What a coalescer tells of itself: counters, outcomes with their flights, flights under way, and the log."""

import asyncio
import dataclasses
import hashlib
import logging
import re

import pytest
from faces import FACES, Tasks, Threads, outcomes, refused
from loops import PATIENCE, wait_until

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, FlightInfo, Outcome, Stats, _core

INF = float("inf")
COUNTS = ("calls", "joined", "hits", "timeouts", "cancelled")


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


@pytest.fixture(params=[BatchCoalescer, AsyncBatchCoalescer])
def kind(request):
    """For what needs no caller."""
    return request.param


def fail():
    raise LookupError("no such model")


# Counters.


def test_the_counters_tell_what_became_of_each_request(face):
    coalescer = face.coalescer(10)
    assert coalescer.stats() == Stats(*[0] * 10)
    held = face.held("value")
    callers = [face.lead(coalescer, held), *face.join(coalescer, 3)]
    assert coalescer.stats() == Stats(1, 0, 0, 0, 0, 0, 0, 0, in_flight=1, retained=0)
    held.release()
    outcomes(callers)
    assert coalescer.stats() == Stats(1, 3, 0, 0, 0, 0, 0, 0, in_flight=0, retained=1)
    face.ask(coalescer, refused)
    for _ in range(3):
        outcomes([face.start(coalescer, face.callable(fail), "failed")])
    assert coalescer.stats() == Stats(2, 3, 3, 1, 0, 0, 0, 0, in_flight=0, retained=2)
    _core._advance_clock(11)
    assert coalescer.stats() == Stats(2, 3, 3, 1, 0, 0, 0, 0, in_flight=0, retained=0)


def test_saved_is_what_needed_no_call_of_its_own(kind):
    stats = Stats(
        calls=2, joined=5, hits=1, errors=9, timeouts=9, cancelled=9, handed_over=9, evicted=9, in_flight=9, retained=9
    )
    assert (stats.saved, stats.saved_ratio) == (6, 0.75)
    assert (kind().stats().saved, kind().stats().saved_ratio) == (0, 0.0)


@pytest.mark.parametrize("report", [Stats(*range(10)), Outcome("value", "hit", 1, 0.5), FlightInfo("k", 0.5, 1, None)])
def test_reports_are_frozen(report):
    for field in dataclasses.fields(report):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(report, field.name, 5)
    assert report == dataclasses.replace(report)


def test_reports_have_the_fields_that_were_agreed_on():
    stats = "calls joined hits errors timeouts cancelled handed_over evicted in_flight retained store_hits store_errors"
    fields = {
        Stats: stats,
        Outcome: "value role waiters duration_seconds",
        FlightInfo: "key age_seconds waiters leader is_stream",
    }
    for kind, names in fields.items():
        assert [field.name for field in dataclasses.fields(kind)] == names.split()


def test_reset_counts_from_zero_and_leaves_what_is_there(face):
    coalescer, held = face.coalescer(INF), face.held("value")
    outcomes([face.start(coalescer, face.callable(fail), "failed") for _ in range(3)])
    callers = [face.lead(coalescer, held), *face.join(coalescer, 2)]
    with pytest.raises(TimeoutError):
        face.ask(coalescer, refused, timeout=0)
    coalescer.reset_stats()
    assert coalescer.stats() == Stats(0, 0, 0, 0, 0, 0, 0, 0, in_flight=1, retained=1)
    held.release()
    assert outcomes(callers) == ["value"] * 3
    # They are counted when they end; the call was counted when it began.
    assert coalescer.stats() == Stats(0, 2, 0, 0, 0, 0, 0, 0, in_flight=0, retained=2)
    face.ask(coalescer, refused)
    assert coalescer.stats().hits == 1


def test_every_request_is_counted_exactly_once(face):
    coalescer = face.coalescer(INF, private_errors=LookupError)
    limited, held = face.held(error=LookupError()), face.held("value")
    callers = [face.lead(coalescer, limited), *face.join(coalescer, 4, held)]
    callers += [face.start(coalescer, refused, timeout=timeout) for timeout in (0, 0.001, 0.002)]
    limited.release()
    assert held.started.wait(PATIENCE)
    wait_until(lambda: coalescer.stats().timeouts == 3)
    held.release()
    outcomes(callers)
    callers += [face.start(coalescer, refused, method=method) for method in ("get_or_call", "outcome")]
    flying = face.held("value")
    callers += [face.lead(coalescer, flying, "other"), *face.join(coalescer, 2, key="other")]
    coalescer.cancel("other")
    flying.release()
    outcomes(callers)
    stats = coalescer.stats()
    assert [getattr(stats, name) for name in COUNTS] == [3, 3, 2, 3, 2]
    assert sum(getattr(stats, name) for name in COUNTS) == len(callers) == 13
    assert (stats.handed_over, stats.errors, stats.in_flight) == (1, 1, 0)


def test_what_is_refused_is_no_request(face):
    coalescer = face.coalescer(10)
    for fn, key, timeout, ttl in (
        (refused, ["k"], 1, 1),
        (5, "k", 1, 1),
        (refused, "k", -1, 1),
        (refused, "k", 1, True),
    ):
        with pytest.raises((TypeError, ValueError)):
            face.ask(coalescer, fn, key, timeout=timeout, ttl_seconds=ttl)
    assert coalescer.stats() == Stats(*[0] * 10)
    coalescer.put("k", "value")
    coalescer.peek("k")
    coalescer.forget("k")
    assert coalescer.stats() == Stats(*[0] * 10)


def test_a_call_that_asks_for_its_own_key_counts_as_one_request():
    coalescer = BatchCoalescer()
    with pytest.raises(RuntimeError):
        coalescer.get_or_call("k", lambda: coalescer.get_or_call("k", refused))
    assert coalescer.stats() == Stats(1, 0, 0, 1, 0, 0, 0, 0, 0, 0)


def test_a_leader_that_is_cancelled_is_a_call_and_a_waiter_is_cancelled():
    with Tasks() as face:
        coalescer, held = face.coalescer(), face.held("value")
        leader, (waiter, other) = face.lead(coalescer, held), face.join(coalescer, 2)
        leader.cancel()
        waiter.cancel()
        assert [type(error) for error in outcomes([leader, waiter])] == [asyncio.CancelledError] * 2
        held.release()
        assert other.result() == "value"
        assert [getattr(coalescer.stats(), name) for name in COUNTS] == [1, 1, 0, 0, 1]


# Outcomes.


def test_an_outcome_tells_role_waiters_and_duration(face):
    coalescer, value = face.coalescer(60), object()
    held = face.held(value)
    callers = [face.lead(coalescer, held, method="outcome"), *face.join(coalescer, 3, method="outcome")]
    _core._advance_clock(30)
    held.release()
    results = outcomes(callers)
    results.append(face.ask(coalescer, refused, method="outcome"))
    assert all(type(result) is Outcome and result.value is value for result in results)
    assert [result.role for result in results] == ["leader", "waiter", "waiter", "waiter", "hit"]
    assert [result.waiters for result in results] == [3] * 5
    assert {result.duration_seconds for result in results} == {results[0].duration_seconds}
    assert 30 <= results[0].duration_seconds < 30 + PATIENCE


def test_waiters_are_all_who_joined_also_those_who_did_not_stay(face):
    coalescer, held = face.coalescer(60), face.held("value")
    callers = [face.lead(coalescer, held, method="outcome"), *face.join(coalescer, 2, method="outcome")]
    with pytest.raises(TimeoutError):
        face.ask(coalescer, refused, timeout=0.001)
    held.release()
    assert [result.waiters for result in outcomes(callers)] == [3] * 3


def test_an_outcome_that_is_not_retained_is_told_all_the_same(face):
    coalescer = face.coalescer(0)
    first = face.ask(coalescer, face.callable(lambda: None), method="outcome")
    assert (first.value, first.role, first.waiters) == (None, "leader", 0)
    assert first.duration_seconds >= 0


def test_an_error_is_raised_by_outcome_too(face):
    coalescer, held = face.coalescer(60), face.held(error=LookupError("no such model"))
    callers = [face.lead(coalescer, held, method="outcome"), *face.join(coalescer, 1, method="outcome")]
    held.release()
    callers.append(face.start(coalescer, refused, method="outcome"))
    assert [repr(error) for error in outcomes(callers)] == ["LookupError('no such model')"] * 3


def test_what_was_put_is_a_hit_of_a_call_that_took_no_time(face):
    coalescer = face.coalescer(60)
    coalescer.put("k", "value")
    assert face.ask(coalescer, refused, method="outcome") == Outcome("value", "hit", 0, 0.0)


# Flights.


def test_flights_tell_key_age_waiters_and_leader(face):
    coalescer, old, new = face.coalescer(60), face.held("old"), face.held("new")
    assert coalescer.flights() == []
    callers = [face.lead(coalescer, old, ("old", 1), name="first leader"), *face.join(coalescer, 3, key=("old", 1))]
    _core._advance_clock(30)
    callers.append(face.lead(coalescer, new, "new", name="second leader"))
    coalescer.put("retained", "value")
    flights = coalescer.flights()
    assert [(flight.key, flight.waiters, flight.leader) for flight in flights] == [
        (("old", 1), 3, "first leader"),
        ("new", 0, "second leader"),
    ]
    assert 30 <= flights[0].age_seconds < 30 + PATIENCE
    assert 0 <= flights[1].age_seconds < PATIENCE
    old.release()
    new.release()
    outcomes(callers)
    assert coalescer.flights() == []


@pytest.mark.parametrize("drop", ["forget", "clear", "put", "cancel"])
def test_a_flight_that_is_no_longer_the_keys_still_shows(face, drop):
    coalescer, held = face.coalescer(60), face.held("value")
    leader = face.lead(coalescer, held, name="leader")
    getattr(coalescer, drop)(*{"clear": (), "put": ("k", "put", 60)}.get(drop, ("k",)))
    assert [(flight.key, flight.leader) for flight in coalescer.flights()] == [("k", "leader")]
    assert coalescer.stats().in_flight == 1
    primed = drop == "put"
    assert (len(coalescer), "k" in coalescer) == (int(primed), primed)
    held.release()
    leader.result()
    assert coalescer.flights() == []
    assert coalescer.stats().in_flight == 0


def test_a_call_whose_caller_has_gone_is_told_by_its_own_task():
    with Tasks() as face:
        coalescer, held = face.coalescer(), face.held("value")
        leader, (waiter,) = face.lead(coalescer, held, name="leader"), face.join(coalescer, 1)
        leader.cancel()
        outcomes([leader])
        (flight,) = coalescer.flights()
        assert flight.leader in {"leader", held.task.get_name()}
        assert flight.waiters == 1
        held.release()
        assert waiter.result() == "value"


def test_the_age_is_that_of_the_present_attempt(face):
    coalescer = face.coalescer(60, private_errors=LookupError, max_flight_seconds=50)
    limited, held = face.held(error=LookupError()), face.held("value")
    leader, (heir,) = face.lead(coalescer, limited), face.join(coalescer, 1, held, name="heir")
    _core._advance_clock(40)
    limited.release()
    assert held.started.wait(PATIENCE)
    (flight,) = coalescer.flights()
    assert (flight.leader, flight.waiters) == ("heir", 0)
    assert flight.age_seconds < 40
    # So it is not yet over age, either.
    _core._advance_clock(20)
    (joiner,) = face.join(coalescer, 1)
    held.release()
    assert outcomes([heir, joiner]) == ["value", "value"]
    assert type(outcomes([leader])[0]) is LookupError


# Over age.


def test_from_the_given_age_on_the_next_caller_leads_and_present_waiters_stay(face):
    coalescer, old, new = face.coalescer(INF, max_flight_seconds=50), face.held("old"), face.held("new")
    of_old = [face.lead(coalescer, old), *face.join(coalescer, 2)]
    _core._advance_clock(20)
    of_old += face.join(coalescer, 1)
    _core._advance_clock(31)
    of_new = [face.lead(coalescer, new), *face.join(coalescer, 2)]
    assert not any(caller.done() for caller in of_old)
    assert [flight.waiters for flight in coalescer.flights()] == [3, 2]
    new.release()
    assert outcomes(of_new) == ["new"] * 3
    old.release()
    assert outcomes(of_old) == ["old"] * 4
    # It came last, and does not overwrite.
    assert face.ask(coalescer, refused) == "new"
    assert coalescer.stats().retained == 1


@pytest.mark.parametrize("error", [None, LookupError("old")])
def test_an_over_age_call_that_ends_before_its_successor_is_not_retained(face, error):
    coalescer, old, new = face.coalescer(INF, max_flight_seconds=50), face.held("old", error), face.held("new")
    leader = face.lead(coalescer, old)
    _core._advance_clock(51)
    successor = face.lead(coalescer, new)
    old.release()
    assert outcomes([leader]) == [error or "old"]
    joiner = face.start(coalescer, refused)
    new.release()
    assert outcomes([successor, joiner]) == ["new", "new"]
    assert face.ask(coalescer, refused) == "new"


def over_age(caplog):
    return [record for record in caplog.records if record.name == "llm_batch_coalesce"]


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("my secret prompt é", "my secret prompt é".encode()),
        (b"my secret prompt", b"my secret prompt"),
        (("my secret prompt", 1), b"('my secret prompt', 1)"),
    ],
    ids=["str", "bytes", "tuple"],
)
def test_a_flight_over_age_is_logged_once_with_its_keys_type_and_digest(face, caplog, key, content):
    coalescer = face.coalescer(60, max_flight_seconds=50, name="answers")
    held, other = face.held("value"), face.held("value")
    callers = [face.lead(coalescer, held, key)]
    _core._advance_clock(51)
    wait_until(lambda: over_age(caplog))
    _core._advance_clock(51)
    # When the second one has been logged, the first has been looked at again.
    callers.append(face.lead(coalescer, other, "other"))
    _core._advance_clock(51)
    wait_until(lambda: len(over_age(caplog)) > 1)
    held.release()
    other.release()
    outcomes(callers)
    first, second = over_age(caplog)
    assert first.levelno == logging.WARNING
    message = first.getMessage()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    assert re.search(rf"\btype {type(key).__name__}\b.*\bdigest {digest}\b.*'answers'", message)
    assert "secret" not in message + repr(first.args)
    assert hashlib.blake2b(b"other", digest_size=8).hexdigest() in second.getMessage()


def test_a_key_whose_repr_is_broken_is_logged_as_unknown(caplog):
    class Key:
        def __repr__(self):
            raise ZeroDivisionError

    with Threads() as face:
        coalescer, held, key = face.coalescer(max_flight_seconds=50), face.held("value"), Key()
        leader = face.lead(coalescer, held, key)
        _core._advance_clock(51)
        wait_until(lambda: over_age(caplog))
        held.release()
        leader.result()
    assert "unknown" in over_age(caplog)[0].getMessage()


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("5", TypeError)],
)
def test_a_wrong_age_is_named(kind, limit, error):
    with pytest.raises(error, match="max_flight_seconds"):
        kind(max_flight_seconds=limit)


@pytest.mark.parametrize("limit", [None, INF])
def test_without_a_limit_a_flight_is_joined_at_any_age(face, caplog, limit):
    coalescer, held = face.coalescer(max_flight_seconds=limit), face.held("value")
    leader = face.lead(coalescer, held)
    _core._advance_clock(10**6)
    (waiter,) = face.join(coalescer, 1)
    held.release()
    assert outcomes([leader, waiter]) == ["value", "value"]
    assert not over_age(caplog)


# Its name.


def test_the_name_is_in_repr_and_only_text(kind):
    coalescer = kind(name="answers")
    assert coalescer.name == "answers"
    assert re.match(rf"<{kind.__name__} .answers. ttl_seconds=5\.0 ", repr(coalescer))
    assert kind().name is None
    assert "None" not in repr(kind())
    with pytest.raises(TypeError, match="name must be a str, not 5"):
        kind(name=5)


def test_the_name_is_in_the_errors_of_a_coalescer_that_has_one():
    for name, where in (("answers", " in coalescer 'answers'"), (None, "")):
        coalescer = BatchCoalescer(name=name)
        with pytest.raises(RuntimeError) as info:
            coalescer.get_or_call("k", lambda coalescer=coalescer: coalescer.get_or_call("k", refused))
        assert f"'k'{where} asks" in str(info.value)

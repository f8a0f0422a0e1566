"""What travels in a fleet: values, errors, and how long both are retained, here and on the server."""

import collections
import enum
import math
import os
import pickle
import time

import pytest
from fleets import KEPT, KINDS
from loops import wait_until

from llm_batch_coalesce import Retain
from llm_batch_coalesce.redis import JsonSerializer, RemoteCallError, SerializationError

both_kinds = pytest.mark.parametrize("kind", KINDS)


def shared(fleet, one, other, key="k", **wish):
    """Return what one caller of each of two members gets, of a call that the first one makes."""
    led = one.ask(key, hold=True, **wish).wait_for_call()
    waits = other.ask(key, value="not this")
    fleet.wait_for_waiting(1)
    led.release()
    assert (led.calls, waits.calls) == (1, 0)
    return led.results()[0], waits.results()[0]


def left_on_server(fleet):
    """Return for how many seconds there is an outcome that is retained on the server, or None."""
    names = [name for name in fleet.names() if name.endswith(":outcome")]
    return fleet.client.pttl(names[0]) / 1000 if names else None


VALUES = [
    None,
    True,
    2**70,
    -0.0,
    1.5e300,
    "é \ud83d 🙂 \x00",
    "\ud83d\ude42",
    "x" * 100_000,
    [1, [2.0, []]],
    {"a": {"": None}, "é": [False]},
]


@both_kinds
def test_json_values_arrive_as_they_were(fleet, kind):
    one, other, late = fleet.member(kind), fleet.member(kind), fleet.member(kind)
    for number, value in enumerate(VALUES):
        mine, received = shared(fleet, one, other, number, value=value)
        for got in [mine, received, late.get(number, "not this")]:
            assert got == value
            assert type(got) is type(value)
            assert repr(got) == repr(value)


REFUSED = [
    (math.nan, "float"),
    ([math.inf], "list"),
    ((1, 2), "tuple"),
    ({"a": ()}, "dict"),
    ({1: 2}, "dict"),
    ([{None: 1}], "list"),
    ({1}, "set"),
    (b"bytes", "bytes"),
    (collections.namedtuple("Pair", "a b")(1, 2), "Pair"),  # noqa: PYI024 - any will do
    (collections.Counter("aab"), "Counter"),
    ([enum.StrEnum("Role", "USER")("user")], "list"),
    (enum.IntEnum("Level", "LOW")(1), "Level"),
    (10**5000, "int"),
    (Retain, "type"),
]


@both_kinds
def test_a_value_that_cannot_be_serialised_is_for_its_own_process(fleet, kind, caplog):
    one, other = fleet.member(kind, ttl_seconds=60), fleet.member(kind, ttl_seconds=60)
    for number, (value, name) in enumerate(REFUSED):
        mine, received = shared(fleet, one, other, number, value=value)
        assert mine is value
        assert isinstance(received, SerializationError)
        assert received.value_type == name
        assert name in str(received)
        assert f"type {name} " in caplog.messages[-1]
        assert [other.get(number, "again"), one.get(number)] == ["again", "again"], "nothing is retained"


def test_a_value_that_holds_itself_or_is_too_deep_is_refused():
    circle, deep = [], []
    circle.append(circle)
    for _ in range(100_000):
        deep = [deep]
    for value in [circle, deep]:
        with pytest.raises((ValueError, RecursionError)):
            JsonSerializer().dumps(value)


class Texts:
    """Gives what it is told to give, and takes what it gets."""

    def __init__(self, content):
        self.content = content

    def dumps(self, value):
        if isinstance(self.content, Exception):
            raise self.content
        return self.content

    def loads(self, content):
        return [content]


class UnreadableError(Exception):
    def __str__(self):
        raise RuntimeError


@both_kinds
def test_a_serializer_gives_bytes_or_text(fleet, kind):
    for content, received in [(b"\x00\n\xff", [b"\x00\n\xff"]), ("é\n", ["é\n".encode()]), (b"", [b""])]:
        one, other = (fleet.member(kind, serializer=Texts(content)) for _ in range(2))
        assert shared(fleet, one, other, content, value="x") == ("x", received)
    for content in [7, None, bytearray(b"x"), UnreadableError()]:
        one, other = (fleet.member(kind, serializer=Texts(content)) for _ in range(2))
        mine, error = shared(fleet, one, other, repr(type(content)), value="x")
        assert mine == "x"
        assert isinstance(error, SerializationError)
        assert error.value_type == "str"


def test_pickle_is_taken_by_those_who_ask_for_it(fleet):
    one, other = (fleet.member(serializer=pickle) for _ in range(2))
    assert shared(fleet, one, other, value=({1}, (2,)))[1] == ({1}, (2,))


@both_kinds
def test_an_error_is_the_original_here_and_a_remote_call_error_elsewhere(fleet, kind):
    (one,) = fleet.processes([kind], ttl_seconds=60)
    other = fleet.member(kind, ttl_seconds=60)
    led = one.ask("k", error=KeyError("gone"), hold=True, callers=3).wait_for_call()
    waits = other.ask("k", callers=3)
    fleet.wait_for_waiting(1)
    led.release()
    assert [repr(error) for error in led.results()] == ["KeyError('gone')"] * 3
    late = fleet.member(kind)
    for error in [*waits.results(), *other.ask("k", callers=2).results(), *late.ask("k").results()]:
        assert type(error) is RemoteCallError
        assert (error.error_type, error.error_message) == ("builtins.KeyError", "'gone'")
        assert f":{one.pid}:" in error.leader
        assert str(one.pid) != str(os.getpid())
        assert "builtins.KeyError: 'gone'" in str(error)
        assert vars(error).keys() - {"__notes__"} == {"error_type", "error_message", "leader"}
    assert len({id(error) for error in waits.results()}) == 3, "each caller has a copy of its own"


def test_errors_whose_message_or_class_is_odd_travel_too(fleet):
    one, other = fleet.member(), fleet.member()

    class LocalError(Exception):
        pass

    for number, (error, message) in enumerate(
        [(UnreadableError(), "<its message cannot be read>"), (LocalError("\udc80 é"), "\udc80 é"), (LocalError(), "")]
    ):
        mine, received = shared(fleet, one, other, number, error=error)
        assert mine is error
        assert received.error_message == message
        assert received.error_type == f"{__name__}.{type(error).__qualname__}"


@both_kinds
@pytest.mark.parametrize("setting", [0, 30, lambda error: 0, lambda error: error.args[0], lambda error: None])
def test_errors_are_retained_for_their_own_ttl(fleet, kind, setting):
    error = ValueError(30)
    seconds = setting(error) if callable(setting) else setting
    expected = 60 if seconds is None else seconds
    options = {"ttl_seconds": 60, "error_ttl_seconds": setting, "lease_seconds": 5}
    one, other = fleet.member(kind, **options), fleet.member(kind, **options)
    mine, received = shared(fleet, one, other, error=error)
    assert mine is error
    assert isinstance(received, RemoteCallError)
    left = left_on_server(fleet)
    if expected == 0:
        assert left is None
        assert other.get("k", "new") == one.get("k") == "new"
    else:
        assert expected - 20 < left <= expected
        for member in [one, other, fleet.member(kind)]:
            again = member.ask("k", value="new")
            assert isinstance(again.results()[0], ValueError if member is one else RemoteCallError)
            assert again.calls == 0


@both_kinds
def test_a_decision_about_an_error_is_asked_for_once(fleet, kind, caplog):
    asked = []

    def decide(error):
        asked.append(error)
        raise LookupError("no decision")

    one, other = fleet.member(kind, error_ttl_seconds=decide), fleet.member(kind)
    mine, _ = shared(fleet, one, other, error=ValueError())
    assert asked == [mine]
    assert len(caplog.messages) == 1
    assert "error_ttl_seconds failed for ValueError" in caplog.messages[0]
    assert one.get("k", "new") == "new"
    for answer in [math.inf, -1, "soon"]:
        member = fleet.member(kind, error_ttl_seconds=lambda error, answer=answer: answer)
        member.ask(answer, error=ValueError()).results()
        assert member.get(answer, "new") == "new"


@both_kinds
def test_an_error_of_the_fleet_that_is_raised_on_is_an_error_like_any_other(fleet, kind):
    one, other, third = (fleet.member(kind, ttl_seconds=60) for _ in range(3))
    _, remote = shared(fleet, one, other, error=ValueError("first"), ttl_seconds=0)
    assert isinstance(remote, RemoteCallError)
    mine, received = shared(fleet, other, third, "outer", error=remote)
    assert mine is remote
    assert received.error_type == "llm_batch_coalesce.redis.RemoteCallError"
    assert other.ask("outer").results()[0].error_message == "first", "its TTL is that of its own call"


@both_kinds
def test_a_ttl_of_the_call_or_its_result_holds_in_the_fleet(fleet, kind):
    for number, (wish, seconds) in enumerate(
        [
            ({}, 40),
            ({"ttl_seconds": 20}, 20),
            ({"retain_seconds": 90}, 90),
            ({"ttl_seconds": 9, "retain_seconds": 70}, 70),
        ]
    ):
        fleet.client.flushall()
        one, other = fleet.member(kind, ttl_seconds=40), fleet.member(kind, ttl_seconds=5)
        assert shared(fleet, one, other, number, value="v", **wish) == ("v", "v")
        assert seconds - 10 < left_on_server(fleet) <= seconds
        assert [member.do("stats").retained for member in [one, other]] == [1, 1]


@both_kinds
@pytest.mark.parametrize("wish", [{}, {"retain_seconds": 0}, {"ttl_seconds": 0}, {"error": ValueError("x")}])
def test_what_is_not_retained_is_there_for_those_who_waited_only(fleet, kind, wish):
    ttl = 60 if wish and "error" not in wish else 0
    one, other = (fleet.member(kind, ttl_seconds=ttl, lease_seconds=5) for _ in range(2))
    mine, received = shared(fleet, one, other, value="v", **wish)
    if "error" not in wish:
        assert mine == received == "v"
    (late,) = fleet.names()
    assert 0 < fleet.client.pttl(late) <= 5000
    assert [member.do("stats").retained for member in [one, other]] == [0, 0]
    assert [other.get("k", "a", ttl_seconds=0), one.get("k", "b", ttl_seconds=0)] == ["a", "b"]
    assert fleet.names() == [late], "without waiters there is nothing to leave behind"


@both_kinds
def test_what_was_received_is_retained_for_what_is_left_of_it(fleet, kind):
    one, other, late = (fleet.member(kind, ttl_seconds=60) for _ in range(3))
    shared(fleet, one, other, value="v")
    (name,) = fleet.names()
    fleet.client.pexpire(name, 1_500)
    assert late.get("k") == "v"
    wait_until(lambda: fleet.names() == [])
    wait_until(lambda: not late.do("__contains__", "k"))
    assert late.get("k", "new") == "new"


@both_kinds
def test_endless_ttls_are_refused_where_everything_has_a_lifetime(fleet, kind):
    member, other = fleet.member(kind), fleet.member()
    with pytest.raises(ValueError, match="finite"):
        member.get("k", ttl_seconds=math.inf)
    mine, received = shared(fleet, member, other, retain_seconds=math.inf)
    assert isinstance(mine, ValueError)
    assert "finite" in str(mine)
    assert received.error_type == "builtins.ValueError"
    for bad in [-1, math.nan]:
        with pytest.raises(ValueError, match="ttl_seconds"):
            member.get("k", ttl_seconds=bad)


@both_kinds
def test_steps_of_a_wall_clock_change_nothing(fleet, kind, monkeypatch):
    one, other = (fleet.member(kind, lease_seconds=KEPT, ttl_seconds=60) for _ in range(2))
    real, steps = time.time, iter([0, 10**9, -(10**9)] * 100_000)
    monkeypatch.setattr(time, "time", lambda: real() + next(steps))
    led = one.ask("k", value="v", hold=True).wait_for_call()
    waits = other.ask("k")
    wait_until(lambda: [flight.age_seconds > 2 * KEPT for flight in other.do("flights")] == [True])
    led.release()
    assert (led.result(), waits.result(), waits.calls) == ("v", "v", 0)
    assert one.get("k") == other.get("k") == fleet.member(kind).get("k") == "v"
    assert 40 < left_on_server(fleet) <= 60

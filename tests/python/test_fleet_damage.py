"""What others have put under a fleet's keys is a miss: logged, replaced, and never executed."""

import json
import pickle

import pytest
from fleets import KEPT, KINDS
from loops import wait_until

from llm_batch_coalesce._fleet_wire import About, JsonSerializer, pack_value

HEAD = {"v": 1, "kind": "value", "seconds": 0.1, "ttl": 60, "leader": "x"}
GOOD = pack_value(JsonSerializer(), {"a": "stolen"}, About(0.1, 60.0, "x"))


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def payload(content=b'"stolen"', **head):
    return json.dumps(HEAD | head).encode() + b"\n" + content


BYTES = {
    "nothing": b"",
    "noise": b"\x00\xff\xfe garbage",
    "no head": b'{"a": 1}',
    "truncated head": GOOD[:20],
    "truncated": GOOD[:-3],
    "value that is no JSON": payload(b"stolen"),
    "another version": payload(v=2),
    "no version": b"{}\n1",
    "head that is a list": b"[1]\n1",
    "another kind": payload(kind="bomb"),
    "error without a message": payload(b'["KeyError"]', kind="error"),
    "error that is no list": payload(b"7", kind="error"),
    "endless": payload(ttl=float("inf")),
    "no number": payload(seconds="long"),
    "too deep": payload(b"[" * 100_000),
}


def planted(fleet, kind, plant, **options):
    """Return a member, and the names of a key's outcome and flight once there is something under one of them."""
    member = fleet.member(kind, ttl_seconds=60, **options)
    member.get("first contact")
    names, digest = member.coalescer._fleet.names, member.coalescer._key("k").digest
    plant(fleet.client, names.outcome(digest), names.flight(digest))
    return member, names.outcome(digest)


def is_replaced(fleet, member, outcome, caplog):
    led = member.ask("k", value="right")
    assert led.result() == "right"
    assert led.calls == 1
    assert 0 < fleet.client.pttl(outcome) <= 60_000
    assert fleet.member().get("k") == "right"
    assert member.do("stats").damaged == 1
    assert len(caplog.messages) == 1
    assert "damaged" in caplog.messages[0]
    assert "stolen" not in caplog.text
    return True


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_outcome(fleet, kind, content, caplog):
    member, outcome = planted(fleet, kind, lambda client, outcome, _: client.set(outcome, content, px=60_000))
    assert member.do("peek", "k") is None
    assert is_replaced(fleet, member, outcome, caplog)


OTHERS = {
    "list": lambda client, outcome, _: client.lpush(outcome, "x"),
    "hash": lambda client, outcome, _: client.hset(outcome, "token", "x"),
    "stream": lambda client, outcome, _: client.xadd(outcome, {"a": "b"}),
    "outcome without a lifetime": lambda client, outcome, _: client.set(outcome, GOOD),
    "flight that is a text": lambda client, _, flight: client.set(flight, "x"),
    "flight that is a set": lambda client, _, flight: client.sadd(flight, "token"),
}


@pytest.mark.parametrize("plant", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_another_type_or_without_a_lifetime(fleet, kind, plant, caplog):
    member, outcome = planted(fleet, kind, plant)
    assert is_replaced(fleet, member, outcome, caplog)


@pytest.mark.parametrize("kind", KINDS)
def test_peek_and_forget_take_them_for_nothing(fleet, kind):
    for plant in OTHERS.values():
        fleet.client.flushall()
        member, _ = planted(fleet, kind, plant, on_backend_error="raise")
        if plant is not OTHERS["outcome without a lifetime"]:
            assert member.do("peek", "k", "nothing") == "nothing"
        member.do("forget", "k")
        assert [name for name in fleet.names() if member.coalescer._key("k").digest in name] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_flight_of_nobody_holds_a_key_for_one_lease(fleet, kind):
    for fields in [{"token": "x"}, {"token": b"\xff{}", "name": b"\xfe \x00"}, {"inbox:nowhere": "1"}, {"name": "x"}]:
        fleet.client.flushall()
        member, _ = planted(
            fleet, kind, lambda client, _, flight, fields=fields: client.hset(flight, mapping=fields), lease_seconds=0.3
        )
        assert member.get("k", "right") == "right"


@pytest.mark.parametrize("kind", KINDS)
def test_an_outcome_that_was_damaged_while_others_wait(fleet, kind):
    leader, member = fleet.member(lease_seconds=KEPT), fleet.member(kind, lease_seconds=KEPT)
    led = leader.ask("k", value="right", hold=True).wait_for_call()
    waits = member.ask("k", value="own")
    fleet.wait_for_waiting(1)
    (flight,) = fleet.names()
    name = fleet.client.hget(flight, "name").decode()
    fleet.client.set(flight.replace(":flight", f":outcome:{name}"), b"garbage", px=60_000)
    wait_until(lambda: member.do("stats").damaged > 0)
    led.release()
    assert waits.result() == "right"
    assert waits.calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_never_loaded(fleet, kind, tmp_path, caplog):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for content in [bomb, payload(bomb)]:
        fleet.client.flushall()
        caplog.clear()
        plant = lambda client, outcome, _, content=content: client.set(outcome, content, px=60_000)  # noqa: E731
        member, outcome = planted(fleet, kind, plant)
        member.do("peek", "k")
        assert is_replaced(fleet, member, outcome, caplog)
    assert list(tmp_path.iterdir()) == []

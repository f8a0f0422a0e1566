"""A key has one digest in every process, and shares it with the keys that are equal to it in a dict, and no others."""

import collections
import enum
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from fleets import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_batch_coalesce._fleet_keys import fleet_key

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.integers(-3, 3).map(float)
    | st.text("aé\ud800🙂", max_size=3)
    | st.text("ab:0", max_size=4)
    | st.binary(max_size=3)
    | st.text("ab:0", max_size=4).map(str.encode)
)
keys = st.recursive(scalars, lambda items: st.lists(items, max_size=3).map(tuple), max_leaves=6)


def digest(key, key_encoder=None):
    return fleet_key(key, key_encoder).digest


@settings(deadline=None, max_examples=60)
@given(keys, keys)
def test_equal_in_a_dict_means_one_digest_and_the_other_way_round(one, other):
    assert (digest(one) == digest(other)) == (len({one, other}) == 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(keys, max_size=30))
def test_there_are_as_many_digests_as_keys_in_a_dict(many):
    assert len({digest(key) for key in many}) == len(dict.fromkeys(many))


class Colour(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 7


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024 - any will do

SAME = [
    (1, 1.0, True),
    (0, 0.0, -0.0, False),
    (10**300, float(10**300) if float(10**300) == 10**300 else 10**300),
    (2.0**1000, 2**1000),
    ((1, ("a", 0.0)), (True, ("a", False))),
    ("red", Colour.RED),
    (7, Size.BIG, 7.0),
    ((1, 2), Pair(1, 2)),
    (math.inf, float("inf")),
    (10**5000, 10**5000 + 0),
    ("\ud800", "\ud800"),
]
DIFFERENT = [
    ["1", b"1", 1, (1,), ("1",), None, "None", "", b"", (), ((),), ("",)],
    [("a", "b"), ("ab",), "ab", ("a", ("b",)), (("a",), "b"), ("a", "b", ())],
    [2**53, 2**53 + 1, float(2**53) + 2, 0.1, 0.1 + 1e-17 * 8, math.inf, -math.inf],
    ["é", "e\u0301", "É"],
    [10**5000, 10**5000 + 1],
]


@pytest.mark.parametrize("equal", SAME)
def test_equal_keys(equal):
    assert len(set(equal)) == 1
    assert len({digest(key) for key in equal}) == 1


@pytest.mark.parametrize("different", DIFFERENT)
def test_different_keys(different):
    assert len({digest(key) for key in different}) == len(set(different)) == len(different)


class Own(str):
    """A text that is equal to itself only."""

    __slots__ = ()

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


@dataclass(frozen=True)
class Request:
    model: str
    prompt: str


@pytest.mark.parametrize("key", [Request("a", "b"), frozenset("a"), object(), Own("a"), ("a", Own("a")), 1j, range(3)])
def test_other_keys_need_an_encoder(key):
    with pytest.raises(TypeError, match="key_encoder"):
        digest(key)
    assert digest(key, lambda key: "x") == digest(object(), lambda key: b"x")
    assert digest(key, lambda key: "x") not in {digest("x"), digest(b"x"), digest(("x",)), digest("y", str)}


def test_an_encoder_is_not_asked_about_keys_that_need_none():
    assert digest((1, "a"), lambda key: 1 / 0) == digest((1, "a"))


@pytest.mark.parametrize("key", [[], {}, ([],), ("a", {})])
def test_unhashable_keys_are_refused(key):
    with pytest.raises(TypeError, match="unhashable"):
        digest(key, lambda key: "x")


def test_an_encoder_must_give_str_or_bytes():
    for bad in [None, 1, ("a",), bytearray(b"a")]:
        with pytest.raises(TypeError, match="key_encoder must return str or bytes"):
            digest(object(), lambda key, bad=bad: bad)
    with pytest.raises(ZeroDivisionError):
        digest(object(), lambda key: 1 / 0)


def test_digests_are_the_same_in_every_process():
    many = [None, True, 7, 1.5, "é", b"\xff", ("a", (1, None)), -(2**70)]
    program = (
        "import sys; from llm_batch_coalesce._fleet_keys import fleet_key\n"
        f"print([fleet_key(key, None).digest for key in {many!r}])"
    )
    for seed in ["1", "2"]:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        printed = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
        assert printed.strip() == repr([digest(key) for key in many])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fleet_takes_equal_keys_for_one_and_shows_no_key_on_the_server(fleet, kind):
    one, other = fleet.member(kind, ttl_seconds=60), fleet.member(ttl_seconds=60)
    assert one.get(("secret prompt", 1), "value") == "value"
    assert [other.get(key) for key in [("secret prompt", True), ("secret prompt", 1.0)]] == ["value"] * 2
    (name,) = fleet.names()
    assert name == f"{fleet.namespace}:{{{digest(('secret prompt', 1))}}}:outcome"
    assert b"secret" not in fleet.client.get(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fleet_with_an_encoder(fleet, kind):
    options = {"ttl_seconds": 60, "key_encoder": lambda request: f"{request.model}/{request.prompt}"}
    one, other = fleet.member(kind, **options), fleet.member(**options)
    assert one.get(Request("a", "b"), "value") == other.get(Request("a", "b")) == "value"
    led = one.ask(Request("c", "d"), hold=True).wait_for_call()
    assert [flight.key for flight in one.do("flights")] == [Request("c", "d")]
    led.release()
    with pytest.raises(TypeError, match="key_encoder"):
        fleet.member(kind).get(Request("a", "b"))

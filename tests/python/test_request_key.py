"""Keys of whole requests."""

import random

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_batch_coalesce import request_key

REQUEST = {
    "model": "small",
    "temperature": 0.5,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Define alpha."}]}],
    "seed": 7,
    "stream": False,
    "stop": None,
}


def key(request, scope="public", **options):
    return request_key(request, scope=scope, **options)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12
)
REQUESTS = st.dictionaries(st.text(), VALUES, max_size=5)


def reordered(value, dice):
    """The same in another order, with whole floats for ints where they are the same number."""
    if isinstance(value, dict):
        items = [(name, reordered(item, dice)) for name, item in value.items()]
        dice.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        items = [reordered(item, dice) for item in value]
        return tuple(items) if dice.random() < 0.5 else items
    if type(value) is int and abs(value) < 2**53 and dice.random() < 0.5:
        return float(value)
    return value


@given(REQUESTS, st.randoms(use_true_random=False))
@settings(deadline=None, database=None)
def test_equal_requests_in_any_order_have_one_key(request, dice):
    assert key(reordered(request, dice)) == key(request)


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def with_leaf(value, path, leaf):
    if not path:
        return leaf
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_leaf(value[path[0]], path[1:], leaf)
    return copy


def differ(one, other):
    """Whether they differ as JSON, where True is no 1."""
    return type(one) is not type(other) if isinstance(one, bool) or isinstance(other, bool) else one != other


@given(REQUESTS, SCALARS, st.data())
@settings(deadline=None, database=None)
def test_any_changed_leaf_gives_another_key(request, new, data):
    there = list(leaves(request))
    if there:
        path, old = data.draw(st.sampled_from(there))
        changed = key(with_leaf(request, path, new)) != key(request)
        assert changed == (differ(old, new) or (isinstance(old, bool) and old is not new))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, "1"),
        (1, True),
        (0, False),
        (None, "null"),
        ("é", "e\u0301"),
        ([], {}),
        ([1, 2], [2, 1]),
        ("", None),
        (2**53, 2**53 + 1),
        ("\U0001f600", "\ud83d\ude00"),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"a": 1, "b": None}),
    ],
)
def test_what_is_not_the_same_has_keys_of_its_own(one, other):
    assert key({"x": one}) != key({"x": other})


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (-0.0, 0), (10**22, 1e22), ((1, 2), [1, 2]), (2**60, float(2**60))]
)
def test_what_is_the_same_has_one_key(one, other):
    assert key({"x": one}) == key({"x": other})


def test_scopes_never_share():
    scopes = ["public", "tenant 1", "tenant 2", '"public"', "public "]
    assert len({key(REQUEST, scope) for scope in scopes}) == len(scopes)


def test_a_key_tells_its_version_and_nothing_of_the_request():
    version, digest = key(REQUEST).split(":")
    assert version == "request-v1"
    assert len(digest) == 64
    # A key is for good: it may be kept elsewhere.
    assert key({"a": [1, 2.5, "ü", None, True]}) == (
        "request-v1:d6c7587dfb9241560054dd08f9f29541ada3c57d26e8445baa007b51eb066d69"
    )


def test_dropped_fields_do_not_count_and_others_do():
    with_user = {**REQUEST, "user": "u1", "metadata": {"trace": object()}}
    assert key(with_user, drop=["user", "metadata"]) == key(REQUEST) == key(REQUEST, drop="user")
    assert key(with_user, drop=["metadata"]) != key(REQUEST)
    nested = {"x": {"user": "u1"}}
    assert key(nested, drop=["user"]) == key(nested)


def test_a_pydantic_model_is_the_same_as_what_it_dumps():
    class Message(pydantic.BaseModel):
        role: str
        content: str = pydantic.Field(alias="text")

    class Request(pydantic.BaseModel):
        model: str
        messages: list[Message]

    message = Message(role="user", text="Define alpha.")
    dumped = {"messages": [{"text": "Define alpha.", "role": "user"}], "model": "small"}
    assert key(Request(model="small", messages=[message])) == key(dumped)
    assert key({"model": "small", "messages": [message]}) == key(dumped)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (b"x", "x"),
        ({1}, "x"),
        (float("nan"), "x"),
        ([1, {"y": [float("inf")]}], r"x\[1\].y\[0\]"),
        ({"a b": object()}, r"x\['a b'\]"),
        ({"y": {1: 2}}, "x.y"),
        (random.Random, "x"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(value, place):
    with pytest.raises(TypeError, match=rf"^{place} cannot be part of a request as JSON"):
        key({"x": value})


def test_numbers_and_nesting_without_end_are_refused():
    with pytest.raises(TypeError, match=r"^x\[0\] cannot be part of a request as JSON: .*digits"):
        key({"x": [10**5000]})
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TypeError, match="nested too deeply"):
        key({"x": deep})


@pytest.mark.parametrize("inside", [False, True])
def test_secrets_of_models_are_refused_since_they_all_look_the_same(inside):
    class Provider(pydantic.BaseModel):
        token: pydantic.SecretStr

    class Request(pydantic.BaseModel):
        providers: list[Provider]

    request = Request(providers=[Provider(token="one")])
    with pytest.raises(TypeError, match=r"^(r\.)?providers\[0\]\.token cannot be part of a request: secrets"):
        key({"r": request} if inside else request)


def test_a_request_that_contains_itself_is_refused():
    request = {"x": []}
    request["x"].append(request["x"])
    with pytest.raises(TypeError, match=r"^x\[0\] cannot be part of a request as JSON: it contains itself"):
        key(request)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": 7}, TypeError, "scope must be a str, not 7"),
        ({"scope": None}, TypeError, "scope must be a str, not None"),
        ({"scope": ""}, ValueError, "scope must not be empty"),
        ({"scope": "public", "drop": [1]}, TypeError, r"drop must be names of fields, not \[1\]"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        request_key(REQUEST, **options)


@pytest.mark.parametrize("request_", [None, "text", [("a", 1)], 5])
def test_what_is_no_request_is_refused(request_):
    with pytest.raises(TypeError, match="request must be a mapping or a pydantic model"):
        key(request_)


def test_a_scope_is_required():
    with pytest.raises(TypeError, match="scope"):
        request_key(REQUEST)

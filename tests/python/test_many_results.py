"""`get_or_call_many` for threads and for tasks: what its call may return, and what its callers get."""

import collections
import copy
import logging
import pickle
import types

import pytest
from batches import ask_many, batch, held_batch, lead_many, named, nobody, raising, start_many
from faces import FACES, outcomes, refused
from loops import wait_for_waiters

from llm_batch_coalesce import CallResultError, CoalesceError, MissingKeysError, Retain, _core

INF = float("inf")


@pytest.fixture(params=FACES, ids=lambda kind: kind.__name__)
def face(request):
    with request.param() as made:
        yield made


def noting(asked, work=named):
    """Work that notes the keys of each call."""

    def call(missing):
        asked.append(list(missing))
        return work(missing)

    return call


def counted(coalescer):
    """Calls, joined, hits, errors, timeouts and cancelled."""
    stats = coalescer.stats()
    return stats.calls, stats.joined, stats.hits, stats.errors, stats.timeouts, stats.cancelled


class Rows:
    """A sequence that does not say so, like an array."""

    def __init__(self, values):
        self._values = list(values)

    def __len__(self):
        return len(self._values)

    def __getitem__(self, place):
        return self._values[place]


# What is led, and what is not.


def test_what_nobody_has_is_called_for_at_once_and_retained(face):
    coalescer, asked = face.coalescer(INF), []
    got = ask_many(face, coalescer, ["b", "a", "c"], batch(face, noting(asked)))
    assert list(got.items()) == [("b", "of b"), ("a", "of a"), ("c", "of c")]
    assert asked == [["b", "a", "c"]]
    assert face.ask(coalescer, refused, "a") == "of a"
    assert ask_many(face, coalescer, ["c", "b"]) == {"c": "of c", "b": "of b"}
    assert counted(coalescer) == (3, 0, 3, 0, 0, 0)
    assert coalescer.stats().retained == len(coalescer) == 3


def test_what_is_retained_is_not_called_for(face):
    coalescer, asked, value = face.coalescer(INF), [], object()
    coalescer.put("b", value)
    got = ask_many(face, coalescer, ["a", "b", "c"], batch(face, noting(asked)))
    assert list(got) == ["a", "b", "c"]
    assert got["b"] is value
    assert asked == [["a", "c"]]
    assert counted(coalescer) == (2, 0, 1, 0, 0, 0)


def test_duplicates_do_no_harm(face):
    coalescer, asked = face.coalescer(INF), []
    got = ask_many(face, coalescer, ["a", 1, "a", 1.0, True, "b"], batch(face, noting(asked)))
    assert list(got.items()) == [("a", "of a"), (1, "of 1"), ("b", "of b")]
    assert [type(key) for key in asked[0]] == [str, int, str]
    assert counted(coalescer) == (3, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("keys", [[], (), "", iter(())], ids=["a list", "a tuple", "a str", "an iterator"])
def test_no_keys_need_no_call(face, keys):
    coalescer = face.coalescer()
    assert ask_many(face, coalescer, keys, nobody) == {}
    assert counted(coalescer) == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("keys", [str, tuple, dict.fromkeys, iter, lambda keys: (key for key in keys)])
def test_keys_are_whatever_iterates(face, keys):
    asked = []
    assert ask_many(face, face.coalescer(), keys("ab"), batch(face, noting(asked))) == {"a": "of a", "b": "of b"}
    assert asked == [["a", "b"]]


def test_the_call_may_do_with_its_list_what_it_likes(face):
    def work(missing):
        values = [f"of {key}" for key in missing]
        missing.reverse()
        missing.append("another")
        return values

    assert ask_many(face, face.coalescer(), ["a", "b"], batch(face, work)) == {"a": "of a", "b": "of b"}


# What the call may return.

ANSWERS = {
    "dict": lambda keys: {key: key.upper() for key in reversed(keys)},
    "chain": lambda keys: collections.ChainMap({keys[0]: keys[0].upper()}, {key: key.upper() for key in keys[1:]}),
    "proxy": lambda keys: types.MappingProxyType({key: key.upper() for key in keys}),
    "list": lambda keys: [key.upper() for key in keys],
    "tuple": lambda keys: tuple(key.upper() for key in keys),
    "deque": lambda keys: collections.deque(key.upper() for key in keys),
    "array": lambda keys: Rows(key.upper() for key in keys),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_mapping_or_a_sequence_answers(face, answer):
    coalescer = face.coalescer()
    assert ask_many(face, coalescer, ["a", "b", "c"], batch(face, answer)) == {"a": "A", "b": "B", "c": "C"}
    assert coalescer.peek("b") == "B"


REFUSED = {
    "None": lambda keys: None,
    "number": lambda keys: 3,
    "str": lambda keys: "abc",
    "bytes": lambda keys: b"abc",
    "bytearray": lambda keys: bytearray(b"abc"),
    "set": set,
    "view": lambda keys: dict.fromkeys(keys).keys(),
    "generator": lambda keys: (key for key in keys),
    "iterator": iter,
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_for_all_and_not_retained(face, answer):
    coalescer, held = face.coalescer(INF), held_batch(face, answer)
    leader = lead_many(face, coalescer, ["a", "b", "c"], held)
    waiter = face.start(coalescer, refused, "b")
    held.release()
    errors = outcomes([leader, waiter])
    assert [type(error) for error in errors] == [CallResultError] * 2
    assert "must return a mapping, or a sequence in the order of its keys" in str(errors[0])
    assert len(coalescer) == 0
    assert counted(coalescer) == (3, 1, 0, 3, 0, 0)


@pytest.mark.parametrize("value", [None, False, 0, [], "", NotImplemented], ids=repr)
def test_any_value_is_a_value(face, value):
    coalescer = face.coalescer()
    assert ask_many(face, coalescer, ["a"], batch(face, lambda keys: [value])) == {"a": value}
    assert ask_many(face, coalescer, ["b"], batch(face, lambda keys: {"b": value})) == {"b": value}
    assert ask_many(face, coalescer, ["a", "b"]) == {"a": value, "b": value}


# How long it is retained.


def test_each_value_may_set_its_own_ttl(face):
    coalescer = face.coalescer(5)
    values = {"a": Retain("A", 0), "b": Retain("B", 100), "c": "C", "d": Retain(None, INF)}
    assert ask_many(face, coalescer, "abcd", batch(face, lambda keys: values)) == {
        "a": "A",
        "b": "B",
        "c": "C",
        "d": None,
    }
    assert [key in coalescer for key in "abcd"] == [False, True, True, True]
    assert coalescer.peek("b") == "B"
    _core._advance_clock(6)
    assert [key in coalescer for key in "abcd"] == [False, True, False, True]


def test_a_call_has_a_ttl_of_its_own(face):
    coalescer = face.coalescer(INF)
    ask_many(face, coalescer, "ab", batch(face), ttl_seconds=5)
    ask_many(face, coalescer, "cd", batch(face), ttl_seconds=0)
    assert [key in coalescer for key in "abcd"] == [True, True, False, False]
    _core._advance_clock(6)
    assert len(coalescer) == 0


# Keys without a value.


def test_missing_keys_are_named_with_what_the_others_gave_and_not_retained(face, caplog):
    coalescer, asked = face.coalescer(INF), []
    coalescer.put("hit", "retained")
    incomplete = batch(face, lambda keys: {"a": "A", "c": None, "x": 1})
    with pytest.raises(MissingKeysError, match=r"no value for 'b', 'd'; it gave some for 'x', which") as info:
        ask_many(face, coalescer, ["a", "b", "hit", "c", "d"], incomplete)
    assert (info.value.missing, info.value.surplus, info.value.reason) == (["b", "d"], ["x"], None)
    assert info.value.values == {"a": "A", "hit": "retained", "c": None}
    assert isinstance(info.value, CoalesceError)
    assert isinstance(info.value, LookupError)
    assert "b" not in coalescer
    assert counted(coalescer) == (4, 0, 1, 2, 0, 0)
    # The error tells it; the log need not.
    assert not caplog.records
    ask_many(face, coalescer, ["a", "b", "c", "d"], batch(face, noting(asked)))
    assert asked == [["b", "d"]]


def test_a_default_of_the_mapping_is_no_answer(face):
    made = collections.defaultdict(lambda: "made up", a="A")
    with pytest.raises(MissingKeysError) as info:
        ask_many(face, face.coalescer(), ["a", "b"], batch(face, lambda keys: made))
    assert info.value.missing == ["b"]


def test_of_many_missing_keys_the_message_names_a_few(face):
    with pytest.raises(MissingKeysError, match=r"^the call gave no value for 0, 1, 2 and 97 more$") as info:
        ask_many(face, face.coalescer(), range(100), batch(face, lambda keys: {}))
    assert info.value.missing == list(range(100))


def test_surplus_keys_alone_are_ignored_with_one_line_that_does_not_tell_them(face, caplog):
    coalescer = face.coalescer()
    values = {"a": "A", "b": "B", "secret 1": 1, "secret 2": 2}
    with caplog.at_level(logging.DEBUG):
        assert ask_many(face, coalescer, ["a", "b"], batch(face, lambda keys: values)) == {"a": "A", "b": "B"}
    (record,) = [record for record in caplog.records if record.name == "llm_batch_coalesce"]
    assert record.levelno == logging.WARNING
    assert "values for 2 keys that were not asked for" in record.getMessage()
    assert "secret" not in record.getMessage()
    assert "secret 1" not in coalescer


def test_nothing_is_logged_where_all_is_well(face, caplog):
    with caplog.at_level(logging.DEBUG):
        ask_many(face, face.coalescer(), ["a", "b"], batch(face))
    assert not [record for record in caplog.records if record.name == "llm_batch_coalesce"]


@pytest.mark.parametrize("kind", [list, tuple, Rows])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_sequence_of_the_wrong_length_leaves_all_without_a_value(face, length, kind):
    coalescer, held = face.coalescer(INF), held_batch(face, lambda keys: kind(range(length)))
    coalescer.put("hit", "retained")
    leader = lead_many(face, coalescer, ["a", "hit", "b"], held)
    waiter = face.start(coalescer, refused, "b")
    held.release()
    errors = outcomes([leader, waiter])
    assert [type(error) for error in errors] == [MissingKeysError] * 2
    assert [error.missing for error in errors] == [["a", "b"], ["b"]]
    assert [error.values for error in errors] == [{"hit": "retained"}, {}]
    assert [error.reason for error in errors] == [f"fn returned {length} values for 2 keys"] * 2
    assert f"no value for 'a', 'b': fn returned {length} values for 2 keys" in str(errors[0])
    assert list(errors[0].surplus) == []
    assert len(coalescer) == 1


def test_only_who_has_asked_for_a_missing_key_is_told(face):
    coalescer, held = face.coalescer(INF), held_batch(face, lambda keys: {"a": "A", "c": "C", "x": 1})
    leader = lead_many(face, coalescer, ["a", "b", "c"], held)
    single, lucky = face.start(coalescer, refused, "b"), face.start(coalescer, refused, "a")
    other = start_many(face, coalescer, ["c", "b"], nobody)
    wait_for_waiters(coalescer, "c", 1)
    well = start_many(face, coalescer, ["c", "a"], nobody)
    wait_for_waiters(coalescer, "c", 2)
    held.release()
    errors = outcomes([leader, single, other])
    assert [type(error) for error in errors] == [MissingKeysError] * 3
    assert [error.missing for error in errors] == [["b"]] * 3
    assert [error.surplus for error in errors] == [["x"]] * 3
    assert [error.values for error in errors] == [{"a": "A", "c": "C"}, {}, {"c": "C"}]
    assert len({id(error) for error in errors}) == 3
    assert outcomes([lucky, well]) == ["A", {"c": "C", "a": "A"}]
    assert counted(coalescer) == (3, 6, 0, 1, 0, 0)


def test_an_error_of_missing_keys_can_be_copied_and_pickled():
    error = MissingKeysError(["a"], ["x"], {"b": 1}, "fn returned 2 values for 1 keys")
    error.add_note("a note")
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is MissingKeysError
        assert (twin.missing, twin.surplus, twin.values, twin.reason) == (["a"], ["x"], {"b": 1}, error.reason)
        assert str(twin) == str(error)
        assert twin.__notes__ == ["a note"]
    assert MissingKeysError(["a"]).values == {}


# Errors.


def test_an_error_of_one_key_does_not_keep_the_others_from_being_led(face):
    coalescer, asked = face.coalescer(INF), []
    error = LookupError("of old")
    with pytest.raises(LookupError) as info:
        ask_many(face, coalescer, ["old"], batch(face, raising(error)))
    assert info.value is error
    with pytest.raises(LookupError, match="of old") as info:
        ask_many(face, coalescer, ["a", "old", "b"], batch(face, noting(asked)))
    assert info.value is not error
    assert asked == [["a", "b"]]
    assert ask_many(face, coalescer, ["a", "b"]) == {"a": "of a", "b": "of b"}
    assert counted(coalescer) == (3, 0, 3, 1, 0, 0)


def test_the_first_error_in_the_order_of_the_keys_that_is_no_missing_key_is_raised(face):
    coalescer = face.coalescer(INF)
    for key in ("first", "second"):
        assert type(outcomes([start_many(face, coalescer, [key], batch(face, raising(KeyError(key))))])[0]) is KeyError
    for keys in (["none", "first", "second"], ["second", "none", "first"]):
        with pytest.raises(KeyError) as info:
            ask_many(face, coalescer, keys, batch(face, lambda missing: {}))
        assert info.value.args == (next(key for key in keys if key != "none"),)
        assert info.value.__context__ is None


# Wrong arguments, and keys that fail.


@pytest.mark.parametrize(
    ("keys", "fn", "options", "expected"),
    [
        (5, nobody, {}, (TypeError, "iterable")),
        (["a", []], nobody, {}, (TypeError, "unhashable")),
        (["a"], 5, {}, (TypeError, "fn must be callable")),
        (["a"], None, {}, (TypeError, "fn must be callable")),
        (["a"], nobody, {"timeout": -1}, (ValueError, "timeout")),
        (["a"], nobody, {"timeout": True}, (TypeError, "timeout")),
        (["a"], nobody, {"ttl_seconds": -1}, (ValueError, "ttl_seconds")),
        (["a"], nobody, {"ttl_seconds": float("nan")}, (ValueError, "ttl_seconds")),
        (["a"], nobody, {"ttl_seconds": "5"}, (TypeError, "ttl_seconds")),
    ],
)
def test_wrong_arguments_are_refused_and_are_no_requests(face, keys, fn, options, expected):
    coalescer, (error, said) = face.coalescer(), expected
    with pytest.raises(error, match=said):
        ask_many(face, coalescer, keys, fn, **options)
    assert len(coalescer) == 0
    assert counted(coalescer) == (0, 0, 0, 0, 0, 0)


class Broken:
    """Falls into the place of another key, and fails when it is compared with that or hashed."""

    def __init__(self, like=None):
        self.like = like

    def __hash__(self):
        if self.like is None:
            raise ValueError("no hash")
        return hash(self.like)

    def __eq__(self, other):
        if other is not self:
            raise ValueError("no equality")
        return True


@pytest.mark.parametrize("keys", [["a", Broken()], ["a", "b", Broken("b")], ["a", Broken("old"), "b"]])
def test_a_key_that_fails_leaves_the_map_as_it_was(face, keys):
    coalescer = face.coalescer(INF)
    coalescer.put("old", "value")
    with pytest.raises(ValueError, match=r"no hash|no equality"):
        ask_many(face, coalescer, keys, nobody)
    assert len(coalescer) == 1
    assert coalescer.stats().in_flight == 0
    # Those before it were no requests either.
    assert counted(coalescer) == (0, 0, 0, 0, 0, 0)
    assert ask_many(face, coalescer, ["a", "b", "old"], batch(face)) == {"a": "of a", "b": "of b", "old": "value"}

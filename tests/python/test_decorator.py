"""`coalesced`: what is shared, what a key is, and that a decorated function remains the function that it was."""

import asyncio
import functools
import inspect
import itertools
import re
import sys

import pytest
from loops import wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer

BOTH = pytest.mark.parametrize("kind", [BatchCoalescer, AsyncBatchCoalescer])


def test_threads_that_call_with_equal_arguments_share_one_call(crew):
    calls = []

    @BatchCoalescer(0).coalesced()
    def define(term, language="en"):
        wait_for_waiters(define.coalescer, define.key_for(term, language), 9)
        calls.append((term, language))
        return object()

    def work(number):
        return define("alpha") if number % 2 else define(language="en", term="alpha")

    answers = crew.start(10, work).join()
    assert len({id(answer) for answer in answers}) == 1
    assert calls == [("alpha", "en")]


async def test_tasks_that_call_with_equal_arguments_share_one_call():
    calls = []

    @AsyncBatchCoalescer(0).coalesced()
    async def define(term, language="en"):
        calls.append((term, language))
        await asyncio.sleep(0)
        return object()

    answers = await asyncio.gather(define("alpha"), define(term="alpha"), define("alpha", "en"), define("beta"))
    assert len({id(answer) for answer in answers[:3]}) == 1
    assert calls == [("alpha", "en"), ("beta", "en")]


def test_an_outcome_is_retained_by_the_coalescer_that_decorates():
    calls = itertools.count()
    define = BatchCoalescer(10).coalesced()(lambda term: next(calls))
    assert [define("a"), define("a"), define("b"), define("a")] == [0, 0, 1, 0]


def test_an_error_is_the_callers_and_a_copy_for_who_shares_it():
    original = LookupError("no such term")

    @BatchCoalescer(10).coalesced()
    def define(term):
        raise original

    with pytest.raises(LookupError) as first:
        define("a")
    with pytest.raises(LookupError, match="no such term") as second:
        define("a")
    assert first.value is original
    assert second.value is not original


# Keys


def plain(a, b=2):
    pass


def only(a, /, b=2, *, c=3):
    pass


def rest(a=0, *args, b=5, **kwargs):
    pass


def loose(*args, **kwargs):
    pass


def call(*args, **kwargs):
    return args, kwargs


ONE_KEY = [
    (plain, [call(1), call(a=1), call(1, 2), call(1, b=2), call(b=2, a=1)]),
    (only, [call(1), call(1, 2), call(1, b=2), call(1, c=3), call(1, 2, c=3)]),
    (rest, [call(), call(0), call(a=0), call(b=5), call(0, b=5)]),
    (rest, [call(0, x=1, y=2), call(y=2, x=1), call(y=2, a=0, x=1, b=5)]),
    (loose, [call(x=1, y=2), call(y=2, x=1)]),
]
SEVERAL_KEYS = [
    (plain, [call(1), call(2), call(1, 3), call(None), call((1, 2)), call("1")]),
    (only, [call(1), call(1, 3), call(1, c=2), call(1, 3, c=2), call(3, 1)]),
    (rest, [call(), call(0, 5), call(0, 5, 5), call(b=6), call(0, 6), call(c=5), call(0, ("c", 5))]),
    (loose, [call(), call(("a", 1)), call((("a", 1),)), call(a=1), call("a", 1), call(a=1, b=2), call(b=1, a=2)]),
    (loose, [call(("a", 1), ("b", 2)), call((("a", 1), ("b", 2))), call(a=1, b=2), call(a=("b", 2))]),
    (loose, [call(args=(1,)), call(1), call(kwargs=1), call(args=1), call(a=())]),
]


@pytest.mark.parametrize(("fn", "calls"), ONE_KEY)
def test_calls_that_mean_the_same_have_one_key(fn, calls):
    key_for = BatchCoalescer().coalesced()(fn).key_for
    assert len({key_for(*args, **kwargs) for args, kwargs in calls}) == 1


@pytest.mark.parametrize(("fn", "calls"), SEVERAL_KEYS)
def test_calls_that_differ_have_keys_that_differ(fn, calls):
    key_for = BatchCoalescer().coalesced()(fn).key_for
    assert len({key_for(*args, **kwargs) for args, kwargs in calls}) == len(calls)


def test_the_key_is_the_module_the_qualified_name_and_the_arguments():
    assert BatchCoalescer().coalesced()(plain).key_for(1) == (__name__, "plain", (1, 2))


def test_arguments_are_put_in_the_key_as_they_are_and_given_to_the_function_as_they_were():
    seen = []
    define = BatchCoalescer(10).coalesced()(lambda *args, **kwargs: seen.append((args, kwargs)))
    define(True, x=1.0)
    define(1, x=True)
    assert repr(seen) == "[((True,), {'x': 1.0})]"


def test_functions_of_one_name_share_nothing():
    coalescer = BatchCoalescer(10)

    def prefixed(prefix):
        @coalescer.coalesced()
        def ask(question):
            return prefix + question

        return ask

    decorate = coalescer.coalesced()
    functions = [prefixed("a"), prefixed("b"), decorate(lambda question: "c"), decorate(lambda question: "d")]
    assert [ask("?") for ask in functions * 2] == ["a?", "b?", "c", "d"] * 2


def test_functions_of_one_name_and_other_modules_share_nothing():
    coalescer, functions = BatchCoalescer(10), []
    for module in ("first", "second"):
        namespace = {"__name__": module}
        exec("def ask(): return __name__", namespace)
        functions.append(coalescer.coalesced()(namespace["ask"]))
    assert [ask() for ask in functions] == ["first", "second"]


def test_one_function_that_is_decorated_twice_is_one():
    calls, coalescer = itertools.count(), BatchCoalescer(10)

    def ask(question):
        return next(calls)

    assert coalescer.coalesced()(ask)("?") == coalescer.coalesced()(ask)("?") == 0


def test_a_bound_method_belongs_to_its_instance():
    coalescer = BatchCoalescer(10)
    clients = [Client("a"), Client("b")]
    assert [coalescer.coalesced()(client.bare)("?") for client in clients * 2] == ["a?", "b?"] * 2
    assert [client.bare_calls for client in clients] == [1, 1]


def test_a_key_of_ones_own_is_taken_as_it_is():
    calls, coalescer = itertools.count(), BatchCoalescer(10)

    @coalescer.coalesced(key=lambda document, *, language: (document["id"], language))
    def summarize(document, *, language):
        return next(calls)

    assert summarize({"id": 1}, language="en") == 0
    assert summarize({"id": 1, "text": "other"}, language="en") == 0
    assert summarize({"id": 1}, language="de") == 1
    assert summarize.key_for({"id": 1}, language="en") == (1, "en")
    assert (1, "en") in coalescer


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (call([1]), "a", "[1]"),
        (call(0, "x", {2: 3}), "args[1]", "{2: 3}"),
        (call(b={4}), "b", "{4}"),
        (call(x=1, c=[5]), "c", "[5]"),
        (call(a=([6],)), "a", "([6],)"),
    ],
)
def test_an_unhashable_argument_is_named(arguments, name, value):
    decorated = BatchCoalescer().coalesced()(rest)
    with pytest.raises(TypeError, match=rf"^rest\(\): the argument {re.escape(name)} .*: {re.escape(value)}; .*key="):
        decorated(*arguments[0], **arguments[1])


async def test_an_unhashable_argument_of_a_coroutine_function_is_named_when_it_is_awaited():
    @AsyncBatchCoalescer().coalesced()
    async def ask(messages):
        pytest.fail("not called")

    asking = ask([{"role": "user"}])
    with pytest.raises(TypeError, match=r"argument messages .*'role': 'user'"):
        await asking


def test_arguments_that_do_not_fit_are_a_type_error_of_the_functions_and_nothing_is_called():
    decorated = BatchCoalescer().coalesced()(plain)
    for args, kwargs in [call(), call(1, 2, 3), call(1, a=1), call(1, c=1)]:
        with pytest.raises(TypeError, match=r"^plain\(\)"):
            decorated(*args, **kwargs)
    assert decorated.coalescer.stats().calls == 0


def test_arguments_by_position_are_not_bound_anew(monkeypatch):
    decorated = BatchCoalescer(10).coalesced()(plain)
    expected = decorated.key_for(b=2, a=1)
    monkeypatch.delattr(inspect.Signature, "bind")
    assert decorated.key_for(1) == decorated.key_for(1, 2) == expected


# What a decorated function is


class Client:
    shared = BatchCoalescer(10)

    def __init__(self, name):
        self.name, self.bare_calls = name, 0

    def bare(self, question):
        self.bare_calls += 1
        return self.name + question

    @shared.coalesced()
    def ask(self, question):
        return self.name, question, object()

    @shared.coalesced()
    async def ask_async(self, question):
        return self.name, question, object()

    @classmethod
    @shared.coalesced()
    def of_class(cls, question):
        return cls, question, object()

    @staticmethod
    @shared.coalesced()
    def of_nobody(question):
        return question, object()


def test_a_method_is_shared_for_each_instance():
    one, other = Client("one"), Client("other")
    assert one.ask("?") is one.ask(question="?") is Client.ask(one, "?")
    assert one.ask("?")[:2] == ("one", "?")
    assert other.ask("?")[:2] == ("other", "?")
    assert one.ask.key_for(one, "?") != one.ask.key_for(other, "?")


async def test_a_coroutine_method_is_shared_for_each_instance():
    one, other = Client("one"), Client("other")
    answers = await asyncio.gather(one.ask_async("?"), other.ask_async("?"), one.ask_async(question="?"))
    assert [name for name, _, _ in answers] == ["one", "other", "one"]
    assert answers[0] is answers[2]
    assert inspect.iscoroutinefunction(one.ask_async)


def test_a_class_method_is_shared_for_each_class():
    subclass = type("Subclass", (Client,), {})
    assert Client.of_class("?") is Client.of_class("?") is Client("x").of_class("?")
    assert subclass.of_class("?")[0] is subclass


def test_a_static_method_is_shared():
    assert Client.of_nobody("?") is Client("x").of_nobody(question="?")


@BOTH
def test_it_remains_the_function_that_it_was(kind):
    def ask(question: str, *, loud: bool = False) -> str:
        """Ask."""

    async def ask_async(question: str, *, loud: bool = False) -> str:
        """Ask."""

    for fn in (ask, ask_async):
        decorated = kind().coalesced()(fn)
        assert inspect.isfunction(decorated)
        assert inspect.signature(decorated) == inspect.signature(fn)
        assert decorated.__wrapped__ is fn
        names = ("__name__", "__qualname__", "__doc__", "__module__")
        assert [getattr(decorated, name) for name in names] == [getattr(fn, name) for name in names]
        assert inspect.iscoroutinefunction(decorated) == (fn is ask_async)


@BOTH
async def test_functions_and_coroutine_functions_use_the_face_that_is_made_for_them(kind):
    coalescer = kind(10)

    @coalescer.coalesced(key=lambda: "k")
    def ask():
        return "asked"

    @coalescer.coalesced(key=lambda: "k")
    async def ask_async():
        pytest.fail("retained in the same map")

    assert type(ask.coalescer) is BatchCoalescer
    assert type(ask_async.coalescer) is AsyncBatchCoalescer
    assert coalescer in (ask.coalescer, ask_async.coalescer)
    assert ask() == await ask_async() == coalescer.peek("k") == "asked"


@BOTH
async def test_forget_lets_the_next_caller_make_a_new_call(kind):
    calls, coalescer = itertools.count(), kind(10)

    @coalescer.coalesced()
    def ask(question, loud=False):
        return next(calls)

    @coalescer.coalesced()
    async def ask_async(question, loud=False):
        return next(calls)

    assert [ask("?"), await ask_async("?"), ask("!")] == [0, 1, 2]
    assert ask.forget(question="?") is True
    assert ask.forget("?", False) is False
    assert [ask("?"), await ask_async("?"), ask("!")] == [3, 1, 2]
    assert ask_async.forget("?") is True
    assert [ask("?"), await ask_async("?"), ask("!")] == [3, 4, 2]


def test_forget_and_key_for_of_a_method_take_the_instance():
    one, other = Client("one"), Client("other")
    first, others = one.ask("?"), other.ask("?")
    assert one.ask.forget(one, "?") is True
    assert one.ask("?") is not first
    assert other.ask("?") is others


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated with the function")
def test_annotations_may_name_what_is_not_defined_yet():
    namespace = {"__name__": "later"}
    exec("def ask(question: NotYet) -> AlsoNotYet: return question", namespace)
    assert BatchCoalescer().coalesced()(namespace["ask"])("?") == "?"


# Misplaced


def generate():
    yield


async def generate_async():
    yield


@pytest.mark.parametrize("fn", [generate, generate_async])
def test_what_yields_cannot_be_shared(fn):
    with pytest.raises(TypeError, match=rf"^{fn.__name__} is a generator function.*only once"):
        BatchCoalescer().coalesced()(fn)


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_what_is_no_function_yet_is_told_where_to_stand(kind):
    with pytest.raises(TypeError, match=rf"@{kind.__name__} must stand above @coalescer.coalesced\(\)"):
        BatchCoalescer().coalesced()(kind(plain))


@pytest.mark.parametrize("thing", [5, None, Client, Client("x"), functools.partial(plain, 1), generate()])
def test_what_is_no_function_at_all_is_refused(thing):
    with pytest.raises(TypeError, match=r"decorates one function, not"):
        BatchCoalescer().coalesced()(thing)


@pytest.mark.parametrize("arguments", [call(), call(1), call("?", 2), call(a=1), call(print, a=1)])
def test_a_decorator_without_parentheses_is_refused_before_anything_is_called(arguments):
    def ask(*args, **kwargs):
        pytest.fail("called")

    with pytest.raises(TypeError, match=r"coalesced\(\)"):
        BatchCoalescer().coalesced(ask)(*arguments[0], **arguments[1])


@pytest.mark.parametrize("key", ["ask", 5, ["k"], Client.ask_async, generate, generate_async])
def test_a_key_that_is_no_plain_function_is_refused(key):
    with pytest.raises(TypeError, match=r"key must be a plain function of the call's arguments.*coalesced\(\)"):
        BatchCoalescer().coalesced(key=key)

"""The published shapes: what one gets who swaps the package and changes nothing else."""

import asyncio
import concurrent.futures
import doctest
import enum
import math
import threading

import pytest
from loops import PATIENCE, HeldCall, LoopThread, let_run, wait_for_waiters, wait_until

from llm_batch_coalesce import (
    AsyncRequestCoalescer,
    BatchCoalesce,
    CallResultError,
    CoalescerStats,
    RecursiveCallError,
    RequestCoalescer,
    _shapes,
)


def test_the_examples_in_the_docs_hold():
    assert doctest.testmod(_shapes).attempted > 0
    assert doctest.testmod(_shapes).failed == 0


# RequestCoalescer


class Held:
    """A callable for threads that stays in its call until `release`."""

    def __init__(self, error=None):
        self.calls, self._error = 0, error
        self.started, self._released = threading.Event(), threading.Event()

    def __call__(self):
        self.calls += 1
        self.started.set()
        assert self._released.wait(PATIENCE)
        if self._error is not None:
            raise self._error
        return self

    def release(self):
        assert self.started.wait(PATIENCE)
        self._released.set()


def test_threads_share_the_call_under_way(crew):
    shared, held = RequestCoalescer(), Held()
    crew.start(20, lambda number: shared.call("k", held))
    wait_for_waiters(shared._coalescer, "k", 19)
    assert shared.stats().inflight_count == 1
    held.release()
    assert crew.join() == [held] * 20
    assert held.calls == 1
    assert shared.stats() == CoalescerStats(inflight_count=0, coalesced_calls=19, underlying_calls=1)


def test_threads_share_an_error_but_not_the_object(crew):
    shared, original = RequestCoalescer(), LookupError("gone")
    held = Held(original)

    def work(number):
        with pytest.raises(LookupError, match="gone") as raised:
            shared.call("k", held)
        return raised.value

    crew.start(10, work)
    wait_for_waiters(shared._coalescer, "k", 9)
    held.release()
    errors = crew.join()
    assert len({id(error) for error in errors}) == 10
    assert original in errors
    assert shared.stats() == CoalescerStats(0, 9, 1)


def test_nothing_is_retained_neither_values_nor_errors():
    shared, calls = RequestCoalescer(), []

    def fail():
        calls.append(1)
        raise LookupError

    assert [shared.call("value", lambda number=number: number) for number in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(LookupError):
            shared.call("error", fail)
    assert len(calls) == 2
    assert shared.stats() == CoalescerStats(0, 0, 5)


def test_arguments_reach_the_function_whatever_their_names():
    shared = RequestCoalescer()
    answer = shared.call("k", lambda *args, **kwargs: (args, kwargs), 1, 2, key=3, fn=4, self=5)
    assert answer == ((1, 2), {"key": 3, "fn": 4, "self": 5})


def test_cancel_wakes_the_waiters_and_leaves_the_call_to_the_one_that_made_it(crews):
    shared, held = RequestCoalescer(), Held()
    leading = crews().start(1, lambda number: shared.call("k", held))
    assert held.started.wait(PATIENCE)

    def wait(number):
        with pytest.raises(concurrent.futures.CancelledError):
            shared.call("k", held)

    waiting = crews().start(3, wait)
    wait_for_waiters(shared._coalescer, "k", 3)
    assert shared.cancel("k") is True
    waiting.join()
    assert shared.cancel("k") is False
    # They had joined; nobody can join any more, though the call goes on.
    assert shared.stats() == CoalescerStats(inflight_count=0, coalesced_calls=3, underlying_calls=1)
    assert shared.call("k", lambda: "new") == "new"
    held.release()
    assert leading.join() == [held]
    assert shared.stats() == CoalescerStats(0, 3, 2)


def test_there_is_nothing_to_cancel_without_a_call():
    shared = RequestCoalescer()
    shared.call("k", lambda: 1)
    assert shared.cancel("k") is False
    assert shared.cancel("never asked for") is False


def test_reset_stats_counts_from_zero_and_leaves_the_call_under_way(crew):
    shared, held = RequestCoalescer(), Held()
    shared.call("other", lambda: 1)
    crew.start(1, lambda number: shared.call("k", held))
    assert held.started.wait(PATIENCE)
    shared.reset_stats()
    assert shared.stats() == CoalescerStats(inflight_count=1, coalesced_calls=0, underlying_calls=0)
    held.release()
    crew.join()
    assert shared.stats().inflight_count == 0


async def test_what_is_no_function_is_refused_and_named():
    with pytest.raises(TypeError, match="fn must be callable, not 5"):
        RequestCoalescer().call("k", 5)
    with pytest.raises(TypeError, match="fn must be callable, not 5"):
        await AsyncRequestCoalescer().call("k", 5)
    with pytest.raises(TypeError, match="call_fn must be callable, not 5"):
        BatchCoalesce().get_or_call([], 5)


async def test_each_shape_refuses_the_functions_of_the_other():
    async def ask():
        pytest.fail("not awaited")

    with pytest.raises(CallResultError):
        RequestCoalescer().call("k", ask)
    with pytest.raises(CallResultError):
        await AsyncRequestCoalescer().call("k", lambda: 1)


# AsyncRequestCoalescer


async def test_tasks_share_the_call_under_way():
    shared, held = AsyncRequestCoalescer(), HeldCall("value")
    asking = [asyncio.create_task(shared.call("k", held)) for _ in range(20)]
    await let_run()
    assert shared.stats().inflight_count == 1
    held.release()
    assert await asyncio.gather(*asking) == ["value"] * 20
    assert held.calls == 1
    assert shared.stats() == CoalescerStats(inflight_count=0, coalesced_calls=19, underlying_calls=1)
    shared.reset_stats()
    assert shared.stats() == CoalescerStats(0, 0, 0)


async def test_tasks_share_an_error_and_nothing_is_retained():
    shared, original = AsyncRequestCoalescer(), LookupError("gone")

    async def fail():
        await asyncio.sleep(0)
        raise original

    for round_number in (1, 2):
        errors = await asyncio.gather(*(shared.call("k", fail) for _ in range(3)), return_exceptions=True)
        assert [repr(error) for error in errors] == ["LookupError('gone')"] * 3
        assert len({id(error) for error in errors}) == 3
        assert shared.stats() == CoalescerStats(0, 2 * round_number, round_number)


async def test_arguments_reach_the_coroutine_function_whatever_their_names():
    async def ask(*args, **kwargs):
        return args, kwargs

    answer = await AsyncRequestCoalescer().call("k", ask, 1, 2, key=3, fn=4, self=5)
    assert answer == ((1, 2), {"key": 3, "fn": 4, "self": 5})


async def test_an_awaited_cancel_wakes_the_waiters_and_leaves_the_call_to_the_one_that_made_it():
    shared, held = AsyncRequestCoalescer(), HeldCall("value")
    leading = asyncio.create_task(shared.call("k", held))
    await let_run()
    waiting = [asyncio.create_task(shared.call("k", held)) for _ in range(3)]
    await let_run()
    assert await shared.cancel("k") is True
    await asyncio.wait(waiting, timeout=PATIENCE)
    assert all(task.cancelled() for task in waiting)
    assert await shared.cancel("k") is False
    assert shared.stats() == CoalescerStats(inflight_count=0, coalesced_calls=3, underlying_calls=1)
    held.release()
    assert await leading == "value"


async def test_a_caller_that_is_cancelled_counts_as_what_it_was():
    shared, held = AsyncRequestCoalescer(), HeldCall("value")
    asking = [asyncio.create_task(shared.call("k", held)) for _ in range(3)]
    await let_run()
    for task in asking[:2]:
        task.cancel()
    await let_run()
    held.release()
    assert await asking[2] == "value"
    assert shared.stats() == CoalescerStats(0, 2, 1)


def test_tasks_of_two_loops_share_a_call():
    shared, held = AsyncRequestCoalescer(), HeldCall("value")
    first, second = LoopThread(), LoopThread()
    try:
        leading = first.start(shared.call("k", held))
        assert held.started.wait(PATIENCE)
        waiting = second.start(shared.call("k", held))
        wait_for_waiters(shared._coalescer, "k", 1)
        held.release()
        assert leading.result() == waiting.result() == "value"
    finally:
        first.end()
        second.end()
    assert shared.stats().underlying_calls == 1


# BatchCoalesce

MESSAGES = [{"role": "user", "content": "hello"}]


def test_threads_share_the_request_under_way(crew):
    shared, released = BatchCoalesce(), threading.Event()

    def call_fn(messages, model, **extras):
        assert released.wait(PATIENCE)
        return messages, model, extras

    crew.start(12, lambda number: shared.get_or_call([{**MESSAGES[0]}], call_fn, model="m", top_p=0.5))
    wait_until(lambda: [flight.waiters for flight in shared._coalescer.flights()] == [11])
    assert shared.stats()["in_flight"] == shared.in_flight == 1
    released.set()
    answers = crew.join()
    assert len({id(answer) for answer in answers}) == 1
    assert answers[0] == (MESSAGES, "m", {"top_p": 0.5})
    assert shared.stats() == {"call_count": 1, "coalesced_count": 11, "in_flight": 0}
    assert (shared.call_count, shared.coalesced_count, shared.in_flight) == (1, 11, 0)
    shared.reset_stats()
    assert shared.stats() == {"call_count": 0, "coalesced_count": 0, "in_flight": 0}


def test_a_request_is_not_retained_and_one_that_failed_counts_as_a_call():
    shared = BatchCoalesce()

    def fail(messages):
        assert shared.in_flight == 1
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            shared.get_or_call(MESSAGES, fail)
    assert shared.get_or_call(MESSAGES, lambda messages: messages) is MESSAGES
    assert shared.stats() == {"call_count": 3, "coalesced_count": 0, "in_flight": 0}


def test_an_empty_model_is_not_handed_on():
    assert BatchCoalesce().get_or_call(MESSAGES, lambda messages, **extras: extras, seed=1) == {"seed": 1}


def same(one, other):
    """Tell whether two requests have one key: a call that asks for its own key is refused."""
    shared = BatchCoalesce()

    def ask(request, call_fn):
        return shared.wrap()(call_fn)(**request)

    try:
        ask(one, lambda *_, **__: ask(other, lambda *_, **__: None))
    except RecursiveCallError:
        return True
    return False


class Role(enum.StrEnum):
    USER = "user"


SAME = [
    ({"messages": MESSAGES, "a": 1, "b": 2}, {"b": 2, "a": 1, "messages": MESSAGES}),
    ({"messages": [{"a": 1, "b": 2}]}, {"messages": ({"b": 2, "a": 1},)}),
    ({"messages": [], "model": ""}, {"messages": []}),
    ({"messages": [{"role": Role.USER}]}, {"messages": [{"role": "user"}]}),
    ({"messages": ["\N{GRINNING FACE}", "\ud83d", None]}, {"messages": ["\U0001f600", "\ud83d", None]}),
]
DIFFERENT = [
    *({"messages": [value]} for value in (1, 1.0, True, "1", "1.0", "true", [1], None, "null", "", [], {}, "[]", "{}")),
    *({"messages": [{"a": value}]} for value in (0, False, -0.0, 1e16, 10**16, 2**53, float(2**53))),
    {"messages": []},
    {"messages": [], "model": "m"},
    {"messages": [], "models": "m"},
    {"messages": [], "extras": {"model": "m"}},
    {"messages": [], "a": {"b": 1}},
    {"messages": [], "a": [{"b": 1}]},
    {"messages": [], "a.b": 1},
    {"messages": [], "a": 1, "b": 2},
    {"messages": [], "a": 2, "b": 1},
    {"messages": [], "a": '1, "b": 2'},
    {"messages": [], "messages ": []},
    {"messages": ["\N{GRINNING FACE}"]},
    {"messages": ["\ud83d\ude00"]},
    {"messages": ["\ud83d"]},
    {"messages": ["?"]},
    {"messages": ["\\ud83d\\ude00"]},
    {"messages": ["é"]},
    {"messages": ["e\u0301"]},
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_requests_that_are_one_as_json_share_a_call(one, other):
    assert same(one, other)
    assert same(other, one)


def test_requests_that_differ_share_nothing():
    mixed = [(one, other) for number, one in enumerate(DIFFERENT) for other in DIFFERENT[:number] if same(one, other)]
    assert mixed == []
    assert all(same(one, one) for one in DIFFERENT)


LOOP = {"role": "user", "content": []}
LOOP["content"].append(LOOP)


@pytest.mark.parametrize(
    ("request_", "place", "reason"),
    [
        ({"messages": [{}, {}, {"content": [b"png"]}]}, "messages[2].content[0]", "b'png'"),
        ({"messages": [({"tool use": {"ids": {1}}},)]}, "messages[0][0]['tool use'].ids", "{1}"),
        ({"messages": [], "stop": object}, "stop", "<class 'object'>"),
        ({"messages": [], "temperature": math.nan}, "temperature", "nan"),
        ({"messages": [], "options": {"limits": (1, -math.inf)}}, "options.limits[1]", "-inf"),
        ({"messages": [{"scores": {1: "x"}}]}, "messages[0].scores", "its key 1 is no string"),
        ({"messages": [{None: "x"}]}, "messages[0]", "its key None is no string"),
        ({"messages": MESSAGES[0].items()}, "messages", "dict_items"),
        ({"messages": [], "model": b"m"}, "model", "b'm'"),
        ({"messages": [LOOP]}, "messages[0].content[0]", "it contains itself"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(request_, place, reason):
    shared = BatchCoalesce()
    with pytest.raises(TypeError) as refused:
        shared.wrap()(lambda *_, **__: pytest.fail("called"))(**request_)
    assert str(refused.value).startswith(f"{place} cannot be part of a request as JSON: ")
    assert reason in str(refused.value)
    assert shared.stats() == {"call_count": 0, "coalesced_count": 0, "in_flight": 0}


def test_a_container_may_occur_twice_if_not_in_itself():
    part = {"text": "hello"}
    assert same({"messages": [part, part, [part]]}, {"messages": [{"text": "hello"}, part, [part]]})


def test_wrap_makes_a_function_that_shares_its_calls():
    shared = BatchCoalesce()

    @shared.wrap(model="small")
    def call_llm(messages, **options):
        """Call it."""
        return messages, options, shared.in_flight

    assert call_llm(MESSAGES) == (MESSAGES, {"model": "small"}, 1)
    assert call_llm(messages=MESSAGES, model="large", seed=1) == (MESSAGES, {"model": "large", "seed": 1}, 1)
    assert call_llm(MESSAGES, model="") == (MESSAGES, {}, 1)
    assert call_llm(MESSAGES, call_fn=1, self=2)[1] == {"model": "small", "call_fn": 1, "self": 2}
    assert (call_llm.__name__, call_llm.__doc__) == ("call_llm", "Call it.")
    assert shared.call_count == 4


def test_wrap_without_parentheses_is_refused():
    with pytest.raises(TypeError, match=r"model must be a string.*wrap\(\)"):
        BatchCoalesce().wrap(lambda messages: messages)

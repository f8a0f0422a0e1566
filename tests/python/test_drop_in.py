"""What the package and the pure-Python coalescer have in common, so that one can take the place of the other."""

import asyncio
import random
import threading

import model
import pytest
from loops import PATIENCE, Raised, wait_for_waiters

import llm_batch_coalesce
from llm_batch_coalesce import _core


class PackageClock:
    """Makes the package's coalescers, and moves the clock that they look at."""

    module = llm_batch_coalesce

    def options(self):
        return {}

    def advance(self, seconds):
        _core._advance_clock(seconds)


class ModelClock:
    """The same for the model's."""

    module = model

    def __init__(self):
        self._time = 0.0

    def options(self):
        return {"clock": lambda: self._time}

    def advance(self, seconds):
        self._time += seconds


class Threads:
    """Asks from threads."""

    def __init__(self, clock):
        self._clock = clock

    def coalescer(self, *args, **options):
        return self._clock.module.BatchCoalescer(*args, **options, **self._clock.options())

    def callable(self, work):
        return work

    def ask(self, coalescer, *args, **kwargs):
        return coalescer.get_or_call(*args, **kwargs)

    def ask_together(self, coalescer, keys, work):
        """Ask in one thread for each key. Each call goes on when all its callers wait, and all calls have begun."""
        meeting = threading.Barrier(len(set(keys)))
        outcomes = [None] * len(keys)

        def ask(number):
            key = keys[number]

            def call():
                meeting.wait(PATIENCE)
                wait_for_waiters(coalescer, key, keys.count(key) - 1)
                return work()

            try:
                outcomes[number] = coalescer.get_or_call(key, call)
            except Exception as error:
                outcomes[number] = Raised(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(keys))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        return outcomes


class Tasks:
    """Asks from tasks of one loop."""

    def __init__(self, clock, runner):
        self._clock = clock
        self._runner = runner

    def coalescer(self, *args, **options):
        return self._clock.module.AsyncBatchCoalescer(*args, **options, **self._clock.options())

    def callable(self, work):
        async def call():
            await asyncio.sleep(0)
            return work()

        return call

    def ask(self, coalescer, *args, **kwargs):
        return self._runner.run(coalescer.get_or_call(*args, **kwargs))

    def ask_together(self, coalescer, keys, work):
        """The same with one task for each key."""
        meeting = asyncio.Barrier(len(set(keys)))

        async def ask(key):
            async def call():
                await meeting.wait()
                for _ in range(len(keys)):
                    await asyncio.sleep(0)
                assert coalescer._waiters(key) == keys.count(key) - 1
                return work()

            return await coalescer.get_or_call(key, call)

        async def ask_all():
            asking = asyncio.gather(*(ask(key) for key in keys), return_exceptions=True)
            outcomes = await asyncio.wait_for(asking, PATIENCE)
            return [Raised(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]

        return self._runner.run(ask_all())


@pytest.fixture(params=[PackageClock, ModelClock], ids=["package", "model"])
def clock(request):
    return request.param()


@pytest.fixture(params=["threads", "tasks"])
def callers(request, clock):
    if request.param == "threads":
        yield Threads(clock)
    else:
        with asyncio.Runner() as runner:
            yield Tasks(clock, runner)


class Work:
    """Counts its calls; each gives a new object, or the error."""

    def __init__(self, error=None, value=object):
        self._error, self._value = error, value
        self._counting = threading.Lock()
        self.calls = 0

    def __call__(self):
        with self._counting:
            self.calls += 1
        if self._error is not None:
            raise self._error
        return self._value()


def test_concurrent_callers_make_one_call_and_get_the_very_object(callers):
    work = Work()
    outcomes = callers.ask_together(callers.coalescer(0), ["k"] * 20, work)
    assert work.calls == 1
    assert len({id(outcome) for outcome in outcomes}) == 1
    assert type(outcomes[0]) is object


def test_none_is_shared_and_retained_like_any_other_value(callers):
    work, coalescer = Work(value=lambda: None), callers.coalescer(10)
    assert callers.ask_together(coalescer, ["k"] * 5, work) == [None] * 5
    assert callers.ask(coalescer, "k", callers.callable(work)) is None
    assert work.calls == 1


@pytest.mark.parametrize("value", [False, 0, "", (), ValueError("a value, not raised")])
def test_a_value_may_be_anything(callers, value):
    work, coalescer = Work(value=lambda: value), callers.coalescer(10)
    assert callers.ask(coalescer, "k", callers.callable(work)) is value
    assert callers.ask(coalescer, "k", callers.callable(work)) is value
    assert work.calls == 1


def test_a_value_is_retained_for_the_ttl_and_no_longer(callers, clock):
    work, coalescer = Work(), callers.coalescer(10)
    call = callers.callable(work)
    first = callers.ask(coalescer, "k", call)
    clock.advance(9)
    assert callers.ask(coalescer, "k", call) is first
    clock.advance(1.5)
    assert callers.ask(coalescer, "k", call) is not first
    assert work.calls == 2


def test_a_hit_does_not_prolong_the_ttl(callers, clock):
    work, coalescer = Work(), callers.coalescer(10)
    call = callers.callable(work)
    for _ in range(3):
        callers.ask(coalescer, "k", call)
        clock.advance(4)
    callers.ask(coalescer, "k", call)
    assert work.calls == 2


def test_the_ttl_runs_from_completion(callers, clock):
    work, coalescer = Work(), callers.coalescer(10)

    def slow():
        clock.advance(30)
        return work()

    first = callers.ask(coalescer, "k", callers.callable(slow))
    clock.advance(9)
    assert callers.ask(coalescer, "k", callers.callable(work)) is first
    clock.advance(1.5)
    assert callers.ask(coalescer, "k", callers.callable(work)) is not first


def test_the_default_ttl_is_five_seconds(callers, clock):
    work, coalescer = Work(), callers.coalescer()
    call = callers.callable(work)
    first = callers.ask(coalescer, "k", call)
    clock.advance(4)
    assert callers.ask(coalescer, "k", call) is first
    clock.advance(1.5)
    assert callers.ask(coalescer, "k", call) is not first


def test_a_ttl_of_zero_retains_nothing(callers):
    work, coalescer = Work(), callers.coalescer(ttl_seconds=0)
    for _ in range(3):
        callers.ask(coalescer, "k", callers.callable(work))
    assert work.calls == 3


def test_concurrent_callers_share_an_error(callers):
    original = ValueError("no such model", 404)
    work = Work(error=original)
    outcomes = callers.ask_together(callers.coalescer(0), ["k"] * 20, work)
    assert work.calls == 1
    assert [(type(outcome.error), outcome.error.args) for outcome in outcomes] == [(ValueError, original.args)] * 20
    assert any(outcome.error is original for outcome in outcomes)


def test_an_error_is_retained_for_the_ttl_and_no_longer(callers, clock):
    work, coalescer = Work(error=KeyError("gone")), callers.coalescer(10)
    call = callers.callable(work)
    for pause in (9, 1.5, 9, 1.5):
        with pytest.raises(KeyError, match="gone"):
            callers.ask(coalescer, "k", call)
        clock.advance(pause)
    assert work.calls == 2


def test_a_value_takes_the_place_of_an_error_that_has_expired(callers, clock):
    coalescer = callers.coalescer(10)
    with pytest.raises(KeyError):
        callers.ask(coalescer, "k", callers.callable(Work(error=KeyError())))
    clock.advance(11)
    assert callers.ask(coalescer, "k", callers.callable(lambda: "value")) == "value"
    assert callers.ask(coalescer, "k", callers.callable(Work(error=KeyError()))) == "value"


def test_calls_of_different_keys_run_at_the_same_time(callers):
    keys = ["a", "b", "c"] * 4
    work = Work()
    # Each call waits for the others to begin.
    outcomes = callers.ask_together(callers.coalescer(0), keys, work)
    assert work.calls == 3
    assert len({(key, id(outcome)) for key, outcome in zip(keys, outcomes, strict=True)}) == 3
    assert len({id(outcome) for outcome in outcomes}) == 3


def test_the_error_of_one_key_is_none_of_anothers(callers):
    coalescer = callers.coalescer(10)
    with pytest.raises(KeyError):
        callers.ask(coalescer, "a", callers.callable(Work(error=KeyError())))
    assert callers.ask(coalescer, "b", callers.callable(lambda: "b")) == "b"


def test_two_coalescers_share_nothing(callers):
    assert callers.ask(callers.coalescer(10), "k", callers.callable(lambda: 1)) == 1
    assert callers.ask(callers.coalescer(10), "k", callers.callable(lambda: 2)) == 2


EQUAL = [
    (1, 1.0, True),
    (0, 0.0, -0.0, False),
    ("ab", str(b"ab", "ascii")),
    (("model", 1), ("model", True)),
    (frozenset((1, 2)), frozenset((2, 1))),
    (b"k", bytes(bytearray(b"k"))),
    (None, None),
]


@pytest.mark.parametrize("keys", EQUAL, ids=repr)
def test_keys_that_are_equal_as_in_a_dict_are_one(callers, keys):
    assert len(dict.fromkeys(keys)) == 1
    work, coalescer = Work(), callers.coalescer(10)
    assert len({callers.ask(coalescer, key, callers.callable(work)) for key in keys}) == 1
    assert work.calls == 1


@pytest.mark.parametrize("keys", EQUAL, ids=repr)
def test_equal_keys_join_one_call(callers, keys):
    work = Work()
    callers.ask_together(callers.coalescer(0), list(keys), work)
    assert work.calls == 1


def test_keys_that_differ_as_in_a_dict_are_several(callers):
    keys = [1, "1", b"1", 1.5, (1,), ((1,),), frozenset([1]), None, "", (), -1, -2, 2**61 - 1, "k", "K"]
    assert len(dict.fromkeys(keys)) == len(keys)
    coalescer = callers.coalescer(10)
    for key in keys:
        callers.ask(coalescer, key, callers.callable(lambda key=key: ("value of", key)))
    for key in keys:
        assert callers.ask(coalescer, key, callers.callable(lambda: pytest.fail("retained"))) == ("value of", key)


def test_a_key_that_is_not_even_equal_to_itself_is_found_by_identity(callers):
    work, coalescer, nan = Work(), callers.coalescer(10), float("nan")
    assert callers.ask(coalescer, nan, callers.callable(work)) is callers.ask(coalescer, nan, callers.callable(work))
    assert work.calls == 1


def test_arguments_may_be_given_by_position_or_by_name(callers):
    work, coalescer = Work(), callers.coalescer(10)
    call = callers.callable(work)
    first = callers.ask(coalescer, "k", call)
    assert callers.ask(coalescer, "k", fn=call) is first
    assert callers.ask(coalescer, key="k", fn=call) is first
    assert callers.ask(coalescer, fn=call, key="k") is first
    assert work.calls == 1


def test_an_unhashable_key_is_a_type_error_and_nothing_is_called(callers):
    work, coalescer = Work(), callers.coalescer(10)
    with pytest.raises(TypeError, match="unhashable"):
        callers.ask(coalescer, ["k"], callers.callable(work))
    assert work.calls == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [Threads, Tasks])
def test_any_course_of_requests_goes_as_in_the_model(kind, seed):
    """Times are whole seconds and the TTL is not, so the moments that pass between two steps decide nothing."""
    steps = random.Random(seed)
    with asyncio.Runner() as runner:
        sides = []
        for clock in (PackageClock(), ModelClock()):
            callers = kind(clock, runner) if kind is Tasks else kind(clock)
            sides.append((clock, callers, callers.coalescer(3.5)))
        for step in range(400):
            pause, key, fails = steps.choice((0, 0, 0, 1, 2, 5)), steps.randrange(6), steps.random() < 0.3
            answers = []
            for clock, callers, coalescer in sides:
                clock.advance(pause)
                work = Work(error=LookupError(step) if fails else None, value=lambda step=step: step)
                try:
                    answers.append((callers.ask(coalescer, key, callers.callable(work)), work.calls))
                except LookupError as error:
                    answers.append((repr(error), work.calls))
            assert answers[0] == answers[1]

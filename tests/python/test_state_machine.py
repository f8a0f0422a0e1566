"""Coalescer and model go the same way, step by step: hypothesis chooses the steps.

Each step ends when all callers are known to be where the model has them: in their calls, waiting, or served. Time is
the settable clock's. TTLs lie half-way between the moments that it can reach, so that the real time that a test takes
makes no difference.
"""

import asyncio
import concurrent.futures
import functools
import math
import queue
import threading
import time

import pytest
from flight_model import Ending, Model, Request
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loops import LoopThread

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, CallResultError, RecursiveCallError, Retain, _core

KEYS = ["k", 7, ("a", "b")]
TTLS = [0, 50, 150, math.inf]
MISSING = object()
# What real time may add to the clock's.
SLACK = 40.0
MOST_CALLERS = 9


class SharedError(Exception):
    """Shared; carries what `ttl_by_error` answers."""

    ttl = None


class PrivateError(Exception):
    """One of the private errors."""


class Abort(BaseException):
    """What ends a loop no more than an `Exception` does, but is none."""


class Value:
    """Equal to nothing but itself."""


def ttl_by_error(error):
    # What has no TTL to tell makes this fail.
    return error.ttl


ERROR_TTLS = [None, 0, 150, ttl_by_error]

returning = st.one_of(
    st.builds(lambda: Ending(Value())),
    st.just(Ending(None)),
    st.builds(lambda ttl: Ending(Value(), retain=ttl), st.sampled_from(TTLS)),
)


@st.composite
def failing(draw):
    error = SharedError("shared", draw(st.integers(0, 99)))
    error.ttl = draw(st.sampled_from([None, *TTLS, "nonsense", -1]))
    return Ending(error=error)


sharing = st.one_of(returning, failing(), st.builds(lambda: Ending(error=ValueError("without a TTL"))))
private = st.sampled_from([PrivateError, PrivateError, Abort, SystemExit, KeyboardInterrupt, GeneratorExit]).map(
    lambda kind: Ending(error=kind("private"), private=True)
)
# Only what is prepared can be no coroutine, or one, before it is asked to wait.
wrong = st.builds(lambda: Ending(error=CallResultError(), never_retained=True))
keys, homes = st.sampled_from(KEYS), st.integers(0, 2)
picks = st.integers(0, MOST_CALLERS)
mostly = st.sampled_from([True, True, True, False])
LONG = 1e6
no_timeouts = st.sampled_from([None, None, LONG])
prepared_endings = st.one_of(sharing, sharing, private, wrong)


class Caller:
    """A thread or a task that asks, and whose callable waits for orders."""

    def __init__(self, request, ask):
        self.request, self._ask = request, ask
        self.runs = 0
        self.entered = self.done = False
        self.outcome = None
        self.answers = queue.SimpleQueue()

    def _settle(self, kind, outcome):
        self.outcome = (kind, outcome)
        self.done = True

    @property
    def is_prepared_wrongly(self):
        return self.request.prepared is not None and self.request.prepared.never_retained


def follow(ending):
    """End a call as told."""
    if ending.error is not None:
        raise ending.error
    return ending.value if ending.retain is None else Retain(ending.value, ending.retain)


class ThreadCaller(Caller):
    def start(self):
        self._orders = queue.SimpleQueue()
        threading.Thread(target=self._run, name=self.request.name, daemon=True).start()

    def _run(self):
        try:
            self._settle("returned", self._ask(self._call))
        except BaseException as error:
            self._settle("raised", error)

    def _call(self):
        self.runs += 1
        self.entered = True
        if self.is_prepared_wrongly:
            return asyncio.sleep(0)
        order = self.request.prepared
        while not isinstance(order, Ending):
            if order is not None:
                self.answers.put(order())
            order = self._orders.get(timeout=60)
        return follow(order)

    def order(self, order):
        self._orders.put(order)

    def ask_inside(self, coalescer, key, ending):
        self.order(lambda: self._ask_at_once(coalescer, key, ending))
        return self.answers.get(timeout=20)

    def _ask_at_once(self, coalescer, key, ending):
        try:
            return "returned", coalescer.get_or_call(key, lambda: follow(ending), timeout=0)
        except BaseException as error:
            return "raised", error

    @property
    def call_is_over(self):
        return self.done


class TaskCaller(Caller):
    def __init__(self, request, ask, thread):
        super().__init__(request, ask)
        self._thread = thread
        self._call_task = None

    def start(self):
        self._thread.loop.call_soon_threadsafe(self._start)

    def _start(self):
        self._task = self._thread.loop.create_task(self._run(), name=self.request.name)

    async def _run(self):
        try:
            self._settle("returned", await self._ask(self._call))
        except BaseException as error:
            self._settle("raised", error)

    def _call(self):
        self.runs += 1
        if self.is_prepared_wrongly:
            self.entered = True
            return object()
        return self._held()

    async def _held(self):
        self._call_task = asyncio.current_task()
        self._call_task.set_name(self.request.name)
        self._orders = asyncio.Queue()
        # When the task that started this one eagerly has come to its wait, too.
        asyncio.get_running_loop().call_soon(setattr, self, "entered", True)
        order = self.request.prepared
        while not isinstance(order, Ending):
            if order is not None:
                self.answers.put(await order())
            order = await self._orders.get()
        return follow(order)

    def order(self, order):
        self._thread.loop.call_soon_threadsafe(self._orders.put_nowait, order)

    def ask_inside(self, coalescer, key, ending):
        self.order(lambda: self._ask_at_once(coalescer, key, ending))
        return self.answers.get(timeout=20)

    async def _ask_at_once(self, coalescer, key, ending):
        async def call():
            return follow(ending)

        try:
            return "returned", await coalescer.get_or_call(key, call, timeout=0)
        except BaseException as error:
            return "raised", error

    def cancel(self):
        self._thread.loop.call_soon_threadsafe(self._task.cancel)

    def kill(self):
        self._thread.loop.call_soon_threadsafe(self._call_task.cancel)

    @property
    def call_is_over(self):
        return self.is_prepared_wrongly or (self._call_task is not None and self._call_task.done())

    def error_of_call(self):
        task = self._call_task
        return None if task is None or not task.done() or task.cancelled() else task.exception()


class Side:
    """The real coalescer with a face for each kind of caller."""

    loops = ()

    def __init__(self, base_is_async, finishing_loop, **options):
        count = len(self.loops)
        finishes = [number == finishing_loop for number in range(count)]
        words = ["finish" if finish else "cancel" for finish in finishes]
        self.finishes = finishes
        if base_is_async:
            self.base = AsyncBatchCoalescer(**options)
            self.sync = self.base.as_sync()
        else:
            self.base = self.sync = BatchCoalescer(**options)
        self.faces = [self.sync.as_async(on_abandoned=word) for word in words]


def step(function):
    """Write a step down. Until coalescer and model are seen to agree again, there is no model to follow."""

    @functools.wraps(function)
    def wrapper(machine, **arguments):
        machine.steps.append((function.__name__, arguments))
        machine.agrees = False
        function(machine, **arguments)

    return wrapper


class CoalescerMachine(RuleBasedStateMachine):
    """Threads and the tasks of two loops, on one coalescer."""

    places = (None, 0, 1)
    patience = 10.0

    def __init__(self):
        super().__init__()
        self.callers = []
        self.steps = []
        self.agrees = False
        self.number = 0
        self.total_runs = 0
        self.expected_runs = 0

    @initialize(
        ttl=st.sampled_from([0, 50, 150, math.inf]),
        error_ttl=st.sampled_from(ERROR_TTLS),
        max_flight=st.sampled_from([150, None]),
        max_retained=st.sampled_from([None, len(KEYS)]),
        base_is_async=st.booleans(),
        finishing_loop=st.integers(0, 2),
    )
    @step
    def make(self, *, ttl, error_ttl, max_flight, max_retained, base_is_async, finishing_loop):
        self.side = Side(
            base_is_async,
            finishing_loop,
            ttl_seconds=ttl,
            error_ttl_seconds=error_ttl,
            private_errors=PrivateError,
            max_flight_seconds=max_flight,
            max_retained=max_retained,
        )
        self.model = Model(ttl, error_ttl, max_flight or math.inf)

    # Callers.

    def _request(self, key, home, ttl=None, ending=None):
        loop = self.places[home % len(self.places)]
        finishes = loop is not None and self.side.finishes[loop]
        self.number += 1
        return Request(f"caller {self.number}", key, loop, finishes, ttl, ending)

    def _start(self, request, detailed=False, timeout=None):
        loop = request.loop
        face = self.side.sync if loop is None else self.side.faces[loop]
        method = face.outcome if detailed else face.get_or_call
        options = {"timeout": timeout, "ttl_seconds": request.ttl}

        def ask(call):
            return method(request.key, call, **options)

        caller = ThreadCaller(request, ask) if loop is None else TaskCaller(request, ask, Side.loops[loop])
        self.callers.append(caller)
        caller.start()
        self._settle()

    def _may_ask(self):
        return len(self.callers) < MOST_CALLERS

    def _ask(self, *, key, home, ttl=None, ending=None, detailed=False, timeout=None):
        request = self._request(key, home, ttl, ending)
        # A long timeout is none that passes.
        self.model.ask(request, timeout=None if timeout == LONG else timeout)
        self._start(request, detailed, timeout)

    @precondition(_may_ask)
    @rule(key=keys, home=homes, ttl=st.sampled_from([None, None, *TTLS]), detailed=mostly, timeout=no_timeouts)
    @step
    def ask_and_be_held(self, **asked):
        self._ask(**asked)

    @precondition(lambda self: self._may_ask() and self._leaders())
    @rule(
        pick=picks,
        crowd=st.lists(
            st.tuples(homes, st.one_of(st.none(), st.none(), prepared_endings), mostly, no_timeouts),
            min_size=1,
            max_size=4,
        ),
        ttl=st.sampled_from([None, None, *TTLS]),
    )
    @step
    def join(self, pick, crowd, ttl):
        # If the flight was forgotten or is over age, the first of them leads.
        key = self._leader(pick).request.key
        for home, ending, detailed, timeout in crowd:
            self._ask(key=key, home=home, ttl=ttl, ending=ending, detailed=detailed, timeout=timeout)

    @rule(
        key=keys,
        home=homes,
        ttl=st.sampled_from([None, *TTLS]),
        ending=prepared_endings,
        detailed=mostly,
        timeout=st.sampled_from([None, LONG, 0, 0.002]),
    )
    @step
    def ask_with_prepared_callable(self, **asked):
        self._ask(**asked)

    def _leaders(self):
        """Those that others wait for come first, since hypothesis likes to pick the first."""
        leaders = [caller for caller in self.callers if caller.request.flight is not None]
        return sorted(leaders, key=lambda caller: -len(caller.request.flight.waiters))

    def _leader(self, pick):
        leaders = self._leaders()
        return leaders[pick % len(leaders)]

    @precondition(lambda self: self._leaders())
    @rule(pick=picks, ending=sharing)
    @step
    def release(self, pick, ending):
        self._release(self._leader(pick), ending)

    @precondition(lambda self: self._leaders())
    @rule(pick=picks, ending=private)
    @step
    def release_privately(self, pick, ending):
        self._release(self._leader(pick), ending)

    def _release(self, caller, ending):
        is_left = caller.request.flight.caller is None
        if is_left and isinstance(ending.error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
            # In a task without a caller the first two would end the loop.
            ending = Ending(error=Abort("private"), private=True)
        self.model.end(caller.request, ending)
        caller.order(ending)
        self._settle()
        if is_left and isinstance(ending.error, Abort):
            assert caller.error_of_call() is ending.error

    @precondition(lambda self: self._leaders())
    @rule(pick=picks, key=keys, ending=sharing)
    @step
    def ask_from_inside(self, pick, key, ending):
        caller = self._leader(pick)
        loop = caller.request.loop
        face = self.side.sync if loop is None else self.side.faces[loop]
        request = self._request(key, self.places.index(loop), None, ending)
        self.model.ask(request, timeout=0, inside=caller.request)
        outcome = caller.ask_inside(face, key, ending)
        self.expected_runs += request.led
        self.total_runs += request.led
        self._compare(request.result, outcome)
        self._settle()

    @precondition(lambda self: self._cancellable())
    @rule(pick=picks)
    @step
    def cancel_task(self, pick):
        cancellable = self._cancellable()
        caller = cancellable[pick % len(cancellable)]
        self.model.leave(caller.request)
        caller.cancel()
        self._settle()

    def _cancellable(self):
        return [c for c in self.callers if c.request.loop is not None and c.request.result is None]

    @precondition(lambda self: self._killable())
    @rule(pick=picks)
    @step
    def cancel_call_from_outside(self, pick):
        killable = self._killable()
        caller = killable[pick % len(killable)]
        self.model.kill(caller.request)
        caller.kill()
        self._settle()

    def _killable(self):
        return [caller for caller in self._leaders() if caller.request.loop is not None]

    # Keys.

    @precondition(lambda self: self.model.table)
    @rule(key=keys, what=st.sampled_from(["forget", "cancel", "clear", "reset_stats"]))
    @step
    def control(self, key, what):
        if what == "clear":
            self.side.base.clear()
            self.model.clear()
        elif what == "reset_stats":
            self.side.base.reset_stats()
            self.model.counts.clear()
        else:
            assert getattr(self.side.base, what)(key) == getattr(self.model, what)(key)
        self._settle()

    @precondition(lambda self: self._leaders())
    @rule(pick=picks, what=st.sampled_from(["cancel", "forget"]))
    @step
    def control_flight(self, pick, what):
        key = self._leader(pick).request.key
        assert getattr(self.side.base, what)(key) == getattr(self.model, what)(key)
        self._settle()

    @rule(key=keys, ttl=st.sampled_from([None, *TTLS]))
    @step
    def put(self, key, ttl):
        ending = Ending(Value())
        self.side.base.put(key, ending.value, ttl)
        self.model.put(key, ending, ttl)
        self._settle()

    @precondition(lambda self: self.model.table)
    @rule(seconds=st.sampled_from([100, 200]))
    @step
    def advance(self, seconds):
        _core._advance_clock(float(seconds))
        self.model.advance(seconds)
        self._settle()

    @precondition(lambda self: self._may_ask() and self._leaders())
    @rule(pick=picks, home=homes, ending=st.one_of(st.none(), prepared_endings))
    @step
    def ask_again_after_a_while(self, pick, home, ending):
        key = self._leader(pick).request.key
        _core._advance_clock(200.0)
        self.model.advance(200)
        self._ask(key=key, home=home, ending=ending)

    # Comparing.

    def _settle(self):
        """Wait until all callers are where the model has them, and compare what those got that are served."""
        pause = threading.Event()
        deadline = time.monotonic() + CoalescerMachine.patience
        while differences := self._differences():
            if any(final for _, final in differences) or time.monotonic() > deadline:
                # Other runs of the same steps will not come any further.
                CoalescerMachine.patience = min(CoalescerMachine.patience, 1.0)
                steps = "\n".join(f"{name}({arguments})" for name, arguments in self.steps)
                raise AssertionError("; ".join(text for text, _ in differences) + f"\nafter\n{steps}")
            pause.wait(0.0002)
        for caller in list(self.callers):
            request = caller.request
            if request.result is not None and request.flight is None:
                self.callers.remove(caller)
                self.total_runs += caller.runs
                self.expected_runs += request.led
                self._compare(request.result, caller.outcome)

    def _differences(self):
        """Tell what is not as the model has it, and whether waiting cannot change that."""
        found = []
        for caller in self.callers:
            request = caller.request
            served, led, done, entered = request.result is not None, request.led, caller.done, caller.entered
            if done != served:
                found.append((f"{request.name} is {'served' if done else 'not served'}", done))
            if entered != led:
                found.append((f"{request.name} {'leads' if entered else 'does not lead'}", entered))
            if led and request.flight is None and not caller.call_is_over:
                found.append((f"the call of {request.name} is not over", False))
        for key in KEYS:
            waiters, expected = self.side.base._waiters(key), self.model.waiters(key)
            if waiters != expected:
                found.append((f"{waiters} and not {expected} wait for {key!r}", False))
        # The sweeper may be about to drop what has expired.
        retained, expected = self.side.base.stats().retained, self.model.stats()["retained"]
        if retained != expected:
            found.append((f"{retained} and not {expected} outcomes are retained", False))
        keys, expected = len(self.side.base), len(self.model.table)
        if keys != expected:
            found.append((f"{keys} and not {expected} keys are there", False))
        return found

    def _compare(self, expected, outcome):
        kind, got = outcome
        if expected.kind == "value":
            assert kind == "returned", (expected, got)
            if hasattr(got, "duration_seconds"):
                assert (got.role, got.waiters) == (expected.role, expected.waiters)
                assert expected.seconds - 1e-3 <= got.duration_seconds < expected.seconds + SLACK
                got = got.value
            assert got is expected.ending.value
            return
        assert kind == "raised", (expected, got)
        kinds = {
            "timeout": TimeoutError,
            "recursive": RecursiveCallError,
            "cancelled": (asyncio.CancelledError, concurrent.futures.CancelledError),
        }
        if expected.kind in kinds:
            assert isinstance(got, kinds[expected.kind]), (expected, got)
            return
        error = expected.ending.error
        assert type(got) is type(error), (expected, got)
        if isinstance(error, CallResultError):
            return
        assert (got is error) == (expected.kind == "original")
        assert got.args == error.args

    @invariant()
    def coalescer_and_model_agree(self):
        self._compare_stats()
        self._compare_keys()
        self._compare_flights()
        runs = self.total_runs + sum(caller.runs for caller in self.callers)
        assert runs == self.expected_runs + sum(caller.request.led for caller in self.callers)
        self.agrees = True

    def _compare_stats(self):
        stats, expected = self.side.base.stats(), self.model.stats()
        assert {name: getattr(stats, name) for name in expected} == expected

    def _compare_keys(self):
        base, model = self.side.base, self.model
        assert len(base) == len(model.table)
        for key in KEYS:
            assert (key in base) == (key in model.table)
            ending = model.peek(key)
            assert base.peek(key, MISSING) is (MISSING if ending is None else ending.value)

    def _compare_flights(self):
        shown, flights = self.side.base.flights(), self.model.oldest_first()
        expected = [(flight.key, len(flight.waiters), flight.leader.name) for flight in flights]
        assert [(info.key, info.waiters, info.leader) for info in shown] == expected
        for info, flight in zip(shown, flights, strict=True):
            assert 0 <= info.age_seconds - (self.model.now - flight.since) < SLACK

    def teardown(self):
        if not self.agrees:
            self._let_all_go()
            return
        while leaders := self._leaders():
            self._release(leaders[0], Ending(Value()))
        assert not self.callers
        self.control(key="k", what="clear")
        self._compare_stats()
        assert self.side.base.stats().in_flight == self.side.base.stats().retained == len(self.side.base) == 0

    def _let_all_go(self):
        deadline = time.monotonic() + 2
        while not all(caller.done for caller in self.callers) and time.monotonic() < deadline:
            for caller in self.callers:
                if caller.entered and not caller.done and not caller.is_prepared_wrongly:
                    caller.order(Ending())
            time.sleep(0.01)


class ThreadsMachine(CoalescerMachine):
    """Threads only."""

    places = (None,)


class TasksMachine(CoalescerMachine):
    """The tasks of one loop."""

    places = (0,)


PROFILE = settings(
    max_examples=110,
    stateful_step_count=50,
    deadline=None,
    database=None,
    print_blob=True,
    derandomize=False,
    # Shrinking takes minutes, more than a test may: add `Phase.shrink` to have it.
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", autouse=True)
def _hypothesis_leaves_nothing_behind(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(scope="module", autouse=True)
def _loops():
    """Event loops that outlive the examples."""
    Side.loops = tuple(LoopThread() for _ in range(2))
    yield
    for thread in Side.loops:
        thread.end()


class TestMixed(CoalescerMachine.TestCase):
    settings = PROFILE


class TestThreads(ThreadsMachine.TestCase):
    settings = PROFILE


class TestTasks(TasksMachine.TestCase):
    settings = PROFILE

"""Every operation at random, on threads and event loops at once, and what must hold after it.

    python tests/stress/hammer.py [--seconds 60] [--seed N]

16 threads and 4 event loops with many tasks each share five coalescers of different options through all their faces.
Callables return, fail in each way that there is, ask for other keys and are cancelled; callers time out, are cancelled
and let their loops end. It goes in rounds: after each, nothing may be in flight, the counters must add up to the
requests that were made, and what was made must be freed; the first round warms up, and memory may not grow after it.
Exits with 1 and says what was wrong if anything was. A hang is a failure, too: all stacks are shown.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import faulthandler
import gc
import inspect
import logging
import math
import os
import random
import resource
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

from llm_batch_coalesce import (
    AsyncBatchCoalescer,
    BatchCoalescer,
    CallResultError,
    DeadlockError,
    Outcome,
    RecursiveCallError,
    Retain,
    _core,
)

THREADS, LOOPS, TASKS = 16, 4, 24
KEYS = 12
DEEPEST = 3
# Half of the loops end so often, cancelling all that runs on them, and begin anew.
LIFE_OF_A_LOOP = 0.3
# A round without a single request for so long is a hang, and so is one that does not end.
PATIENCE = 20.0
# The shards of a map: what `max_retained` may be exceeded by.
SHARDS = min(64, 1 << (2 * (os.cpu_count() or 1) - 1).bit_length())
# What may be used more at the end than after the first round, in bytes and in Python's blocks.
RSS_SLACK, BLOCKS_SLACK = 24 << 20, 4_000


class Problems:
    """What was wrong; the first of it ends the hammer."""

    def __init__(self):
        self.found = Counter()

    def note(self, text):
        self.found[text] += 1

    def __bool__(self):
        return bool(self.found)


problems = Problems()


class Key:
    """Hashed and compared in Python; no two requests use the same object."""

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        return hash(self.number)

    def __eq__(self, other):
        return isinstance(other, Key) and self.number == other.number


class BrokenKey:
    def __hash__(self):
        raise ZeroDivisionError


class Value:
    """Tells whose it is."""

    __slots__ = ("arena", "number")

    def __init__(self, arena, number):
        self.arena, self.number = arena, number


class SharedError(Exception):
    """The same for errors; everybody but the leader gets a copy of their own."""

    def __init__(self, arena, number, ttl):
        super().__init__(arena, number)
        self.arena, self.number, self.ttl = arena, number, ttl
        self.seen = False


class PrivateError(Exception):
    """One of the private errors."""


class Abort(BaseException):
    """No `Exception`, but nothing that ends a loop."""


# What a thread's call raises for its leader alone.
FOR_THE_LEADER = (
    PrivateError,
    Abort,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    concurrent.futures.CancelledError,
    asyncio.CancelledError,
)


class Arena:
    """A coalescer with all its faces."""

    def __init__(self, name, base, most=math.inf):
        self.name, self.base, self.most = name, base, most
        if isinstance(base, BatchCoalescer):
            self.sync, self.tasks = base, [base.as_async(), base.as_async(on_abandoned="finish")]
        else:
            self.sync = base.as_sync()
            self.tasks = [base, self.sync.as_async(on_abandoned="finish")]
        self.total = Counter()
        self.calls_without_run = 0

    def key(self, number):
        return (number, f"key {number}", ("key", number), Key(number))[number % 4]


def make_arenas():
    return [
        Arena(
            "short TTL",
            BatchCoalescer(
                0.01, error_ttl_seconds=lambda error: error.ttl, private_errors=PrivateError, max_retained=8, name="a"
            ),
            8,
        ),
        Arena("no TTL", BatchCoalescer(0, private_errors=(PrivateError,), max_flight_seconds=0.003)),
        Arena(
            "at most 3", BatchCoalescer(math.inf, error_ttl_seconds=0, private_errors=PrivateError, max_retained=3), 3
        ),
        Arena("async", AsyncBatchCoalescer(0.05, private_errors=PrivateError, on_abandoned="cancel")),
        Arena("async, over age", AsyncBatchCoalescer(0.002, private_errors=PrivateError, max_flight_seconds=0.001)),
    ]


class Request:
    """One request, and what became of its callable."""

    __slots__ = ("arena", "in_task", "number", "raised", "ran", "timeout", "ttl")

    def __init__(self, rng, arena, in_task, timeouts):
        self.arena, self.in_task = arena, in_task
        # Most ask for few keys.
        self.number = min(rng.randrange(KEYS), rng.randrange(KEYS))
        self.timeout = rng.choice(timeouts)
        self.ttl = rng.choice((None, None, None, 0, 0.001, 0.02))
        self.ran, self.raised = False, None

    def value(self):
        return Value(self.arena.name, self.number)

    def shared_error(self, ttl=None):
        return SharedError(self.arena.name, self.number, ttl)

    def check(self, got, detailed):
        if detailed:
            role, got = got.role, got.value
            if (role == "leader") != self.ran:
                problems.note(f"role {role!r} of a request whose callable was {'' if self.ran else 'not '}run")
        if type(got) is not Value or (got.arena, got.number) != (self.arena.name, self.number):
            problems.note(f"a foreign result: {got!r}")

    def check_error(self, error):
        """Look at an error that this request got. False if it was refused and is no request at all."""
        if isinstance(error, (RecursiveCallError, DeadlockError)):
            if self.ran:
                problems.note(f"{type(error).__name__} after the callable was run")
            return False
        if isinstance(error, SharedError):
            self.check_shared(error)
        elif (self.raised is None or error is not self.raised) and not self.may_get(error):
            problems.note(f"an error that is not its own: {error!r}")
        return True

    def check_shared(self, error):
        if (error.arena, error.number) != (self.arena.name, self.number):
            problems.note(f"a foreign error: {error!r}")
        if self.ran and error is not self.raised:
            problems.note("a leader got a copy of its own error")
        if error.seen:
            problems.note("two callers got the same error object")
        error.seen = True

    def may_get(self, error):
        """Whether it is an error of the coalescer's that this request can have got."""
        if isinstance(error, TimeoutError):
            return self.timeout is not None
        if self.in_task:
            return isinstance(error, (asyncio.CancelledError, CallResultError))
        if isinstance(error, concurrent.futures.CancelledError):
            return not self.ran
        return isinstance(error, CallResultError)


class Worker:
    """What threads and loops have in common: choosing, counting, and all that does not wait."""

    def __init__(self, seed, arenas, stop):
        self.rng = random.Random(seed)
        self.arenas, self.stop = arenas, stop
        self.tallies = {arena: Counter() for arena in arenas}
        self.requests = 0
        # Calls of tasks that were cut off before they had begun.
        self.never_run = 0

    def control(self):
        arena = self.rng.choice(self.arenas)
        base = self.rng.choice((arena.base, arena.sync, *arena.tasks))
        self.rng.choice(CONTROLS)(self, arena, base, self.rng.randrange(KEYS))

    def forget(self, arena, base, number):
        base.forget(arena.key(number))

    def cancel(self, arena, base, number):
        base.cancel(arena.key(number))

    def put(self, arena, base, number):
        base.put(arena.key(number), Value(arena.name, number), self.rng.choice((None, 0, 0.001, 0.02)))

    def peek(self, arena, base, number):
        value = base.peek(arena.key(number))
        if value is not None and (value.arena, value.number) != (arena.name, number):
            problems.note(f"a foreign result of peek: {value!r}")

    def clear(self, arena, base, number):
        base.clear()

    def look(self, arena, base, number):
        stats = base.stats()
        if not 0 <= stats.in_flight <= 100_000:
            problems.note(f"in_flight was {stats.in_flight}")
        for flight in base.flights():
            if flight.age_seconds < 0 or not 0 <= flight.waiters <= 100_000:
                problems.note(f"a strange flight: {flight!r}")
        if not isinstance(arena.key(number) in base, bool) or len(base) > 100_000:
            problems.note(f"strange keys: {base!r}")

    def advance(self, arena, base, number):
        _core._advance_clock(0.005)

    def be_refused(self, arena, base, number):
        key, ask = arena.key(number), arena.sync.get_or_call
        for error, asked, options in (
            (TypeError, [], {}),
            (ZeroDivisionError, BrokenKey(), {}),
            (ValueError, key, {"timeout": -1}),
            (TypeError, key, {"ttl_seconds": True}),
        ):
            try:
                ask(asked, int, **options)
            except error:
                continue
            problems.note(f"{asked!r} with {options} was not refused")

    # Threads.

    def ask(self, depth=0, timeouts=(None, None, None, 0, 0.001, 0.01, 5.0)):
        rng = self.rng
        request = Request(rng, rng.choice(self.arenas), False, timeouts)
        tally = self.tallies[request.arena]
        detailed = rng.random() < 0.2
        method = request.arena.sync.outcome if detailed else request.arena.sync.get_or_call
        self.requests += 1
        tally["requests"] += 1
        try:
            got = method(
                request.arena.key(request.number),
                lambda: self.call(request, tally, depth),
                timeout=request.timeout,
                ttl_seconds=request.ttl,
            )
        except BaseException as error:
            if not request.check_error(error):
                tally["requests"] -= 1
                tally["refused"] += 1
            return error
        request.check(got, detailed)
        return None

    def call(self, request, tally, depth):
        request.ran = True
        tally["run"] += 1
        return self.rng.choice(CALLS)(self, request, tally, depth)

    def answer(self, request, tally, depth):
        return request.value()

    def answer_late(self, request, tally, depth):
        time.sleep(self.rng.random() * 0.002)
        return request.value()

    def answer_retained(self, request, tally, depth):
        return Retain(request.value(), self.rng.choice((0, 0.001, 0.03)))

    def ask_on(self, request, tally, depth):
        inner = self.ask(depth + 1) if depth < DEEPEST else None
        if inner is None or self.rng.random() < 0.7:
            return request.value()
        return self.fail(request, tally, request.shared_error(), inner)

    def fail_for_all(self, request, tally, depth):
        ttl = self.rng.choice((None, 0, 0.001, 0.02, "nonsense"))
        return self.fail(request, tally, request.shared_error(ttl))

    def fail_for_one(self, request, tally, depth):
        return self.fail(request, tally, self.rng.choice(FOR_THE_LEADER)())

    def be_wrong(self, request, tally, depth):
        tally["failed"] += 1
        return asyncio.sleep(0)

    def fail(self, request, tally, error, cause=None):
        tally["failed"] += 1
        request.raised = error
        try:
            raise error from cause
        finally:
            del error, cause

    def run_thread(self):
        while not self.stop.is_set():
            if self.rng.random() < 0.8:
                self.ask()
            else:
                self.control()


def weighted(**weights):
    """Names of `Worker`'s methods, each as often as it is to be chosen."""
    return [getattr(Worker, name) for name, weight in weights.items() for _ in range(weight)]


CONTROLS = weighted(forget=4, cancel=4, put=3, peek=3, clear=1, look=2, be_refused=1, advance=1)
CALLS = weighted(answer=30, answer_late=30, answer_retained=8, ask_on=15, fail_for_all=7, fail_for_one=8, be_wrong=2)


class LoopWorker(Worker):
    """An event loop with its tasks."""

    def __init__(self, seed, arenas, stop, ends_abruptly):
        super().__init__(seed, arenas, stop)
        self.ends_abruptly = ends_abruptly
        self.calls = set()
        self.loop = None

    def run_thread(self):
        while not self.stop.is_set():
            asyncio.run(self.run_tasks())

    async def run_tasks(self):
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.handle)
        workers = [asyncio.create_task(self.run_task(), name=f"worker {number}") for number in range(TASKS)]
        if self.ends_abruptly:
            await asyncio.wait(workers, timeout=LIFE_OF_A_LOOP, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.wait(workers)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            if self.ends_abruptly:
                for task in others:
                    self.never_run += is_new_call(task)
                    task.cancel()
            # Calls that nobody waits for may be under way.
            await asyncio.wait(others, timeout=0.1)

    def handle(self, loop, context):
        error = context.get("exception")
        # It is raised on in the call's task if its caller has gone.
        if type(error) is not Abort:
            problems.note(f"the loop's exception handler got {context['message']}: {error!r}")

    async def run_task(self):
        rng = self.rng
        while not self.stop.is_set():
            what = rng.random()
            if what < 0.78:
                task = self.loop.create_task(self.ask_in_task())
                if what < 0.2:
                    self.loop.call_later(rng.random() * 0.003, task.cancel)
                await asyncio.wait([task])
            elif what < 0.93:
                self.control()
            elif what < 0.97:
                if self.calls:
                    rng.choice(list(self.calls)).cancel()
            elif what < 0.975:
                # It blocks the loop.
                self.ask(timeouts=(None, 0.002))
            await asyncio.sleep(0)

    async def ask_in_task(self, depth=0):
        rng = self.rng
        request = Request(rng, rng.choice(self.arenas), True, (None, None, None, 0, 0.001, 0.01, 5.0))
        tally = self.tallies[request.arena]
        detailed = rng.random() < 0.2
        face = rng.choice(request.arena.tasks)
        method = face.outcome if detailed else face.get_or_call
        self.requests += 1
        tally["requests"] += 1
        try:
            got = await method(
                request.arena.key(request.number),
                lambda: self.call_in_task(request, tally, depth),
                timeout=request.timeout,
                ttl_seconds=request.ttl,
            )
        except BaseException as error:
            if not request.check_error(error):
                tally["requests"] -= 1
                tally["refused"] += 1
            if isinstance(error, asyncio.CancelledError):
                raise
            return error
        request.check(got, detailed)
        return None

    def call_in_task(self, request, tally, depth):
        request.ran = True
        tally["run"] += 1
        if self.rng.random() < 0.02:
            tally["failed"] += 1
            return 3
        return self.called(request, tally, depth)

    async def called(self, request, tally, depth):
        if self.rng.random() < 0.05:
            # At once, so that its caller is there and gets it: else it would end the loop.
            return self.fail(request, tally, self.rng.choice((SystemExit, KeyboardInterrupt))())
        task = asyncio.current_task()
        self.calls.add(task)
        try:
            await self.rng.choice(BEFORE)(self.rng)
            return await self.rng.choice(CALLS_IN_TASKS)(self, request, tally, depth)
        finally:
            self.calls.discard(task)

    async def answer_in_task(self, request, tally, depth):
        return request.value()

    async def answer_retained_in_task(self, request, tally, depth):
        return self.answer_retained(request, tally, depth)

    async def ask_on_in_task(self, request, tally, depth):
        inner = await self.ask_in_task(depth + 1) if depth < DEEPEST else None
        if inner is None or self.rng.random() < 0.7:
            return request.value()
        return self.fail(request, tally, request.shared_error(), inner)

    async def fail_for_all_in_task(self, request, tally, depth):
        return self.fail_for_all(request, tally, depth)

    async def fail_for_one_in_task(self, request, tally, depth):
        return self.fail(request, tally, self.rng.choice((PrivateError, Abort))())

    async def cancel_itself(self, request, tally, depth):
        raise asyncio.CancelledError


def is_new_call(task):
    """Before Python 3.12 a call's task begins after its caller has led, and may be cancelled in between."""
    call = task.get_coro()
    return call.__qualname__ == "_call" and inspect.getcoroutinestate(call) == inspect.CORO_CREATED


async def nothing(rng):
    pass


async def one_round(rng):
    await asyncio.sleep(0)


async def a_while(rng):
    await asyncio.sleep(rng.random() * 0.002)


BEFORE = (nothing, one_round, a_while, a_while)
CALLS_IN_TASKS = [
    *[LoopWorker.answer_in_task] * 55,
    *[LoopWorker.answer_retained_in_task] * 8,
    *[LoopWorker.ask_on_in_task] * 16,
    *[LoopWorker.fail_for_all_in_task] * 9,
    *[LoopWorker.fail_for_one_in_task] * 8,
    *[LoopWorker.cancel_itself] * 4,
]


class Hammer:
    def __init__(self, seconds, seed):
        self.seconds, self.seed = seconds, seed
        self.arenas = make_arenas()
        self.began = time.monotonic()
        self.done = 0
        self.workers = []
        self.show = Show()

    def run(self):
        warm_up = max(1.0, self.seconds / 6)
        rest = max(0.0, self.seconds - warm_up)
        rounds = max(1, round(rest / 10))
        usage = []
        for number, length in enumerate([warm_up] + [rest / rounds] * rounds):
            if not problems:
                self.round(number, length)
                usage.append(self.after_round())
        if not problems:
            self.compare(usage)
        return usage

    def round(self, number, seconds):
        stop = threading.Event()
        self.workers = [Worker(f"{self.seed} {number} {n}", self.arenas, stop) for n in range(THREADS)]
        self.workers += [LoopWorker(f"{self.seed} {number} loop {n}", self.arenas, stop, n < 2) for n in range(LOOPS)]
        threads = [
            threading.Thread(target=worker.run_thread, name=f"{type(worker).__name__} {n}", daemon=True)
            for n, worker in enumerate(self.workers)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        requests, since = 0, time.monotonic()
        while time.monotonic() < end and not problems:
            time.sleep(min(0.1, seconds / 10))
            now = sum(worker.requests for worker in self.workers)
            if now > requests:
                requests, since = now, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                self.hang("no request is made any more")
            self.show.progress(self, self.done + now)
        stop.set()
        deadline = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self.hang(f"{thread.name} does not end")
        self.done += sum(worker.requests for worker in self.workers)

    def after_round(self):
        """Check that all is as if nothing had happened; what is in use now."""
        for arena in self.arenas:
            tally = Counter()
            for worker in self.workers:
                tally.update(worker.tallies[arena])
            self.check_counters(arena, tally)
            arena.base.clear()
            arena.base.reset_stats()
            # The sweeper may be about to count what it has just dropped.
            if not soon(lambda arena=arena: arena.base.stats().retained == len(arena.base) == 0):
                problems.note(f"{arena.name}: after clear() {arena.base!r} with {len(arena.base)} keys")
        never_run = sum(worker.never_run for worker in self.workers)
        unexplained = sum(arena.calls_without_run for arena in self.arenas)
        if unexplained != never_run or any(arena.calls_without_run < 0 for arena in self.arenas):
            problems.note(f"{unexplained:,} calls were counted and not run, of which {never_run:,} were cut off")
        self.workers = []
        self.check_freed()
        alive = [thread.name for thread in threading.enumerate() if type(thread) is threading.Thread]
        if alive:
            problems.note(f"threads are left: {alive}")
        return in_use()

    def check_counters(self, arena, tally):
        stats = arena.base.stats()
        flights = arena.base.flights()

        def same(what, got, expected):
            if got != expected:
                problems.note(f"{arena.name}: {what} are {got:,} and not {expected:,}")

        same("flights", len(flights), 0)
        same("flights by the counter", stats.in_flight, 0)
        counted = stats.calls + stats.joined + stats.hits + stats.timeouts + stats.cancelled
        same("requests by the counters", counted, tally["requests"])
        arena.calls_without_run = stats.calls - tally["run"]
        same("errors", stats.errors, tally["failed"])
        if stats.retained > arena.most + SHARDS:
            problems.note(f"{arena.name}: {stats.retained} outcomes are retained")
        arena.total.update(tally)
        names = ("calls", "joined", "hits", "timeouts", "cancelled", "errors", "handed_over", "evicted")
        arena.total.update({name: getattr(stats, name) for name in names})

    def check_freed(self):
        # The sweeper may be about to drop the last of it.
        if not soon(lambda: not left_over()):
            problems.note(f"not freed: {dict(left_over())}")

    def compare(self, usage):
        first, last = usage[0], usage[-1]
        for what, slack in (("rss", RSS_SLACK), ("blocks", BLOCKS_SLACK)):
            if last[what] - first[what] > slack:
                problems.note(f"{what} in use after each round: {', '.join(f'{used[what]:,}' for used in usage)}")

    def hang(self, what):
        self.show.line(f"HANG: {what} (seed {self.seed})", sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        for worker in self.workers:
            loop = getattr(worker, "loop", None)
            if loop is not None:
                for task in asyncio.all_tasks(loop):
                    task.print_stack(file=sys.stderr)
        for arena in self.arenas:
            for flight in arena.base.flights():
                say(f"{arena.name}: {flight}", sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def soon(condition):
    """Whether it comes to hold."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def in_use():
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return {"rss": pages * resource.getpagesize(), "blocks": sys.getallocatedblocks()}


def left_over():
    gc.collect()
    ours = {Value, Key, Request, SharedError, PrivateError, Abort, Outcome, _core.Ticket, _core.Token, asyncio.Task}
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in ours)


CLEAR_LINE = "\r\x1b[2K"


def say(text, file=None, end="\n"):
    print(text, file=file, end=end, flush=True)


class Show:
    """Progress on a line of its own that is written over, or on lines now and then; a table at the end."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.next_at = 0.0

    def progress(self, hammer, requests):
        now = time.monotonic()
        if now < self.next_at:
            return
        self.next_at = now + (0.2 if self.live else 5.0)
        passed = now - hammer.began
        in_flight = sum(arena.base.stats().in_flight for arena in hammer.arenas)
        text = f"{passed:5.1f} of {hammer.seconds:g} s  {requests:>11,} requests  {in_flight:>4} in flight"
        say(f"{CLEAR_LINE}{text}" if self.live else text, end="" if self.live else "\n")

    def line(self, text, file=None):
        if self.live:
            say(CLEAR_LINE, end="")
        say(text, file)

    def table(self, arenas):
        names = ["requests", "calls", "joined", "hits", "timeouts", "cancelled", "refused", "errors", "handed_over"]
        names.append("evicted")
        self.line(f"{'coalescer':<16}" + "".join(f"{name.replace('_', ' '):>12}" for name in names))
        for arena in arenas:
            self.line(f"{arena.name:<16}" + "".join(f"{arena.total[name]:>12,}" for name in names))


def be_strict():
    """Whatever Python reports of its own accord is a problem."""
    warnings.simplefilter("error")

    def unraisable(event):
        problems.note(f"unraisable in {event.object!r}: {event.exc_value!r}")

    def uncaught(event):
        problems.note(f"uncaught in {event.thread.name}: {event.exc_value!r}")

    sys.unraisablehook, threading.excepthook = unraisable, uncaught

    class Log(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            expected = "has been under way" in message or "error_ttl_seconds failed" in message
            if not expected:
                problems.note(f"logged: {message}")

    logging.basicConfig(handlers=[Log()], level=logging.WARNING)
    # More changes of thread than usual, where there is a GIL.
    sys.setswitchinterval(0.0005)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (60)")
    parser.add_argument("--seed", type=int, default=None, help="of the random choices; threads still run as they like")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    say(f"hammer: {THREADS} threads, {LOOPS} loops of {TASKS} tasks, {options.seconds:g} s, seed {seed}")
    # For hangs in which not even the main thread gets on.
    faulthandler.dump_traceback_later(2 * options.seconds + 6 * PATIENCE, exit=True)
    be_strict()
    hammer = Hammer(options.seconds, seed)
    usage = hammer.run()
    faulthandler.cancel_dump_traceback_later()
    show = hammer.show
    show.table(hammer.arenas)
    show.line("memory after each round, MiB:    " + "".join(f"{used['rss'] / (1 << 20):>9.1f}" for used in usage))
    show.line("memory after each round, blocks: " + "".join(f"{used['blocks']:>9,}" for used in usage))
    if problems:
        for text, times in problems.found.most_common(20):
            show.line(f"FAILED: {text}" + (f" ({times:,} times)" if times > 1 else ""), sys.stderr)
        show.line(f"seed {seed}", sys.stderr)
        return 1
    show.line(f"all as it should be: {hammer.done:,} requests in {time.monotonic() - hammer.began:.1f} s")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())

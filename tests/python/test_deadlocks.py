"""Calls that wait for each other in a circle: one of them is told, the others get their values. Nobody else is told."""

import asyncio
import random

import pytest
from faces import AskedInThread, HeldInThread, refused
from loops import PATIENCE, HeldCall, LoopThread, wait_for_waiters

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer, DeadlockError, RecursiveCallError


class Stop(BaseException):
    """For the leader alone; the next waiter leads."""


@pytest.fixture
def coalescer():
    return BatchCoalescer(ttl_seconds=60)


@pytest.fixture
def loops():
    made = []

    def make(count):
        made.extend(LoopThread() for _ in range(count))
        return made[-count:]

    yield make
    for loop in made:
        loop.end()


@pytest.fixture
def thread():
    """Runs a function in a thread; call what it returns for the result."""
    return lambda work: AskedInThread(work, None).result


def result_of(ask):
    try:
        return ask()
    except DeadlockError as error:
        return error


def nested(coalescer, key, *others):
    """Ask for a key whose call asks for the next one, and so on; nobody may make the last one's call."""
    return coalescer.get_or_call(key, (lambda: nested(coalescer, *others)) if others else refused)


# Circles.


def all_threads(size, loops):
    return [None] * size


def tasks_of_one_loop(size, loops):
    return loops(1) * size


def tasks_of_several_loops(size, loops):
    return loops(size)


def threads_and_tasks(size, loops):
    (loop, other), places = loops(2), []
    while len(places) < size:
        places += [None, loop, None, other, loop]
    return places[:size]


@pytest.mark.parametrize("homes", [1, 2], ids=["one coalescer", "two coalescers"])
@pytest.mark.parametrize("size", range(2, 9))
@pytest.mark.parametrize("kind", [all_threads, tasks_of_one_loop, tasks_of_several_loops, threads_and_tasks])
def test_in_a_ring_of_calls_exactly_one_is_told_and_the_others_get_their_values(kind, size, homes, loops, thread):
    """Member i leads key i, and in that call it asks for key i + 1."""
    coalescers = [BatchCoalescer(ttl_seconds=60) for _ in range(homes)]
    faces = [(each, each.as_async()) for each in coalescers]
    places = kind(size, loops)
    held = [HeldInThread() if place is None else HeldCall() for place in places]

    def lead_in_thread(member):
        following = (member + 1) % size

        def call():
            held[member]()
            return member, faces[following % homes][0].get_or_call(following, lambda: "taken over")

        return faces[member % homes][0].get_or_call(member, call)

    async def lead_in_task(member):
        following = (member + 1) % size

        async def take_over():
            return "taken over"

        async def call():
            await held[member]()
            return member, await faces[following % homes][1].get_or_call(following, take_over)

        return await faces[member % homes][1].get_or_call(member, call)

    def lead(member):
        if places[member] is None:
            return thread(lambda: lead_in_thread(member))
        return places[member].start(lead_in_task(member)).result

    asked = [lead(member) for member in range(size)]
    assert all(each.started.wait(PATIENCE) for each in held)
    for each in held:
        each.release()
    results = [result_of(ask) for ask in asked]
    told = [member for member, result in enumerate(results) if isinstance(result, DeadlockError)]
    assert len(told) == 1
    # The one before it takes over its key, and so on backwards round the ring.
    expected = "taken over"
    for step in range(1, size):
        member = (told[0] - step) % size
        expected = (member, expected)
        assert results[member] == expected
    stats = [each.stats() for each in coalescers]
    assert sum(each.calls for each in stats) == size + 1
    assert sum(each.saved for each in stats) == size - 2
    assert sum(each.handed_over for each in stats) == 1
    assert sum(each.in_flight for each in stats) == 0


def in_a_pair(coalescer, thread, asking):
    """The call of "a" waits for "b", whose call, when it is released, does `asking`."""
    held = HeldInThread()

    def call_b():
        held()
        return asking()

    b = thread(lambda: coalescer.get_or_call("b", call_b))
    assert held.started.wait(PATIENCE)
    a = thread(lambda: coalescer.get_or_call("a", lambda: coalescer.get_or_call("b", lambda: "taken over")))
    wait_for_waiters(coalescer, "b", 1)
    return a, b, held


def test_the_error_is_private(coalescer, thread):
    """Those who wait for the call that is told do not share it, and it is not retained."""
    a, b, held = in_a_pair(coalescer, thread, lambda: coalescer.get_or_call("a", refused))
    other = thread(lambda: coalescer.get_or_call("b", refused))
    wait_for_waiters(coalescer, "b", 2)
    held.release()
    with pytest.raises(DeadlockError, match="'a'"):
        b()
    assert a() == other() == "taken over"
    assert coalescer.get_or_call("b", refused) == "taken over"
    assert issubclass(DeadlockError, RuntimeError)


def test_the_callable_may_go_on_after_it_was_told(coalescer, thread):
    def asking():
        with pytest.raises(DeadlockError):
            coalescer.get_or_call("a", refused)
        return "without"

    a, b, held = in_a_pair(coalescer, thread, asking)
    held.release()
    assert a() == b() == "without"


def test_a_circle_through_who_took_over_is_seen(coalescer, thread):
    """The call of "a" takes over "b", for which "c" waits, and there it asks for "c"."""
    held = HeldInThread(error=Stop())
    first = thread(lambda: coalescer.get_or_call("b", held))
    assert held.started.wait(PATIENCE)
    a = thread(lambda: nested(coalescer, "a", "b", "c"))
    wait_for_waiters(coalescer, "b", 1)
    c = thread(lambda: coalescer.get_or_call("c", lambda: coalescer.get_or_call("b", lambda: "c's")))
    wait_for_waiters(coalescer, "b", 2)
    held.release()
    with pytest.raises(Stop):
        first()
    with pytest.raises(DeadlockError, match="'c'"):
        a()
    assert c() == "c's"


def test_a_call_that_took_over_and_asks_for_its_own_outer_key_is_told(coalescer, thread):
    held = HeldInThread(error=Stop())
    first = thread(lambda: coalescer.get_or_call("b", held))
    assert held.started.wait(PATIENCE)
    a = thread(lambda: nested(coalescer, "a", "b", "a"))
    wait_for_waiters(coalescer, "b", 1)
    held.release()
    with pytest.raises(Stop):
        first()
    with pytest.raises(RecursiveCallError):
        a()
    assert len(coalescer) == 0


def test_a_circle_through_one_of_several_waits_of_a_call_is_seen(loops):
    """The call of "a" waits for "x" and "b" at once; "b" asks for "a"."""
    coalescer, (loop,) = AsyncBatchCoalescer(ttl_seconds=60), loops(1)
    x, b = HeldCall("x's"), HeldCall()

    async def call_a():
        return await asyncio.gather(*(coalescer.get_or_call(key, taken_over) for key in ("x", "b")))

    async def call_b():
        await b()
        return await coalescer.get_or_call("a", taken_over)

    async def taken_over():
        return "taken over"

    asked = [loop.start(coalescer.get_or_call(key, fn)) for key, fn in (("x", x), ("b", call_b), ("a", call_a))]
    wait_for_waiters(coalescer, "b", 1)
    b.release()
    with pytest.raises(DeadlockError):
        asked[1].result()
    x.release()
    assert asked[2].result() == ["x's", "taken over"]


# No false alarm.


def test_a_diamond_of_waits_is_no_circle(coalescer, thread):
    """Two calls wait for the same, and a third one for both of them."""
    d = HeldInThread("d's")
    asked = [thread(lambda: coalescer.get_or_call("d", d))]
    assert d.started.wait(PATIENCE)
    asked += [
        thread(lambda key=key: coalescer.get_or_call(key, lambda: coalescer.get_or_call("d", refused))) for key in "bc"
    ]
    wait_for_waiters(coalescer, "d", 2)

    def call_a():
        return coalescer.get_or_call("b", refused), coalescer.get_or_call("c", refused)

    asked.append(thread(lambda: coalescer.get_or_call("a", call_a)))
    wait_for_waiters(coalescer, "b", 1)
    d.release()
    assert [each() for each in asked] == ["d's", "d's", "d's", ("d's", "d's")]


def test_a_diamond_of_tasks_that_wait_for_two_at_once_is_no_circle(loops):
    coalescer, (loop, other) = AsyncBatchCoalescer(ttl_seconds=60), loops(2)
    d = HeldCall("d's")
    asked = [loop.start(coalescer.get_or_call("d", d))]
    assert d.started.wait(PATIENCE)
    for key, place in (("b", loop), ("c", other)):
        asked.append(place.start(coalescer.get_or_call(key, lambda: coalescer.get_or_call("d", refused))))
    wait_for_waiters(coalescer, "d", 2)

    async def call_a():
        return await asyncio.gather(*(coalescer.get_or_call(key, refused) for key in ("b", "c", "b")))

    asked.append(loop.start(coalescer.get_or_call("a", call_a)))
    wait_for_waiters(coalescer, "b", 2)
    d.release()
    assert [each.result() for each in asked] == ["d's", "d's", "d's", ["d's"] * 3]


def test_a_chain_of_waits_is_no_circle(coalescer, thread):
    held = HeldInThread("value")
    asked = [thread(lambda: coalescer.get_or_call(0, held))]
    assert held.started.wait(PATIENCE)
    for key in range(1, 9):
        call = lambda key=key: coalescer.get_or_call(key - 1, refused)  # noqa: E731
        asked.append(thread(lambda key=key, call=call: coalescer.get_or_call(key, call)))
        wait_for_waiters(coalescer, key - 1, 1)
    held.release()
    assert [each() for each in asked] == ["value"] * 9


def test_a_wait_that_is_over_is_no_part_of_a_circle(thread):
    """The call of "a" has waited for "b", and goes on; the next call of "b" waits for "a"."""
    coalescer, held, b = BatchCoalescer(ttl_seconds=0), HeldInThread("a's"), HeldInThread("b's")

    def call_a():
        assert coalescer.get_or_call("b", refused) == "b's"
        return held()

    first = thread(lambda: coalescer.get_or_call("b", b))
    assert b.started.wait(PATIENCE)
    a = thread(lambda: coalescer.get_or_call("a", call_a))
    wait_for_waiters(coalescer, "b", 1)
    b.release()
    assert held.started.wait(PATIENCE)
    second = thread(lambda: coalescer.get_or_call("b", lambda: coalescer.get_or_call("a", refused)))
    wait_for_waiters(coalescer, "a", 1)
    held.release()
    assert [first(), a(), second()] == ["b's", "a's", "a's"]


@pytest.mark.parametrize("bounded", ["the first", "the last"])
def test_a_wait_with_a_timeout_is_no_part_of_a_circle(coalescer, thread, bounded):
    held, limits = HeldInThread(), {bounded: PATIENCE}

    def call_a():
        try:
            return coalescer.get_or_call("b", refused, timeout=limits.get("the first"))
        except BaseException as error:
            return type(error).__name__

    def call_b():
        held()
        try:
            return coalescer.get_or_call("a", refused, timeout=limits.get("the last"))
        except BaseException as error:
            return type(error).__name__

    b = thread(lambda: coalescer.get_or_call("b", call_b))
    assert held.started.wait(PATIENCE)
    a = thread(lambda: coalescer.get_or_call("a", call_a))
    wait_for_waiters(coalescer, "b", 1)
    held.release()
    # They do wait for each other, until somebody ends it.
    wait_for_waiters(coalescer, "a", 1)
    assert coalescer.cancel("b")
    assert a() == "CancelledError"
    assert b() == "CancelledError"


# At random.


def value_of(result):
    if isinstance(result, BaseException):
        raise result
    return result


def run_at_random(seed, circles, crew, loops):
    """Threads and tasks of two loops ask for keys whose calls ask for higher ones, or for any; all that came of it."""
    threads, keys = BatchCoalescer(ttl_seconds=0), 12
    tasks, places = threads.as_async(), loops(2)

    def chosen(key, salt):
        numbers = random.Random(f"{seed} {key} {salt}")
        others = numbers.sample(range(key + 1, keys), min(keys - key - 1, 2))
        return [*others, numbers.randrange(keys)] if numbers.random() < circles else others

    def ask(key, salt):
        return threads.get_or_call(key, lambda: key + sum(ask(other, salt) for other in chosen(key, salt)))

    async def ask_in_task(key, salt):
        async def call():
            await asyncio.sleep(0)
            asked = (ask_in_task(other, salt) for other in chosen(key, salt))
            return key + sum(map(value_of, await asyncio.gather(*asked, return_exceptions=True)))

        return await tasks.get_or_call(key, call)

    async def many(salt):
        numbers = random.Random(f"{seed} task {salt}")
        asked = (ask_in_task(numbers.randrange(keys), salt) for _ in range(30))
        return await asyncio.gather(*asked, return_exceptions=True)

    def work(number):
        numbers, results = random.Random(f"{seed} thread {number}"), []
        for _ in range(30):
            try:
                results.append(ask(numbers.randrange(keys), number))
            except (DeadlockError, RecursiveCallError) as error:
                results.append(error)
        return results

    asked = [place.start(many(number)) for number, place in enumerate(places * 2)]
    results = crew.start(4, work).join() + [each.result() for each in asked]
    assert threads.stats().in_flight == len(threads) == 0
    return [result for some in results for result in some]


def test_random_waits_without_a_circle_raise_no_alarm(crews, loops):
    for seed in range(15):
        results = run_at_random(seed, 0, crews(), loops)
        assert [result for result in results if not isinstance(result, int)] == []


def test_random_waits_with_circles_all_end(crews, loops):
    kinds = set()
    for seed in range(15):
        kinds |= {type(result) for result in run_at_random(seed, 0.05, crews(), loops)}
    assert kinds == {int, DeadlockError, RecursiveCallError}

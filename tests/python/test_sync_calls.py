"""What callers in threads get: values, errors of their own, the lead when a leader is lost."""

import concurrent.futures
import signal
import subprocess
import sys
import threading
import traceback

import pytest

from llm_batch_coalesce import BatchCoalescer, CallResultError, RecursiveCallError, _core


class Held:
    """A callable that is held inside its call until `release`, so that others can join."""

    def __init__(self, result=None, error=None):
        self.result, self.error = result, error
        self.calls = 0
        self.entered = threading.Event()
        self.released = threading.Event()

    def __call__(self):
        self.calls += 1
        self.entered.set()
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return self.result


def joined_by(coalescer, crews, held, waiters):
    """Start a leader that is held, and waiters that have joined it; their crews."""
    leader = crews().start(1, lambda _: coalescer.get_or_call("k", held))
    assert held.entered.wait(30)
    others = crews().start(waiters, lambda _: coalescer.get_or_call("k", held))
    wait_for_waiters(coalescer, "k", waiters)
    return leader, others


def wait_for_waiters(coalescer, key, count):
    """Return when so many callers have joined."""
    pause = threading.Event()
    for _ in range(3_000):
        if coalescer._waiters(key) == count:
            return
        pause.wait(0.01)
    pytest.fail(f"fewer than {count} threads wait for {key!r} in {coalescer!r}")


def test_fifty_callers_share_one_call_and_the_very_object(crews):
    coalescer = BatchCoalescer(ttl_seconds=0)
    held = Held(result=object())
    leader, waiters = joined_by(coalescer, crews, held, 50)
    held.released.set()
    results = leader.join() + waiters.join()
    assert held.calls == 1
    assert all(result is held.result for result in results)
    assert "calls=1 joined=50" in repr(coalescer)


def test_every_waiter_gets_a_copy_of_the_error_and_the_leader_the_original(crews):
    coalescer = BatchCoalescer(error_ttl_seconds=0)
    original = ValueError("no such model")
    held = Held(error=original)

    def caught(_):
        with pytest.raises(ValueError, match="no such model") as info:
            coalescer.get_or_call("k", held)
        return info.value

    leader = crews().start(1, caught)
    assert held.entered.wait(30)
    waiters = crews().start(8, caught)
    wait_for_waiters(coalescer, "k", 8)
    held.released.set()
    assert leader.join() == [original]
    copies = waiters.join()
    assert len({id(error) for error in [original, *copies]}) == 9
    for error in copies:
        assert type(error) is ValueError
        assert "test_sync_calls.py" in error.__notes__[0]
        # The waiter's own frames and no others: not the leader's.
        assert [frame.name for frame in traceback.extract_tb(error.__traceback__)] == ["caught"]


@pytest.mark.parametrize(
    ("error_ttl", "calls_after_a_second", "calls_after_ten"), [(None, 1, 2), (0, 2, 3), (2, 1, 2), (float("inf"), 1, 1)]
)
def test_errors_are_retained_for_error_ttl_seconds(error_ttl, calls_after_a_second, calls_after_ten):
    coalescer = BatchCoalescer(ttl_seconds=5.0, error_ttl_seconds=error_ttl)
    calls = []

    def fail():
        calls.append(1)
        raise LookupError(len(calls))

    def ask():
        with pytest.raises(LookupError):
            coalescer.get_or_call("k", fail)
        return len(calls)

    assert ask() == 1
    _core._advance_clock(1.0)
    assert ask() == calls_after_a_second
    _core._advance_clock(9.0)
    assert ask() == calls_after_ten


def test_a_hit_on_a_retained_error_is_a_copy_with_a_traceback_of_its_own():
    coalescer = BatchCoalescer()

    def fail():
        raise ValueError("broken")

    def ask():
        with pytest.raises(ValueError, match="broken") as info:
            coalescer.get_or_call("k", fail)
        return info.value

    first, second, third = ask(), ask(), ask()
    assert len({id(first), id(second), id(third)}) == 3
    assert [frame.name for frame in traceback.extract_tb(second.__traceback__)] == ["ask"]
    assert "fail" in "".join(second.__notes__)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, concurrent.futures.CancelledError])
def test_an_error_that_concerns_the_leader_alone_hands_the_call_to_the_next_waiter(crews, kind):
    coalescer = BatchCoalescer()
    held = Held(error=kind())
    second = Held(result="from the waiter")
    second.released.set()

    def lead(_):
        with pytest.raises(kind):
            coalescer.get_or_call("k", held)

    leader = crews().start(1, lead)
    assert held.entered.wait(30)
    waiters = crews().start(10, lambda _: coalescer.get_or_call("k", second))
    wait_for_waiters(coalescer, "k", 10)
    held.released.set()
    leader.join()
    assert waiters.join() == ["from the waiter"] * 10
    assert (held.calls, second.calls) == (1, 1)


def test_a_leader_lost_with_nobody_waiting_leaves_the_key_free():
    coalescer = BatchCoalescer()
    with pytest.raises(SystemExit):
        coalescer.get_or_call("k", sys.exit)
    assert "k" not in coalescer
    assert coalescer.get_or_call("k", lambda: 1) == 1


def test_a_call_that_asks_for_its_own_key_is_told_so_at_once():
    coalescer = BatchCoalescer()

    def outer():
        return coalescer.get_or_call("k", lambda: 1)

    with pytest.raises(RecursiveCallError, match="'k'") as info:
        coalescer.get_or_call("k", outer)
    assert isinstance(info.value, RuntimeError)
    assert coalescer.get_or_call("k", lambda: 2) == 2


def test_recursion_is_private_and_the_next_waiter_leads(crews):
    coalescer = BatchCoalescer()
    entered, released = threading.Event(), threading.Event()

    def outer():
        entered.set()
        assert released.wait(30)
        return coalescer.get_or_call("k", lambda: 1)

    def lead(_):
        with pytest.raises(RecursiveCallError):
            coalescer.get_or_call("k", outer)

    leader = crews().start(1, lead)
    assert entered.wait(30)
    waiters = crews().start(5, lambda _: coalescer.get_or_call("k", lambda: 2))
    wait_for_waiters(coalescer, "k", 5)
    released.set()
    leader.join()
    assert waiters.join() == [2] * 5


def test_a_call_may_ask_for_another_key_and_for_its_own_after_clear():
    coalescer = BatchCoalescer()

    def outer():
        coalescer.clear()
        inner = coalescer.get_or_call("k", lambda: "a newer flight's")
        return inner, coalescer.get_or_call("other", lambda: "another key's")

    assert coalescer.get_or_call("k", outer) == ("a newer flight's", "another key's")
    assert coalescer.get_or_call("k", lambda: "led again") == "a newer flight's"


def test_clear_during_a_flight_keeps_its_waiters_and_never_its_outcome(crews):
    coalescer = BatchCoalescer(ttl_seconds=float("inf"))
    held = Held(result="old")
    leader, waiters = joined_by(coalescer, crews, held, 5)
    coalescer.clear()
    assert coalescer.get_or_call("k", lambda: "new") == "new"
    held.released.set()
    assert leader.join() + waiters.join() == ["old"] * 6
    assert coalescer.get_or_call("k", lambda: "newest") == "new"
    assert "in_flight=0 retained=1" in repr(coalescer)


def test_a_coroutine_is_refused_and_not_retained():
    coalescer = BatchCoalescer()

    async def answer():
        return 1

    for _ in range(2):
        with pytest.raises(CallResultError, match="AsyncBatchCoalescer"):
            coalescer.get_or_call("k", answer)
    assert isinstance(CallResultError(), TypeError)
    assert len(coalescer) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ttl_seconds": -1}, ValueError, "ttl_seconds must be zero or more seconds, not -1"),
        ({"ttl_seconds": float("nan")}, ValueError, "ttl_seconds must be zero or more seconds, not nan"),
        ({"ttl_seconds": True}, TypeError, "ttl_seconds must be a number of seconds, not True"),
        ({"ttl_seconds": "5"}, TypeError, "ttl_seconds must be a number of seconds, not '5'"),
        ({"ttl_seconds": None}, TypeError, "ttl_seconds must be a number of seconds, not None"),
        ({"error_ttl_seconds": -0.5}, ValueError, "error_ttl_seconds must be zero or more seconds, not -0.5"),
        ({"error_ttl_seconds": False}, TypeError, "error_ttl_seconds must be a number of seconds, not False"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchCoalescer(**arguments)


def test_a_wrong_call_changes_nothing():
    coalescer = BatchCoalescer()
    with pytest.raises(TypeError, match="unhashable"):
        coalescer.get_or_call([], lambda: 1)
    with pytest.raises(TypeError, match="fn must be callable, not 5"):
        coalescer.get_or_call("k", 5)
    with pytest.raises(TypeError, match="fn"):
        coalescer.get_or_call("k")
    assert len(coalescer) == 0
    assert "k" not in coalescer
    assert "calls=0 joined=0 hits=0" in repr(coalescer)


def test_len_contains_and_repr_count_retained_and_in_flight_keys(crews):
    coalescer = BatchCoalescer(ttl_seconds=5.0)
    assert coalescer
    assert len(coalescer) == 0
    held = Held(result=1)
    leader = crews().start(1, lambda _: coalescer.get_or_call("flying", held))
    assert held.entered.wait(30)
    coalescer.get_or_call("kept", lambda: 2)
    assert len(coalescer) == 2
    assert "flying" in coalescer
    assert "kept" in coalescer
    assert "other" not in coalescer
    expected = "<BatchCoalescer ttl_seconds=5.0 in_flight=1 retained=1 calls=2 joined=0 hits=0 errors=0>"
    assert repr(coalescer) == expected
    held.released.set()
    leader.join()
    _core._advance_clock(6.0)
    assert len(coalescer) == 0
    assert "kept" not in coalescer


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has them")
def test_ctrl_c_reaches_a_main_thread_that_waits():
    program = """
import signal, sys, threading
from llm_batch_coalesce import BatchCoalescer
coalescer = BatchCoalescer()
entered, released = threading.Event(), threading.Event()
def call():
    entered.set()
    while not coalescer._waiters("k"):
        released.wait(0.001)
    print("waiting", flush=True)
    released.wait(30)
leader = threading.Thread(target=coalescer.get_or_call, args=("k", call))
leader.start()
entered.wait(30)
try:
    coalescer.get_or_call("k", call)
except KeyboardInterrupt:
    print("interrupted", flush=True)
released.set()
leader.join()
print(coalescer.get_or_call("k", call), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out == "interrupted\nNone\n"
    assert process.returncode == 0

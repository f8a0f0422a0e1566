"""A program ends as any Python program does, whatever its threads wait for."""

import subprocess
import sys

import pytest

PROLOGUE = """
import sys, threading, time
from llm_batch_coalesce import BatchCoalescer, AsyncBatchCoalescer
coalescer = BatchCoalescer(ttl_seconds=0.05)
started = threading.Semaphore(0)

def spin():
    started.release()
    while True:
        pass

def block():
    started.release()
    threading.Event().wait()

def nap():
    started.release()
    while True:
        time.sleep(0.0005)

def thread(fn, key="k"):
    threading.Thread(target=coalescer.get_or_call, args=(key, fn), daemon=True).start()

def until_waiting(count, key="k"):
    while coalescer._waiters(key) < count:
        time.sleep(0.001)
"""


def run(program):
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + program], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.parametrize("body", ["spin", "block", "nap"])
def test_daemon_leaders_and_waiters_do_not_hinder_the_exit(body):
    program = f"""
for number in range(4):
    thread({body}, key=number)
for _ in range(4):
    started.acquire()
for number in range(4):
    for _ in range(4):
        thread({body}, key=number)
for number in range(4):
    until_waiting(4, key=number)
coalescer.get_or_call("kept", lambda: 1)
print("done")
"""
    for _ in range(2 if body == "spin" else 5):
        ended = run(program)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_daemons_inside_a_keys_eq_do_not_hinder_the_exit():
    program = """
class Key:
    def __hash__(self):
        return 1
    def __eq__(self, other):
        nap()

coalescer.get_or_call(Key(), lambda: 1)
for _ in range(4):
    threading.Thread(target=coalescer.get_or_call, args=(Key(), nap), daemon=True).start()
for _ in range(4):
    started.acquire()
"""
    for _ in range(5):
        ended = run(program)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_daemons_that_wake_during_the_exit_do_not_hinder_it():
    program = """
import atexit
go = threading.Event()
def call():
    started.release()
    go.wait()
    return 1
thread(call)
started.acquire()
for _ in range(20):
    thread(call)
until_waiting(20)
atexit.register(go.set)
"""
    for _ in range(10):
        ended = run(program)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_other_threads_are_joined_and_get_their_results():
    program = """
go = threading.Event()
def call():
    started.release()
    go.wait()
    return "shared\\n"
threads = [threading.Thread(target=lambda: sys.stdout.write(coalescer.get_or_call("k", call))) for _ in range(5)]
for each in threads:
    each.start()
until_waiting(4)
threading.Timer(0.05, go.set).start()
"""
    ended = run(program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "shared\n" * 5, "")


def test_the_sweeper_at_work_does_not_hinder_the_exit():
    program = """
class Slow:
    def __del__(self):
        for _ in range(1000):
            pass
for number in range(20_000):
    coalescer.get_or_call(number, Slow)
time.sleep(0.06)
"""
    for _ in range(3):
        ended = run(program)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_an_event_loop_that_ends_with_a_call_under_way_does_not_hinder_the_exit():
    program = """
import asyncio
tasks = AsyncBatchCoalescer()
async def main():
    asyncio.ensure_future(tasks.get_or_call("k", asyncio.Event().wait))
    for _ in range(3):
        await asyncio.sleep(0)
asyncio.run(main())
print("done")
"""
    ended = run(program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_importing_the_package_imports_no_extras():
    program = "print(sorted({name.partition('.')[0] for name in sys.modules} & {'httpx', 'httpx2', 'rich', 'redis'}))"
    assert run(program).stdout == "[]\n"

"""Programs end as any Python program does, whatever becomes of their streams."""

import subprocess
import sys

import pytest


def run(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)


PROLOGUE = """
import asyncio, atexit, sys, threading, time
from llm_batch_coalesce import BatchCoalescer, AsyncBatchCoalescer
coalescer = BatchCoalescer()

def block():
    threading.Event().wait()
    yield 1

def nap():
    while True:
        time.sleep(0.0005)
        yield 1

def spin():
    while True:
        yield 1

def thread(fn, key="k"):
    work = lambda: [None for _ in coalescer.stream(key, fn, max_buffered=100)]
    threading.Thread(target=work, daemon=True).start()

def until(count, key="k"):
    while coalescer._readers(key)[0] < count:
        time.sleep(0.001)
"""


@pytest.mark.parametrize("body", ["block", "nap", "spin"])
def test_daemons_that_pull_and_wait_do_not_hinder_the_exit(body):
    program = f"""
threading.excepthook = lambda _: None
for key in range(2):
    for _ in range(4):
        thread({body}, key)
if {body} is block:
    for key in range(2):
        until(4, key)
else:
    time.sleep(0.02)
print("done")
"""
    for _ in range(1 if body == "spin" else 4):
        ended = run(PROLOGUE + program)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_daemons_that_wake_during_the_exit_do_not_hinder_it():
    program = """
go = threading.Event()
def generate():
    go.wait()
    yield from range(100)
for _ in range(20):
    thread(generate)
until(20)
atexit.register(go.set)
"""
    for _ in range(10):
        ended = run(PROLOGUE + program)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_a_program_may_end_with_streams_half_read():
    program = """
def generate():
    try:
        yield from range(100)
    finally:
        print("closed")

async def generate_in_task():
    try:
        while True:
            yield 1
            await asyncio.sleep(0)
    finally:
        print("closed in task")

async def main():
    global reading
    reading = AsyncBatchCoalescer().stream("k", generate_in_task)
    await anext(reading)

asyncio.run(main())
stream, other = coalescer.stream("k", generate), coalescer.stream("k", generate)
next(stream), next(other)
print("done")
"""
    ended = run(PROLOGUE + program)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "closed in task\ndone\nclosed\n", "")


def test_a_loop_that_has_ended_with_daemons_reading_does_not_hinder_the_exit():
    program = """
tasks, go = coalescer.as_async(), threading.Event()
async def generate():
    yield 1
    await asyncio.Event().wait()

async def main():
    stream = tasks.stream("k", generate)
    await anext(stream)
    for _ in range(3):
        thread(block)
    while coalescer._readers("k")[1] < 3:
        await asyncio.sleep(0)
    raise KeyError("main's")

threading.excepthook = lambda _: None
try:
    asyncio.run(main())
except KeyError:
    print("done")
"""
    for _ in range(3):
        ended = run(PROLOGUE + program)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")

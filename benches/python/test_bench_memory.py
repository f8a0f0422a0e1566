"""What a retained key takes, without the objects that are its key and its value."""

import json
import subprocess
import sys

PROGRAM = """
import gc, json, sys
from llm_batch_coalesce import BatchCoalescer

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

count = 1_000_000
keys = [f"define:{number}" for number in range(count)]
coalescer = BatchCoalescer(ttl_seconds=3_600.0)
def nothing():
    return None

coalescer.get_or_call("warm", nothing)
gc.collect()
before = resident()
for key in keys:
    coalescer.get_or_call(key, nothing)
after = resident()
store = dict.fromkeys(keys)
json.dump([(after - before) / count, (resident() - after) / count], sys.stdout)
"""


def test_memory_of_a_million_keys(benchmark, record_ratio):
    """bytes a retained key, 1,000,000 keys"""
    measured = []

    def measure():
        output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
        measured.append(json.loads(output))

    benchmark.pedantic(measure, rounds=3, iterations=1)
    own, plain = sorted(measured)[1]
    record_ratio(own, plain, target=200)

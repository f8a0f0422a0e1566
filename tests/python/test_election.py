"""Exactly one leader, however many ask at the same moment. These fail if electing the leader is not atomic."""

import asyncio
import threading
from collections import Counter

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer


def test_of_64_threads_exactly_one_calls_in_each_of_2000_rounds(crew):
    rounds, threads = 2_000, 64
    coalescer = BatchCoalescer(ttl_seconds=60.0)
    barrier = threading.Barrier(threads)
    calls = Counter()
    counting = threading.Lock()

    def work(_number):
        seen = []
        for turn in range(rounds):

            def call(turn=turn):
                with counting:
                    calls[turn] += 1
                return object()

            barrier.wait(50)
            seen.append(coalescer.get_or_call(("round", turn), call))
        return seen

    results = crew.start(threads, work).join()

    assert calls == Counter(range(rounds))
    for outcomes in zip(*results, strict=True):
        assert all(outcome is outcomes[0] for outcome in outcomes)


def test_of_4_loops_with_50_tasks_exactly_one_calls_in_each_round(crew):
    rounds, loops, tasks = 200, 4, 50
    coalescer = AsyncBatchCoalescer(ttl_seconds=60.0)
    barrier = threading.Barrier(loops)
    calls = Counter()
    counting = threading.Lock()

    async def ask(turn):
        async def call():
            with counting:
                calls[turn] += 1
            await asyncio.sleep(0)
            return object()

        return await coalescer.get_or_call(("round", turn), call)

    async def one_loop():
        seen = []
        for turn in range(rounds):
            # Blocking the loop on purpose: all loops start a round together.
            barrier.wait(50)
            seen.append(await asyncio.gather(*(ask(turn) for _ in range(tasks))))
        return seen

    results = crew.start(loops, lambda _number: asyncio.run(one_loop())).join()

    assert calls == Counter(range(rounds))
    for turn in range(rounds):
        outcomes = [outcome for loop in results for outcome in loop[turn]]
        assert len(outcomes) == loops * tasks
        assert all(outcome is outcomes[0] for outcome in outcomes)

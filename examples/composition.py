"""A rate limit and a budget in front of a shared call, and a cache behind it: whoever does not call spends nothing.

    python examples/composition.py

It needs `pip install pyrate-limiter cachetools`.

- The gate stands inside the callable, so only the caller that leads passes it: waiters and hits spend neither rate nor
  budget.
- Its errors are private: a leader that is out of its own budget fails alone, and the next waiter leads with its own.
- The cache is the coalescer's `store`: the leader asks it first, inside the flight, so what the cache has spends
  nothing either, and a thousand callers of an entry that has just expired are one call.
"""

import threading
from collections.abc import Awaitable, Callable, Generator, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from cachetools import TTLCache

# Well kept, without requirements of its own, for threads and tasks alike, and it refuses at once instead of waiting if
# told so. (aiolimiter is for one event loop; limits is as good, most of all where rates are kept in Redis.)
from pyrate_limiter import Duration, Limiter, Rate, SingleBucketFactory, StateBucket, TokenBucket

from llm_batch_coalesce import BatchCoalescer, request_key

MOST_TOKENS = 100  # what a call may take: reserved before it, settled after it


class RateLimitedError(Exception):
    """This tenant has made too many calls."""


class BudgetExceededError(Exception):
    """This tenant cannot pay for a call."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it took."""

    text: str
    tokens: int


class Budget:
    """Tokens that a tenant may still use."""

    def __init__(self, tokens: int) -> None:
        """Begin with so many."""
        self.left = tokens
        self._lock = threading.Lock()

    @contextmanager
    def reserved(self, tokens: int) -> Generator[Callable[[int], None], None, None]:
        """Keep tokens back for a call; it gives what it has used to the function it gets. A failed call is free."""
        used = 0

        def settle(tokens: int) -> None:
            nonlocal used
            used = tokens

        with self._lock:
            if self.left < tokens:
                raise BudgetExceededError(f"{self.left} tokens left, a call may take {tokens}")
            self.left -= tokens
        try:
            yield settle
        finally:
            with self._lock:
                self.left += tokens - used


class LockedCache:
    """A cache of cachetools behind a lock: its caches are not safe to share between threads by themselves."""

    def __init__(self, max_entries: int, ttl_seconds: float) -> None:
        """Make an empty cache."""
        self._cache: TTLCache[Hashable, Answer] = TTLCache(max_entries, ttl_seconds)
        self._lock = threading.Lock()

    def get(self, key: Hashable, default: object = None) -> object:
        """Return what is cached."""
        with self._lock:
            return self._cache.get(key, default)

    def __setitem__(self, key: Hashable, answer: Answer) -> None:
        """Cache an answer."""
        with self._lock:
            self._cache[key] = answer


class RateLimit:
    """So many calls in a duration."""

    def __init__(self, calls: int, duration: Duration) -> None:
        """Begin with all of them."""
        bucket = StateBucket([Rate(calls, duration)], algorithm=TokenBucket())
        self._limiter = Limiter(SingleBucketFactory(bucket, schedule_leak=False))  # it needs no thread that trims it
        self._lock = threading.Lock()

    def admits(self) -> bool:
        """Take one of the calls, if there is one left."""
        # Without waiting, the limiter refuses beyond the rate, but also while another thread is in it; so none is.
        with self._lock:
            return bool(self._limiter.try_acquire(blocking=False))


@dataclass(frozen=True)
class Tenant:
    """Who asks, and pays when it leads."""

    name: str
    budget: Budget
    rate: RateLimit

    @contextmanager
    def gate(self) -> Generator[Callable[[int], None], None, None]:
        """Let a call of this tenant through, or raise; what is in the block says what the call has taken."""
        with self.budget.reserved(MOST_TOKENS) as settle:
            if not self.rate.admits():
                raise RateLimitedError(f"too many calls of {self.name}")
            yield settle


class Assistant:
    """Asks a model on behalf of tenants, whose answers are no secret from each other."""

    def __init__(self) -> None:
        """Make the one coalescer, with a face for threads and one for tasks."""
        self.coalescer = BatchCoalescer(
            ttl_seconds=5.0,
            private_errors=(RateLimitedError, BudgetExceededError),
            store=LockedCache(max_entries=10_000, ttl_seconds=3600.0),
        )
        self.for_tasks = self.coalescer.as_async()

    def ask(self, tenant: Tenant, prompt: str, model: Callable[[str], Answer]) -> str:
        """Return the model's answer.

        Raises:
            RateLimitedError: If the call was this tenant's to make, and it has made too many.
            BudgetExceededError: If it cannot pay for it.
        """

        def call() -> Answer:
            with tenant.gate() as settle:
                answer = model(prompt)
                settle(answer.tokens)
            return answer

        return self.coalescer.get_or_call(self.key_of(prompt), call).text

    async def ask_async(self, tenant: Tenant, prompt: str, model: Callable[[str], Awaitable[Answer]]) -> str:
        """Do the same for a task; the two share calls, gates and cache."""

        async def call() -> Answer:
            with tenant.gate() as settle:
                answer = await model(prompt)
                settle(answer.tokens)
            return answer

        return (await self.for_tasks.get_or_call(self.key_of(prompt), call)).text

    def key_of(self, prompt: str) -> str:
        """Make the key of a prompt: the tenant is no part of it, since the answer does not depend on it."""
        return request_key({"model": "small", "prompt": prompt}, scope="public")


def main() -> None:
    """Let many callers ask the same, and show who has paid."""

    def model(prompt: str) -> Answer:
        return Answer(f"An answer to {prompt!r}", tokens=40)

    assistant = Assistant()
    rich = Tenant("rich", Budget(1_000), RateLimit(3, Duration.MINUTE))
    poor = Tenant("poor", Budget(10), RateLimit(3, Duration.MINUTE))
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: assistant.ask(rich, "What is a bond?", model), range(50)))
    print(f"{len(answers)} callers, {assistant.coalescer.stats().calls} call, {rich.budget.left} of 1000 tokens left")
    print(f"{assistant.ask(poor, 'What is a bond?', model)} is a hit: {poor.budget.left} of 10 tokens left")
    try:
        assistant.ask(poor, "What is beta?", model)
    except BudgetExceededError as error:
        print(f"Not for {poor.name}: {error}")
    assistant.coalescer.clear()  # as if the five seconds were over; the cache keeps it for an hour
    print(f"{assistant.ask(poor, 'What is a bond?', model)} is in the cache: {poor.budget.left} of 10 tokens left")


if __name__ == "__main__":
    main()

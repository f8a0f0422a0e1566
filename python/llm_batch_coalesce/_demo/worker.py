"""A worker of ``--distributed``: the process of a server, whose readers are threads or tasks.

It is told what to do by lines of its standard input, tells what happens by lines of its standard output, each a word
and a value in JSON, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import redis
import redis.asyncio

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.replay import call_directly, call_directly_async, replay_in_tasks, replay_in_threads
from llm_batch_coalesce._demo.trace import make_trace
from llm_batch_coalesce._demo.upstream import AsyncExplainer, Explainer, Tally, Target, one_line
from llm_batch_coalesce.redis import (
    AsyncDistributedBatchCoalescer,
    BackendError,
    DistributedBatchCoalescer,
    RemoteCallError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator

    from llm_batch_coalesce._demo.replay import AsyncShare, Replay, Share

# The ways to share.
NOT_AT_ALL: Final = "not at all"
IN_EACH_PROCESS: Final = "in each process"
IN_THE_FLEET: Final = "in the fleet"

# What a fleet's members are told apart from their TTL and namespace. A worker that went on alone, because a busy
# machine was slow, would make calls that nobody could explain.
FLEET: Final[dict[str, Any]] = {"on_backend_error": "raise", "backend_timeout_seconds": 10.0}


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker is told when it starts."""

    number: int
    """From 0 on. Workers with an even one have threads, the others tasks."""
    workers: int
    users: int
    requests: int
    seed: int
    ttl_seconds: float
    namespace: str
    server: str = field(repr=False)
    """The URL of the Redis or Valkey server, with its password."""
    target: Target

    @property
    def readers(self) -> str:
        """What the readers are."""
        return ("threads", "tasks")[self.number % 2]

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Work:
        """Return what was dumped."""
        fields = json.loads(text)
        return cls(**fields | {"target": Target(**fields["target"])})


class _Line:
    """To the demo's process. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._output = sys.stdout

    def tell(self, word: str, value: object = None) -> None:
        line = json.dumps([word, value])
        with self._lock:
            self._output.write(f"{line}\n")
            self._output.flush()

    def answered(self) -> None:
        self.tell("answered")


class _ToldTally(Tally):
    """A tally that is kept by the demo's process."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def sent(self) -> None:
        self._line.tell("sent")

    def used(self, tokens: int | None) -> None:
        self._line.tell("used", tokens)


class _Texts:
    """What upstream answered and what readers got, by term. Safe to share between threads."""

    def __init__(self) -> None:
        # Appending is atomic on every build.
        self._answered: list[tuple[str, str]] = []
        self._got: list[tuple[str, str]] = []

    def explaining(self, explain: Callable[[str], str]) -> Callable[[str], str]:
        def noting(term: str) -> str:
            text = explain(term)
            self._answered.append((term, text))
            return text

        return noting

    def explaining_async(self, explain: Callable[[str], Awaitable[str]]) -> Callable[[str], Awaitable[str]]:
        async def noting(term: str) -> str:
            text = await explain(term)
            self._answered.append((term, text))
            return text

        return noting

    def sharing(self, share: Share) -> Share:
        def noting(term: Hashable, fn: Callable[[], str]) -> str:
            text = share(term, fn)
            self._got.append((str(term), text))
            return text

        return noting

    def sharing_async(self, share: AsyncShare) -> AsyncShare:
        async def noting(term: Hashable, fn: Callable[[], Awaitable[str]]) -> str:
            text = await share(term, fn)
            self._got.append((str(term), text))
            return text

        return noting

    def told(self) -> dict[str, list[tuple[str, str]]]:
        """Return each text of a term once."""
        return {"answers": sorted(set(self._answered)), "texts": sorted(set(self._got))}


class _Worker:
    """Replays its readers' part of the trace whenever it is told to."""

    def __init__(self, work: Work, orders: queue.SimpleQueue[str], line: _Line) -> None:
        self._work = work
        self._orders = orders
        self._line = line
        trace = make_trace(list(load_glossary()), users=work.users, requests=work.requests, seed=work.seed)
        self._hovers = [hover for hover in trace if hover.user % work.workers == work.number]

    def run(self, sharing: str) -> None:
        """Replay once, and tell what came of it."""
        texts = _Texts()
        if self._work.readers == "threads":
            replay = self._in_threads(sharing, texts)
        else:
            replay = asyncio.run(self._in_tasks(sharing, texts))
        self._line.tell("done", asdict(replay) | texts.told())

    def _in_threads(self, sharing: str, texts: _Texts) -> Replay:
        work = self._work
        with Explainer(work.target, _ToldTally(self._line)) as explainer, _shared(work, sharing) as share:
            self._begin_together()
            return replay_in_threads(
                self._hovers,
                explain=texts.explaining(explainer.explain),
                share=texts.sharing(share),
                answered=self._line.answered,
            )

    async def _in_tasks(self, sharing: str, texts: _Texts) -> Replay:
        work = self._work
        async with (
            AsyncExplainer(work.target, _ToldTally(self._line)) as explainer,
            _shared_async(work, sharing) as share,
        ):
            self._begin_together()
            return await replay_in_tasks(
                self._hovers,
                explain=texts.explaining_async(explainer.explain),
                share=texts.sharing_async(share),
                answered=self._line.answered,
            )

    def _begin_together(self) -> None:
        """Wait until the other workers are as far. Nothing is there yet that waiting could hold up."""
        self._line.tell("prepared")
        self._orders.get()


@contextlib.contextmanager
def _shared(work: Work, sharing: str) -> Iterator[Share]:
    if sharing == NOT_AT_ALL:
        yield call_directly
    elif sharing == IN_EACH_PROCESS:
        yield BatchCoalescer(ttl_seconds=work.ttl_seconds).get_or_call
    else:
        with (
            redis.Redis.from_url(work.server) as client,
            DistributedBatchCoalescer(client, work.ttl_seconds, namespace=work.namespace, **FLEET) as coalescer,
        ):
            yield coalescer.get_or_call


@contextlib.asynccontextmanager
async def _shared_async(work: Work, sharing: str) -> AsyncIterator[AsyncShare]:
    if sharing == NOT_AT_ALL:
        yield call_directly_async
    elif sharing == IN_EACH_PROCESS:
        yield AsyncBatchCoalescer(ttl_seconds=work.ttl_seconds).get_or_call
    else:
        async with (
            redis.asyncio.Redis.from_url(work.server) as client,
            AsyncDistributedBatchCoalescer(client, work.ttl_seconds, namespace=work.namespace, **FLEET) as coalescer,
        ):
            yield coalescer.get_or_call


def _listen(orders: queue.SimpleQueue[str]) -> None:
    """Take orders until the demo has gone, and then leave whatever is under way."""
    for order in sys.stdin:
        orders.put(order.rstrip("\n"))
    os._exit(0)


def _work(orders: queue.SimpleQueue[str], line: _Line) -> None:
    worker = _Worker(Work.load(orders.get()), orders, line)
    while True:
        try:
            worker.run(orders.get())
        except RemoteCallError as error:
            # Another worker's reader has met with it, which says it in one line.
            line.tell("failed", error.error_message)
        except DemoError as error:
            line.tell("failed", str(error))
        except BackendError as error:
            line.tell("failed", f"the workers cannot share any more: {one_line(error)}")


def main() -> None:
    """Work until standard input ends."""
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    try:
        _work(orders, _Line())
    except BaseException:  # noqa: BLE001 - a process whose standard input is being read cannot end in another way
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()

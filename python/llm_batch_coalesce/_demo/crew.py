"""The workers as the demo's process sees them: what they are told, and what comes back."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from llm_batch_coalesce._demo.child import running_child
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.replay import Replay
from llm_batch_coalesce._demo.windows import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from llm_batch_coalesce._demo.child import Child
    from llm_batch_coalesce._demo.upstream import Tally
    from llm_batch_coalesce._demo.worker import Work

# Ctrl-C does not interrupt a wait for a queue on Windows, only the pause between two such waits.
_WAIT_SLICE_SECONDS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Seen:
    """What the readers of all workers saw in one run."""

    replay: Replay
    calls_by_worker: Sequence[int]
    answers: Mapping[str, set[str]]
    """What upstream answered for each term."""
    texts: Mapping[str, set[str]]
    """What readers got for each term."""


class Crew:
    """Workers that run, and do the same at the same time."""

    def __init__(self, children: Sequence[Child]) -> None:
        """Listen to the workers."""
        self._children = children
        self._inbox: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        for number, child in enumerate(children):
            threading.Thread(target=self._listen, args=(number, child), daemon=True).start()

    def run(self, sharing: str, tally: Tally, answered: Callable[[], None]) -> Seen:
        """Let all readers replay their hovers.

        Args:
            sharing: How they share; one of the ways of ``worker``.
            tally: Counts what they send to the provider.
            answered: Called after each hover that was answered, from this thread.

        Raises:
            DemoError: A reader or a worker failed.
        """
        self._tell(sharing)
        self._gather("prepared", tally, answered)
        self._tell("go")
        return _together(self._gather("done", tally, answered))

    def _tell(self, order: str) -> None:
        for child in self._children:
            child.write(order.encode())

    def _gather(self, awaited: str, tally: Tally, answered: Callable[[], None]) -> list[Any]:
        """Wait until every worker has said a word, and return what came with it."""
        gathered: dict[int, Any] = {}
        while len(gathered) < len(self._children):
            number, word, value = self._next()
            if word == awaited:
                gathered[number] = value
            elif word == "answered":
                answered()
            elif word == "sent":
                tally.sent()
            elif word == "used":
                tally.used(value)
            elif word == "failed":
                raise DemoError(value)
            else:
                message = f"{self._children[number].name} has stopped: {self._children[number].last_words()}"
                raise DemoError(message)
        return [gathered[number] for number in range(len(self._children))]

    def _next(self) -> tuple[int, str, Any]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_WAIT_SLICE_SECONDS)

    def _listen(self, number: int, child: Child) -> None:
        while line := child.read():
            word, value = json.loads(line)
            self._inbox.put((number, word, value))
        self._inbox.put((number, "gone", None))


@contextlib.contextmanager
def running_crew(works: Sequence[Work]) -> Iterator[Crew]:
    """Run a worker for each of ``works`` until the block is left.

    Raises:
        DemoError: One did not start.
    """
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(running_child(f"worker {work.number + 1} ({work.readers})", "worker")) for work in works
        ]
        for child, work in zip(children, works, strict=True):
            child.write(work.dump().encode())
        yield Crew(children)


def _together(told: Sequence[dict[str, Any]]) -> Seen:
    answers: defaultdict[str, set[str]] = defaultdict(set)
    texts: defaultdict[str, set[str]] = defaultdict(set)
    for each in told:
        for pairs, by_term in ((each["answers"], answers), (each["texts"], texts)):
            for term, text in pairs:
                by_term[term].add(text)
    # The clock of calls is one for the whole machine.
    calls = [[Call(**call) for call in each["calls"]] for each in told]
    replay = Replay(
        wall_seconds=max(each["wall_seconds"] for each in told),
        latencies=[latency for each in told for latency in each["latencies"]],
        calls=[call for some in calls for call in some],
    )
    return Seen(replay, [len(some) for some in calls], answers, texts)

"""The demo of a fleet from start to end: three runs of one trace by several processes, then what came of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table

from llm_batch_coalesce._demo import report, worker
from llm_batch_coalesce._demo.crew import running_crew
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.fleet_server import fleet_server
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.output import Output
from llm_batch_coalesce._demo.progress import progress_on
from llm_batch_coalesce._demo.report import say
from llm_batch_coalesce._demo.story import check, provider_for
from llm_batch_coalesce._demo.trace import make_trace
from llm_batch_coalesce._demo.upstream import Tally
from llm_batch_coalesce._demo.worker import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llm_batch_coalesce._demo.crew import Crew, Seen
    from llm_batch_coalesce._demo.options import Options
    from llm_batch_coalesce._demo.stand_in import StandIn

_RUNS: Final = {
    worker.NOT_AT_ALL: "no coalescer",
    worker.IN_EACH_PROCESS: "one in each worker",
    worker.IN_THE_FLEET: "one for the fleet",
}


@dataclass(frozen=True, slots=True)
class _FleetRun(report.Run):
    """One replay by all workers."""

    title: str
    seen: Seen

    @property
    def name(self) -> str:
        """The run's name in the tables and in messages."""
        return self.title


def tell(options: Options) -> None:
    """Replay the trace by several processes, each for itself and then as a fleet, and show what came of it.

    Raises:
        DemoError: A server or a worker failed, the fleet made more upstream calls than it may, or a reader got a text
            that is no answer to its question.
    """
    console = Output()
    hovers = make_trace(list(load_glossary()), users=options.users, requests=options.requests, seed=options.seed)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(fleet_server(options.server))
        provider, target = stack.enter_context(provider_for(options))
        works = [
            Work(
                number=number,
                workers=options.workers,
                users=options.users,
                requests=options.requests,
                seed=options.seed,
                ttl_seconds=options.ttl_seconds,
                namespace=server.namespace,
                server=server.url,
                target=target,
            )
            for number in range(options.workers)
        ]
        crew = stack.enter_context(running_crew(works))
        kinds = [work.readers for work in works]
        say(console, f"Worker processes: {kinds.count('threads')} of threads, {kinds.count('tasks')} of tasks.")
        say(console, f"They share on {server.description}.")
        report.introduce(console, options, hovers, target.base_url)
        runs = _run_all(console, options, crew, provider)
    report.show_results(console, runs, price=options.price)
    _show_workers(console, works, runs)
    check(runs, options.ttl_seconds)
    _check_texts(runs[-1])
    _show_verdict(console, runs[-1], options.ttl_seconds)


def _run_all(console: Console, options: Options, crew: Crew, provider: StandIn | None) -> list[_FleetRun]:
    runs = []
    with progress_on(console, runs=len(_RUNS), requests=options.requests) as progress:
        for sharing, title in _RUNS.items():
            tally = Tally()
            answered = progress.begin(title, tally)
            if provider is not None:
                provider.reset_usage()
            seen = crew.run(sharing, tally, answered)
            usage = tally.usage(price=options.price) if provider is None else provider.usage()
            runs.append(_FleetRun("both", sharing == worker.IN_THE_FLEET, seen.replay, usage, title, seen))
    return runs


def _show_workers(console: Console, works: Sequence[Work], runs: Sequence[_FleetRun]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("upstream calls", overflow="fold")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold", style="bold green" if run.coalesced else None)
    for work in works:
        calls = [f"{run.seen.calls_by_worker[work.number]:,}" for run in runs]
        table.add_row(f"worker {work.number + 1} ({work.readers})", *calls)
    console.print()
    console.print(table)
    console.print()


def _check_texts(run: _FleetRun) -> None:
    """Check that readers got nothing but what was answered to their question.

    Raises:
        DemoError: One got something else.
    """
    for term, texts in run.seen.texts.items():
        if not texts <= run.seen.answers.get(term, set()):
            message = (
                f'{run.name}: readers of "{term}" got a text that was no answer to it; the coalescer mixed them up'
            )
            raise DemoError(message)


def _show_verdict(console: Console, run: _FleetRun, ttl_seconds: float) -> None:
    """Say what was checked: as many calls as there are pairs, and texts that are the same for all."""
    calls = f"{run.usage.calls:,} {'call' if run.usage.calls == 1 else 'calls'}"
    say(console, f"Exactly one call per (term, {ttl_seconds:g} s TTL window) in the whole fleet: {calls}.")
    # A text for each upstream call, of which a short TTL allows more than one.
    if all(len(texts) == 1 for texts in run.seen.texts.values()):
        say(console, "All readers of a term got the same text.")

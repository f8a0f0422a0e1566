"""The demo from start to end: four runs of one trace, then what came of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from llm_batch_coalesce import AsyncBatchCoalescer, BatchCoalescer
from llm_batch_coalesce._demo import report
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.output import Output
from llm_batch_coalesce._demo.progress import progress_on
from llm_batch_coalesce._demo.replay import call_directly, call_directly_async, replay_in_tasks, replay_in_threads
from llm_batch_coalesce._demo.stand_in import running_stand_in
from llm_batch_coalesce._demo.trace import make_trace
from llm_batch_coalesce._demo.upstream import AsyncExplainer, Explainer, Tally, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from llm_batch_coalesce._demo.options import Options
    from llm_batch_coalesce._demo.replay import Replay
    from llm_batch_coalesce._demo.stand_in import StandIn
    from llm_batch_coalesce._demo.trace import Hover

_REAL_SERVER_SECONDS: Final = 60.0
_STAND_IN_GRACE_SECONDS: Final = 30.0


def tell(options: Options) -> None:
    """Replay the trace by threads and by tasks, each without and with the coalescer, and show what came of it.

    Raises:
        DemoError: The provider failed, or a coalesced run made more upstream calls than it may.
    """
    console = Output()
    hovers = make_trace(list(load_glossary()), users=options.users, requests=options.requests, seed=options.seed)
    with provider_for(options) as (provider, target):
        report.introduce(console, options, hovers, target.base_url)
        runs = _run_all(console, options, hovers, target, provider)
    report.show_results(console, runs, price=options.price)
    check(runs, options.ttl_seconds)
    report.show_verdict(console, runs, ttl_seconds=options.ttl_seconds)


@contextlib.contextmanager
def provider_for(options: Options) -> Iterator[tuple[StandIn | None, Target]]:
    """Provide whom to ask while the block lasts: the stand-in, or the real server that the options name.

    Raises:
        DemoError: The stand-in did not start.
    """
    with contextlib.ExitStack() as stack:
        provider = None
        if options.base_url is None:
            provider = stack.enter_context(
                running_stand_in(latency_seconds=options.latency_seconds, price=options.price),
            )
        yield provider, _target_for(options, provider)


def _target_for(options: Options, provider: StandIn | None) -> Target:
    if provider is not None:
        return Target(
            base_url=provider.base_url,
            model=options.model,
            connections=options.users,
            read_seconds=options.latency_seconds + _STAND_IN_GRACE_SECONDS,
            trust_env=False,
            advice="the stand-in provider has stopped, run the demo again",
        )
    return Target(
        base_url=options.base_url or "",
        model=options.model,
        connections=options.users,
        read_seconds=_REAL_SERVER_SECONDS,
        api_key=options.api_key,
    )


def _run_all(
    console: Console,
    options: Options,
    hovers: Sequence[Hover],
    target: Target,
    provider: StandIn | None,
) -> list[report.Run]:
    def in_threads(tally: Tally, answered: Callable[[], None], *, coalesced: bool) -> Replay:
        share = BatchCoalescer(ttl_seconds=options.ttl_seconds).get_or_call if coalesced else call_directly
        with Explainer(target, tally) as explainer:
            return replay_in_threads(hovers, explain=explainer.explain, share=share, answered=answered)

    async def in_tasks(tally: Tally, answered: Callable[[], None], *, coalesced: bool) -> Replay:
        share = AsyncBatchCoalescer(ttl_seconds=options.ttl_seconds).get_or_call if coalesced else call_directly_async
        async with AsyncExplainer(target, tally) as explainer:
            return await replay_in_tasks(hovers, explain=explainer.explain, share=share, answered=answered)

    plan = [(readers, coalesced) for readers in ("threads", "tasks") for coalesced in (False, True)]
    runs = []
    with progress_on(console, runs=len(plan), requests=len(hovers)) as progress:
        for readers, coalesced in plan:
            tally = Tally()
            answered = progress.begin(report.run_name(readers, coalesced=coalesced), tally)
            if provider is not None:
                provider.reset_usage()
            if readers == "threads":
                replay = in_threads(tally, answered, coalesced=coalesced)
            else:
                replay = asyncio.run(in_tasks(tally, answered, coalesced=coalesced))
            usage = tally.usage(price=options.price) if provider is None else provider.usage()
            runs.append(report.Run(readers, coalesced, replay, usage))
    return runs


def check(runs: Sequence[report.Run], ttl_seconds: float) -> None:
    """Check that the coalesced ones of ``runs`` did not ask too often.

    Raises:
        DemoError: One of them did.
    """
    for run in runs:
        windows = run.windows(ttl_seconds)
        if run.coalesced and run.usage.calls > windows:
            message = (
                f"{run.name}: {run.usage.calls} upstream calls for {windows} (term, TTL window) pairs; "
                "the coalescer let duplicate calls through"
            )
            raise DemoError(message)

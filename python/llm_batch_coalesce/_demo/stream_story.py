"""The demo of shared streams from start to end: one answer, read by all without and with the coalescer."""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table

from llm_batch_coalesce import AsyncBatchCoalescer
from llm_batch_coalesce._demo.audience import make_audience
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.glossary import load_glossary
from llm_batch_coalesce._demo.output import Output
from llm_batch_coalesce._demo.reading import Board, State, read_together
from llm_batch_coalesce._demo.report import dollars, say
from llm_batch_coalesce._demo.story import provider_for
from llm_batch_coalesce._demo.stream_view import view_of
from llm_batch_coalesce._demo.streaming import StreamingExplainer
from llm_batch_coalesce._demo.upstream import Tally
from llm_batch_coalesce._demo.windows import Call, count_windows

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from rich.console import Console

    from llm_batch_coalesce._demo.audience import Reader
    from llm_batch_coalesce._demo.options import Options
    from llm_batch_coalesce._demo.stand_in import StandIn
    from llm_batch_coalesce._demo.upstream import Target, Usage

_CHARACTERS_PER_TOKEN: Final = 4
_SLOW_BY: Final = 0.15  # of the latency, where the stand-in writes a token in a tenth of it


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run."""

    name: str
    board: Board
    calls: Sequence[Call]
    wall_seconds: float
    usage: Usage


def tell(options: Options) -> None:
    """Let all readers read one answer, without and with the coalescer, and show what came of it.

    Raises:
        DemoError: The provider failed, the shared stream was asked for more often than it may, or a reader of it got
            another text.
    """
    console = Output()
    audience = make_audience(options.users, options.seed)
    glossary = load_glossary()
    term = max(glossary, key=lambda term: len(glossary[term]))
    with provider_for(options) as (provider, target):
        _introduce(console, options, audience, term, target.base_url)
        expected = math.ceil(len(glossary[term]) / _CHARACTERS_PER_TOKEN)
        teller = _Teller(console, options, audience, term, expected, target, provider)
        runs = [
            asyncio.run(teller.run("a stream each", coalesced=False)),
            asyncio.run(teller.run("one shared stream", coalesced=True)),
        ]
    _show_results(console, options, runs)
    say(console, _check(runs[-1], options.ttl_seconds))


@dataclass(frozen=True, slots=True)
class _Teller:
    """Runs the readers once without, once with the coalescer."""

    console: Console
    options: Options
    audience: Sequence[Reader]
    term: str
    expected: int
    target: Target
    provider: StandIn | None

    async def run(self, name: str, *, coalesced: bool) -> Run:
        board, tally, calls = Board(self.audience, expected=self.expected), Tally(), list[Call]()
        coalescer = AsyncBatchCoalescer(ttl_seconds=self.options.ttl_seconds)
        if self.provider is not None:
            self.provider.reset_usage()
        async with StreamingExplainer(self.target, tally) as explainer:

            async def upstream() -> AsyncGenerator[str, None]:
                started = perf_counter()
                try:
                    async with contextlib.aclosing(explainer.stream(self.term)) as pieces:
                        async for piece in pieces:
                            yield piece
                finally:
                    calls.append(Call(self.term, started, perf_counter()))

            def shared() -> AsyncGenerator[str, None]:
                return coalescer.stream(self.term, upstream)

            with view_of(self.console, name, board, tally, keep=coalesced) as advanced:
                wall_seconds = await read_together(
                    board,
                    open_stream=shared if coalesced else upstream,
                    pause_seconds=self.options.latency_seconds * _SLOW_BY,
                    advanced=advanced,
                )
        usage = tally.usage(price=self.options.price) if self.provider is None else self.provider.usage()
        return Run(name, board, calls, wall_seconds, usage)


def _introduce(console: Console, options: Options, audience: Sequence[Reader], term: str, base_url: str) -> None:
    late = sum(reader.joins_at > 0 for reader in audience)
    slow = sum(reader.is_slow for reader in audience)
    leaving = sum(reader.leaves_after is not None for reader in audience)
    begins = f"stand-in, begins after {options.latency_seconds:g} s"
    provider = f"model {options.model}" if options.base_url else begins
    say(console, f'{len(audience)} readers of one answer, which tells what "{term}" means.')
    say(console, f"Coming late: {late}. Slow: {slow}. Leaving early: {leaving}.")
    say(console, f"Provider: {base_url} ({provider}).\n")


def _show_results(console: Console, options: Options, runs: Sequence[Run]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for heading in ("readers", "upstream\nrequests", "tokens\npaid for", "wall\ntime s", "cost"):
        table.add_column(heading, justify="right", overflow="fold")
    for run in runs:
        table.add_row(
            run.name,
            f"{len(run.board.places):,}",
            f"{run.usage.calls:,}",
            "n/a" if run.usage.tokens is None else f"{run.usage.tokens:,}",
            f"{run.wall_seconds:.1f}",
            dollars(run.usage.cost),
            style="bold green" if run is runs[-1] else None,
        )
    console.print()
    console.print(table)
    console.print()
    if any(run.usage.cost is None for run in runs):
        say(console, "No cost: the provider did not tell how many tokens every answer took.")
    else:
        say(console, f"Cost at ${options.price:g} for 1,000 tokens.")


def _check(run: Run, ttl_seconds: float) -> str:
    """Check that the coalesced run did not ask too often and that its readers got the same; return that it is so."""
    windows = count_windows(run.calls, ttl_seconds=ttl_seconds)
    pairs = f"{windows} (term, {ttl_seconds:g} s TTL window) {'pair' if windows == 1 else 'pairs'}"
    if run.usage.calls > windows:
        message = (
            f"{run.name}: {run.usage.calls} upstream requests for {pairs}; the coalescer let duplicate requests through"
        )
        raise DemoError(message)
    texts = {place.text for place in run.board.places if place.state is State.SERVED}
    # A text for each upstream request, of which a short TTL allows more than one.
    if len(texts) > windows:
        message = f"{run.name}: its readers got {len(texts)} different texts; the coalescer mixed them up"
        raise DemoError(message)
    return f"No request too many: {pairs}." + (" All got the same text." if len(texts) == 1 else "")

"""What is shown before and after the runs: the story in a line or two, a table and a small picture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table
from rich.text import Text

from llm_batch_coalesce._demo.windows import count_windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from llm_batch_coalesce._demo.options import Options
    from llm_batch_coalesce._demo.replay import Replay
    from llm_batch_coalesce._demo.trace import Hover
    from llm_batch_coalesce._demo.upstream import Usage

_BAR_WIDTH: Final = 44
_BESIDE_BAR: Final = 30
_TO_MILLISECONDS: Final = 1000.0
_SMALLEST_MILLISECONDS: Final = 0.01
_FINE_BELOW_MILLISECONDS: Final = 10.0
_CENTS_FROM_DOLLARS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of the trace with what it took from the provider."""

    readers: str
    """What the readers were: threads or tasks."""
    coalesced: bool
    replay: Replay
    usage: Usage

    @property
    def name(self) -> str:
        """The run's name in the table and in messages."""
        return run_name(self.readers, coalesced=self.coalesced)

    @property
    def requests(self) -> int:
        """How many hovers were answered."""
        return len(self.replay.latencies)

    def windows(self, ttl_seconds: float) -> int:
        """Return the most calls that this run may have made if it was coalesced."""
        return count_windows(self.replay.calls, ttl_seconds=ttl_seconds)


def run_name(readers: str, *, coalesced: bool) -> str:
    """Return the name of a run."""
    return f"{readers} + coalescer" if coalesced else readers


def introduce(console: Console, options: Options, hovers: Sequence[Hover], base_url: str) -> None:
    """Tell who is about to do what."""
    terms = Counter(hover.term for hover in hovers)
    [(favourite, times)] = terms.most_common(1)
    provider = f"model {options.model}" if options.base_url else f"stand-in, {options.latency_seconds:g} s a call"
    say(console, f"{options.users} readers, {len(hovers)} hovers over {len(terms)} finance terms.")
    say(console, f'The favourite is "{favourite}", hovered over {_times(times)}.')
    say(console, f"Provider: {base_url} ({provider}).\n")


def show_results(console: Console, runs: Sequence[Run], *, price: float) -> None:
    """Show the table and the picture of ``runs``."""
    console.print()
    console.print(_table(runs))
    console.print()
    console.print(_picture(console, runs))
    console.print()
    if any(run.usage.cost is None for run in runs):
        say(console, "No cost: the provider did not tell how many tokens every answer took.")
    else:
        say(console, f"Cost at ${price:g} for 1,000 tokens.")


def show_verdict(console: Console, runs: Sequence[Run], *, ttl_seconds: float) -> None:
    """Say that the coalesced ones of ``runs`` made no call too many."""
    pairs = " and ".join(f"{run.windows(ttl_seconds)} ({run.readers})" for run in runs if run.coalesced)
    say(console, f"No call too many: {pairs} pairs of term and {ttl_seconds:g} s TTL window.")


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that at least ``share`` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _table(runs: Sequence[Run]) -> Table:
    # Cut to fit the 80 columns of a plain terminal; in a narrower one numbers are folded rather than cut off.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for heading in ("requests", "upstream\ncalls", "calls\nsaved", "wall\ntime s", "p50\nms", "p99\nms", "cost"):
        table.add_column(heading, justify="right", overflow="fold")
    for run in runs:
        saved = run.requests - run.usage.calls
        table.add_row(
            run.name,
            f"{run.requests:,}",
            f"{run.usage.calls:,}",
            f"{saved:,} ({saved / run.requests:.0%})",
            f"{run.replay.wall_seconds:.1f}",
            _milliseconds(quantile(run.replay.latencies, 0.5)),
            _milliseconds(quantile(run.replay.latencies, 0.99)),
            dollars(run.usage.cost),
            style="bold green" if run.coalesced else None,
        )
    return table


def _picture(console: Console, runs: Sequence[Run]) -> Table:
    # Blocks where the output can show them; "#" for ASCII and the code pages of old Windows consoles.
    block = "#" if console.options.ascii_only else "█"
    most = max(run.usage.calls for run in runs)
    widest = max(1, min(_BAR_WIDTH, console.width - _BESIDE_BAR))
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    for run in runs:
        length = max(1, round(widest * run.usage.calls / most))
        bar = Text(block * length, style="green" if run.coalesced else "red")
        grid.add_row(run.name, bar + Text(f" {run.usage.calls:,}", style="default"))
    picture = Table(box=None, pad_edge=False, show_edge=False)
    picture.add_column("upstream calls")
    picture.add_row(grid)
    return picture


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * _TO_MILLISECONDS
    if milliseconds < _SMALLEST_MILLISECONDS:
        return f"<{_SMALLEST_MILLISECONDS}"
    return f"{milliseconds:.2f}" if milliseconds < _FINE_BELOW_MILLISECONDS else f"{milliseconds:,.0f}"


def dollars(cost: float | None) -> str:
    """Return a cost as the tables show it."""
    if cost is None:
        return "n/a"
    return f"${cost:,.2f}" if cost >= _CENTS_FROM_DOLLARS or cost == 0.0 else f"${cost:.4f}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    # Names of models and servers are text, whatever brackets are in them.
    console.print(showable(console, line), markup=False, highlight=False, soft_wrap=True)


def showable(console: Console, text: str) -> str:
    """Return ``text`` without the characters that do not exist in the output's encoding."""
    return text.encode(console.encoding, errors="replace").decode(console.encoding)

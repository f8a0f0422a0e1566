"""What is shown while a run is under way: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import Task

    from llm_batch_coalesce._demo.upstream import Tally


class Progressing(Protocol):
    """A display of runs, one after the other."""

    def begin(self, name: str, tally: Tally) -> Callable[[], None]:
        """Show the run ``name``, whose calls ``tally`` counts.

        Returns:
            What to call, from any thread, after each hover that was answered.
        """


@contextlib.contextmanager
def progress_on(console: Console, *, runs: int, requests: int) -> Iterator[Progressing]:
    """Show the progress of ``runs`` runs of ``requests`` hovers each while the block lasts."""
    if can_move(console):
        with _bars(console) as bars:
            yield _Live(bars, requests)
    else:
        yield _Plain(console, runs, requests)


def can_move(console: Console) -> bool:
    """Return whether a display may move the cursor: on a terminal that people look at."""
    # Colours may be forced on a pipe by the environment.
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class _CallsColumn(ProgressColumn):
    """The calls of a run so far, read from its tally at each refresh."""

    def render(self, task: Task) -> Text:
        tally: Tally = task.fields["tally"]
        return Text(f"{tally.calls:>4} calls", style="magenta")


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _CallsColumn(),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )


class _Live:
    """Bars that move."""

    def __init__(self, bars: Progress, requests: int) -> None:
        self._bars = bars
        self._requests = requests

    def begin(self, name: str, tally: Tally) -> Callable[[], None]:
        task = self._bars.add_task(name, total=self._requests, tally=tally)
        return lambda: self._bars.advance(task)


class _Plain:
    """A line at each quarter of a run."""

    def __init__(self, console: Console, runs: int, requests: int) -> None:
        self._console = console
        self._runs = runs
        self._requests = requests
        self._begun = 0

    def begin(self, name: str, tally: Tally) -> Callable[[], None]:
        self._begun += 1
        prefix = f"[{self._begun}/{self._runs}] {name}:"
        self._say(f"{prefix} {self._requests} hovers to go")
        quarters = {-(-self._requests * quarter // 4) for quarter in range(1, 5)}
        lock = threading.Lock()
        done = 0

        def answered() -> None:
            nonlocal done
            with lock:
                done += 1
                if done in quarters:
                    self._say(f"{prefix} {done} answered, {tally.calls} upstream calls")

        return answered

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

"""What is shown while readers read: the growing answer and a picture of them, or a few plain lines."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llm_batch_coalesce._demo.audience import SHOWN
from llm_batch_coalesce._demo.progress import can_move
from llm_batch_coalesce._demo.reading import State
from llm_batch_coalesce._demo.report import say, showable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

    from llm_batch_coalesce._demo.reading import Board, Place
    from llm_batch_coalesce._demo.upstream import Tally

_FRAMES_PER_SECOND: Final = 15
_BAR_WIDTH: Final = 5
_CELL_WIDTH: Final = _BAR_WIDTH + 2  # with its mark and a space
_MOST_COLUMNS: Final = 10
_TEXT_LINES: Final = 3
_PARTS: Final = "▏▎▍▌▋▊▉█"


@contextlib.contextmanager
def view_of(console: Console, name: str, board: Board, tally: Tally, *, keep: bool) -> Iterator[Callable[[], None]]:
    """Show a run of readers while the block lasts.

    Args:
        console: Where to.
        name: The run's.
        board: Its readers.
        tally: The requests to the provider.
        keep: Whether the last picture stays on a terminal.

    Yields:
        What to call after each token that nobody had before.
    """
    if can_move(console):
        picture = _Picture(console, name, board, tally)
        with Live(
            get_renderable=picture.draw,
            console=console,
            refresh_per_second=_FRAMES_PER_SECOND,
            transient=not keep,
        ):
            yield lambda: None
    else:
        yield from _plain_lines(console, name, board, tally)


def _plain_lines(console: Console, name: str, board: Board, tally: Tally) -> Iterator[Callable[[], None]]:
    say(console, f"{name}: {_counted(len(board.places), 'reader')}")
    quarters = {-(-board.expected * quarter // 4) for quarter in range(1, 4)}

    def advanced() -> None:
        if board.front.tokens in quarters:
            reading = board.count(State.READING)
            say(console, f"{name}: {board.front.tokens} tokens, {reading} reading, {_requests(tally)}")

    yield advanced
    served, left = board.count(State.SERVED), board.count(State.LEFT)
    say(console, f"{name}: served {served}, left early {left}, {_requests(tally)}")


class _Picture:
    """The answer so far, and a bar for each reader."""

    def __init__(self, console: Console, name: str, board: Board, tally: Tally) -> None:
        self._console = console
        self._name = name
        self._board = board
        self._tally = tally
        self._ascii = console.options.ascii_only
        self._served, self._left = ("+", "x") if self._ascii else ("✓", "✗")

    def draw(self) -> RenderableType:
        """Return the picture of this moment."""
        title = Text(f"{self._name}: {_requests(self._tally)}", style="bold")
        return Group(title, self._answer(), Text(), self._readers(), Text(), self._legend())

    def _answer(self) -> Text:
        # It comes from elsewhere: no control sequences, and no more of it than fits.
        text = "".join(character if character.isprintable() else " " for character in self._board.front.text)
        room = _TEXT_LINES * (self._console.width - 1) - self._console.width // 4
        shown = text if len(text) <= room else f"...{text[-room:]}"
        lines = Text(showable(self._console, shown), style="cyan").wrap(self._console, self._console.width)
        # As many lines from the start, so that what is below stays in its place.
        return Text("\n").join([*lines[:_TEXT_LINES], *[Text()] * (_TEXT_LINES - len(lines))])

    def _readers(self) -> Table:
        columns = max(1, min(_MOST_COLUMNS, self._console.width // _CELL_WIDTH))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(columns):
            grid.add_column(no_wrap=True, width=_CELL_WIDTH - 1)
        cells = [self._cell(place) for place in self._board.places[:SHOWN]]
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid

    def _cell(self, place: Place) -> Text:
        if place.state is State.ABSENT:
            return Text("." * _BAR_WIDTH, style="dim")
        full = max(self._board.expected, self._board.front.tokens)
        if place.state is State.SERVED:
            return Text(self._bar(1.0) + self._served, style="green")
        bar = self._bar(place.tokens / full).ljust(_BAR_WIDTH)
        if place.state is State.LEFT:
            return Text(bar + self._left, style="red")
        return Text(bar + ("~" if place.reader.is_slow else " "), style="yellow" if place.reader.is_slow else "cyan")

    def _bar(self, share: float) -> str:
        if self._ascii:
            return "#" * round(share * _BAR_WIDTH)
        whole, part = divmod(round(share * _BAR_WIDTH * len(_PARTS)), len(_PARTS))
        return _PARTS[-1] * whole + (_PARTS[part - 1] if part else "")

    def _legend(self) -> Text:
        legend = Text.assemble(
            (f"{self._served} has it all  ", "green"), ("~ is slow  ", "yellow"), (f"{self._left} has left  ", "red")
        )
        legend.append("... comes late", style="dim")
        hidden = len(self._board.places) - SHOWN
        return legend.append(f"  and {hidden} more" if hidden > 0 else "")


def _requests(tally: Tally) -> str:
    return _counted(tally.calls, "upstream request")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

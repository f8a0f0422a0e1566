"""One run of readers of an answer: a task each, and the board on which everybody sees how far they are."""

from __future__ import annotations

import asyncio
import enum
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from llm_batch_coalesce._demo.audience import Reader


class State(enum.Enum):
    """What has become of a reader."""

    ABSENT = enum.auto()
    READING = enum.auto()
    SERVED = enum.auto()
    LEFT = enum.auto()


@dataclass(slots=True)
class Place:
    """A reader on the board. The display's thread reads it while the reader's task writes."""

    reader: Reader
    state: State = State.ABSENT
    tokens: int = 0
    text: str = ""


class Board:
    """How far everybody is."""

    def __init__(self, audience: Sequence[Reader], *, expected: int) -> None:
        """Show readers who have not come yet; ``expected`` is about how many tokens the answer will have."""
        self.expected = expected
        self.places = [Place(reader) for reader in audience]
        self.front = self.places[0]
        """Whoever has got the most."""
        self._marks = {reader.joins_at: asyncio.Event() for reader in audience}
        self._mark(0)

    async def reached(self, tokens: int) -> None:
        """Wait until somebody has got so many tokens, or the whole answer."""
        await self._marks[tokens].wait()

    def got(self, place: Place, piece: str) -> bool:
        """Write down a token; return whether nobody had it before."""
        place.text += piece
        place.tokens += 1
        if place.tokens <= self.front.tokens and place is not self.front:
            return False
        self.front = place
        self._mark(place.tokens)
        return True

    def ended(self, place: Place, state: State) -> None:
        """Write down how a reader has ended."""
        place.state = state
        if state is State.SERVED:
            for mark in self._marks.values():
                mark.set()

    def count(self, state: State) -> int:
        """Return how many readers are in a state."""
        return sum(place.state is state for place in self.places)

    def _mark(self, tokens: int) -> None:
        if tokens in self._marks:
            self._marks[tokens].set()


async def read_together(
    board: Board,
    *,
    open_stream: Callable[[], AsyncGenerator[str, None]],
    pause_seconds: float,
    advanced: Callable[[], None],
) -> float:
    """Let a task for each reader on ``board`` read an answer.

    Args:
        board: Who reads; it is kept up to date.
        open_stream: Begins or joins a stream, for one reader.
        pause_seconds: How long the slow reader pauses after each token.
        advanced: Called after each token that nobody had before.

    Returns:
        How long it took until the last had ended, in seconds.

    Raises:
        Exception: What the first reader to fail got; the others are cancelled.
    """

    async def read(place: Place) -> None:
        reader = place.reader
        await board.reached(reader.joins_at)
        place.state = State.READING
        async with aclosing(open_stream()) as pieces:
            async for piece in pieces:
                if board.got(place, piece):
                    advanced()
                if place.tokens == reader.leaves_after:
                    board.ended(place, State.LEFT)
                    return
                if reader.is_slow:
                    await asyncio.sleep(pause_seconds)
        board.ended(place, State.SERVED)

    begun = perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for place in board.places:
                group.create_task(read(place))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return perf_counter() - begun

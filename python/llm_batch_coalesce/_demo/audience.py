"""The readers of one answer: who comes late, who is slow, and who leaves before the end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

# The picture shows so many; whoever is slow or leaves is among them.
SHOWN: Final = 50

_FEWEST_WITH_PARTS: Final = 5
_LATE_SHARE: Final = 5  # one in so many
_LATEST: Final = 24
_LEAVE_AFTER: Final = (8, 20)


@dataclass(frozen=True, slots=True)
class Reader:
    """One reader, and the part that it plays."""

    joins_at: int = 0
    """It comes when somebody has got so many tokens."""
    leaves_after: int | None = None
    """How many tokens it reads; ``None`` stands for all."""
    is_slow: bool = False


def make_audience(users: int, seed: int) -> list[Reader]:
    """Return the readers, always the same ones for the same arguments.

    A fifth of them come late, one is slow, and two leave early; fewer than five readers just read.
    """
    if users < _FEWEST_WITH_PARTS:
        return [Reader()] * users
    dice = random.Random(seed)  # noqa: S311 - no secret depends on it, and it has to be repeatable
    slow, *leaving = dice.sample(range(min(users, SHOWN)), 3)
    late = dice.sample([number for number in range(users) if number not in {slow, *leaving}], users // _LATE_SHARE)
    audience = {number: Reader(joins_at=dice.randint(1, _LATEST)) for number in late}
    audience[slow] = Reader(is_slow=True)
    audience |= {number: Reader(leaves_after=dice.randint(*_LEAVE_AFTER)) for number in leaving}
    return [audience.get(number, Reader()) for number in range(users)]

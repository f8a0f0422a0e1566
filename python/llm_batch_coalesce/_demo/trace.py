"""Who hovers over which term, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

# How steeply interest falls from the most popular term to the rarest; words in texts and requests to caches are near 1.
_ZIPF_EXPONENT: Final = 1.1

# A reader sweeps the pointer over a page of terms: brisk, so that nobody has to watch the demo for long.
_HOVERS_PER_READER_AND_SECOND: Final = 4.0


@dataclass(frozen=True, slots=True)
class Hover:
    """One reader's wish to have one term explained, ``at_seconds`` after the run's start."""

    at_seconds: float
    user: int
    term: str


def make_trace(terms: Sequence[str], *, users: int, requests: int, seed: int) -> list[Hover]:
    """Return ``requests`` hovers in order of time, always the same ones for the same arguments.

    Terms are Zipf-distributed and arrivals are those of a Poisson process. Each user hovers equally often, give or take
    one, as a single overworked user would decide how long a run takes.
    """
    dice = random.Random(seed)  # noqa: S311 - no secret depends on it, and it has to be repeatable
    ranked = list(terms)
    dice.shuffle(ranked)
    weights = [1.0 / rank**_ZIPF_EXPONENT for rank in range(1, len(ranked) + 1)]
    chosen = dice.choices(ranked, weights, k=requests)
    hovering = [number % users for number in range(requests)]
    dice.shuffle(hovering)
    span = requests / (users * _HOVERS_PER_READER_AND_SECOND)
    arrivals = sorted(dice.random() * span for _ in range(requests))
    return [Hover(*hover) for hover in zip(arrivals, hovering, chosen, strict=True)]

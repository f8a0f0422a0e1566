"""The most upstream calls that a coalesced run may make: one for each term and TTL window.

A window of a term opens when a call for it starts and closes ``ttl_seconds`` after that call has completed; until then
everybody who asks waits for the call or is served its outcome. So of the recorded calls of a term, taken by their
start, the first opens a window. A later one opens the next if it starts after the close of the one before, and has no
right to exist if it does not. This greedy walk counts every call that a sound coalescer can make, and no other.

It goes by the start of the call and not by that of the request: a request that came just before the close may look its
term up just after it and then rightly lead, while its own start makes it look like a duplicate. A window in which
nobody asked is never counted, as calls are made inside ``get_or_call`` only.

Both times are taken inside the callable, so a recorded call is a little shorter than what the coalescer saw of it: it
starts after the claim and completes before its outcome is kept. That can only make the gap between two calls look
longer. In the other direction there is ``TOLERANCE_SECONDS``: a coarse clock lags by up to one tick, 4 ms on most
systems and 16 ms on Windows, and a completion dated by it lets the window close that much early. This leniency saves
no coalescer that lets duplicates through: they start while the first call is in flight, or long before its TTL ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

TOLERANCE_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Call:
    """One upstream call as its leader saw it, in seconds of ``time.perf_counter``."""

    term: str
    started: float
    completed: float


def count_windows(calls: Iterable[Call], *, ttl_seconds: float) -> int:
    """Return how many (term, TTL window) pairs there are in the recorded ``calls``."""
    windows = 0
    closes: dict[str, float] = {}
    for call in sorted(calls, key=attrgetter("started")):
        if call.started >= closes.get(call.term, -math.inf) - TOLERANCE_SECONDS:
            windows += 1
            closes[call.term] = call.completed + ttl_seconds
    return windows

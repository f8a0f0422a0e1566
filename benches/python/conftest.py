"""Ratios of a measurement against a baseline, taken in turn in the same run.

These machines drift, so a figure alone says little: each round measures the baseline and the subject one right after
the other, and the median of the rounds' ratios is what is told.
"""

import gc
import statistics
import sys
import time

import pytest
from model import BatchCoalescer as PureBatchCoalescer

RESULTS = []
BYTES = []


class Compare:
    """Measures a subject against a baseline and notes the ratio beside its target."""

    def __init__(self, benchmark, name):
        self._benchmark = benchmark
        self._name = name

    def __call__(self, subject, baseline, *, target, rounds=15, unit_count=1):
        """Both are functions without arguments that take about the same number of operations, `unit_count`.

        A function may return the seconds that count; if it returns None, its whole running time does.
        """
        subject(), baseline()
        pairs = []

        def one_round():
            gc.collect()
            gc.disable()
            try:
                base = _seconds(baseline)
                own = _seconds(subject)
            finally:
                gc.enable()
            pairs.append((own, base))

        self._benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=1)
        ratio = statistics.median(own / base for own, base in pairs)
        own, base = (statistics.median(side) for side in zip(*pairs, strict=True))
        self._benchmark.extra_info.update(ratio=ratio, target=target)
        RESULTS.append((self._name, own / unit_count, base / unit_count, ratio, target))
        return ratio


def _seconds(work):
    start = time.perf_counter()
    counted = work()
    return time.perf_counter() - start if counted is None else counted


@pytest.fixture
def compare(benchmark, request):
    name = (request.function.__doc__ or request.node.name).partition("\n")[0]
    return Compare(benchmark, name)


@pytest.fixture
def record_ratio(request):
    """Notes bytes of ours and of a dict, and the target of ours."""

    def record(own, base, *, target):
        BYTES.append((request.function.__doc__, own, base, target))

    return record


@pytest.fixture
def pure():
    return PureBatchCoalescer


def pytest_terminal_summary(terminalreporter):
    if not RESULTS and not BYTES:
        return
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    terminalreporter.section(f"ratios on {sys.version.split()[0]}, GIL {'on' if gil else 'off'}")
    row = "{:<74} {:>11} {:>11} {:>7} {:>8}  {}"
    terminalreporter.write_line(row.format("what", "ours", "baseline", "ratio", "target", ""))
    for name, own, base, ratio, target in RESULTS:
        verdict = "" if target is None else "ok" if ratio <= target else "MISSED"
        shown = "-" if target is None else f"<= {target:g}"
        terminalreporter.write_line(row.format(name, _time(own), _time(base), f"{ratio:.2f}", shown, verdict))
    for name, own, base, target in BYTES:
        verdict = "ok" if own <= target else "MISSED"
        cells = (f"{own:.0f} B", f"dict {base:.0f} B", f"{own / base:.2f}", f"{target} B")
        terminalreporter.write_line(row.format(name, *cells, verdict))


def _time(value):
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"

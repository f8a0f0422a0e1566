"""What asyncio and the interpreter complain about, heard by tests that expect nothing of it."""

import asyncio
import gc
import logging
import sys
import warnings

import pytest


class Complaints(logging.Handler):
    """Whatever asyncio and the interpreter complain about: in the log, as warnings, or as errors nobody can catch."""

    def __init__(self):
        super().__init__()
        self.all = []

    def emit(self, record):
        self.all.append(f"log: {record.getMessage()}")

    def unraisable(self, unraisable):
        self.all.append(f"unraisable: {unraisable.exc_value!r} in {unraisable.object!r}")

    def in_loop(self, _loop, context):
        self.all.append(f"loop: {context['message']}")

    def run(self, main):
        """Run a coroutine function in a loop whose complaints are heard, and collect all garbage."""
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with asyncio.Runner() as runner:
                runner.get_loop().set_exception_handler(self.in_loop)
                result = runner.run(main())
            collect()
        self.all += [f"warning: {warning.message}" for warning in heard]
        return result


def collect():
    for _ in range(3):
        gc.collect()


@pytest.fixture
def complaints(monkeypatch):
    complaints = Complaints()
    collect()  # what other tests have left is theirs
    logger = logging.getLogger("asyncio")
    logger.addHandler(complaints)
    monkeypatch.setattr(sys, "unraisablehook", complaints.unraisable)
    yield complaints
    logger.removeHandler(complaints)

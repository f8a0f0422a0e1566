"""Fixtures of the tests of HTTP: a provider, and callers of both libraries and kinds.

All modules see them, so what they need is imported where one is used.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    """Be a provider for the tests of one module."""
    from provider import running_provider

    with running_provider() as provider:
        yield provider


@pytest.fixture
def provider(running: Any) -> Iterator[Any]:
    """Be a provider that has seen nothing yet; what a test lets it hold goes when that is over."""
    running.reset()
    running.url = running.root + "/v1/answers"
    yield running
    running.release()


@pytest.fixture(params=["httpx2", "httpx"])
def library(request: Any) -> Any:
    return importlib.import_module(request.param)


@pytest.fixture(params=["Threads", "Tasks"])
def callers(request: Any, library: Any) -> Iterator[Any]:
    import http_callers

    with getattr(http_callers, request.param)(library) as made:
        yield made

"""The stand-in provider in a process of its own, so that clients and server do not share an interpreter lock."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import httpx2

from llm_batch_coalesce._demo.child import running_child
from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.upstream import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator


class StandIn:
    """A running stand-in; its counters are the provider's own, not the client's."""

    def __init__(self, root: str, client: httpx2.Client) -> None:
        """Make the handle of the stand-in that serves ``root``."""
        self._root = root
        self._client = client

    @property
    def base_url(self) -> str:
        """What an OpenAI-compatible client takes as its base URL."""
        return f"{self._root}/v1"

    def reset_usage(self) -> None:
        """Set the counters to zero.

        Raises:
            DemoError: The stand-in is gone.
        """
        self._ask("POST", "/stats/reset")

    def usage(self) -> Usage:
        """Return what was used since the last reset.

        Raises:
            DemoError: The stand-in is gone.
        """
        stats = self._ask("GET", "/stats").json()
        return Usage(calls=stats["calls"], tokens=stats["tokens"], cost=stats["cost"])

    def _ask(self, method: str, path: str) -> httpx2.Response:
        try:
            return self._client.request(method, self._root + path).raise_for_status()
        except (httpx2.HTTPError, RuntimeError) as error:  # a RuntimeError if the block has been left
            message = f"the stand-in provider does not answer at {self._root}{path} ({error}); run the demo again"
            raise DemoError(message) from None


@contextlib.contextmanager
def running_stand_in(*, latency_seconds: float, price: float) -> Iterator[StandIn]:
    """Serve the stand-in on a free loopback port until the block is left.

    Raises:
        DemoError: The process did not start.
    """
    arguments = (f"--latency={latency_seconds!r}", f"--price={price!r}")
    # It keeps nothing, so there is nothing to shut down in good order.
    with running_child("the stand-in provider", "provider", *arguments) as child:
        port = child.read_port()
        # A proxy named in the environment knows nothing of this machine's loopback interface.
        with httpx2.Client(trust_env=False) as client:
            yield StandIn(f"http://127.0.0.1:{port}", client)

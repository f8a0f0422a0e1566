"""Where the demo prints."""

from __future__ import annotations

from rich.console import Console

from llm_batch_coalesce._demo.errors import DemoError


class Output(Console):
    """Standard output. That its reader has gone is an error like any other, also in threads and tasks."""

    def on_broken_pipe(self) -> None:
        """Print no more.

        Raises:
            DemoError: Always.
        """
        try:
            super().on_broken_pipe()
        except SystemExit:
            message = "the output was closed before the demo had finished"
            raise DemoError(message) from None

"""The ``demo`` command: its options, its exit codes, and what it says when it cannot run."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Final

from llm_batch_coalesce._demo.errors import DemoError
from llm_batch_coalesce._demo.options import add_arguments, read_options

if TYPE_CHECKING:
    from llm_batch_coalesce._demo.options import Options

__all__ = ["DESCRIPTION", "SUMMARY", "add_arguments", "read_options", "run"]

SUMMARY: Final = "watch fifty readers share the calls of a glossary sidebar"
DESCRIPTION: Final = (
    "Fifty readers hover over finance terms, and each hover asks a language model over HTTP what the term means. The "
    "same hovers are replayed by threads and by asyncio tasks, each once without and once with the coalescer. The "
    "provider is a stand-in on this machine unless --base-url names a real one. With --stream, the readers watch one "
    "answer being written instead: once each as a stream of its own, and once all as one shared stream. With "
    "--distributed, several processes serve the readers: each for itself, and then as a fleet."
)

_EXTRA: Final = ("httpx2", "rich", "starlette", "uvicorn")
_FAILED: Final = 1
_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it


def run(options: Options) -> int:
    """Run the demo and return its exit code; whatever keeps it from ending well is one line on stderr."""
    needed = (*_EXTRA, "redis") if options.distributed else _EXTRA
    if any(importlib.util.find_spec(name) is None for name in needed):
        return _complain('the demo needs the optional extra: pip install "llm-batch-coalesce[demo]"', _FAILED)
    try:
        # What each imports needs the extra, and only the fleet's needs a client of Redis.
        if options.distributed:
            from llm_batch_coalesce._demo.fleet_story import tell  # noqa: PLC0415
        elif options.stream:
            from llm_batch_coalesce._demo.stream_story import tell  # noqa: PLC0415
        else:
            from llm_batch_coalesce._demo.story import tell  # noqa: PLC0415
        tell(options)
    except DemoError as error:
        return _complain(str(error), _FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted before the demo had finished", _INTERRUPTED)
    return 0


def _complain(line: str, exit_code: int) -> int:
    sys.stderr.write(f"{line}\n")
    return exit_code

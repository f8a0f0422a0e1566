"""The command line: ``python -m llm_batch_coalesce``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from llm_batch_coalesce import __version__
from llm_batch_coalesce._demo import cli

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process when left out.

    Raises:
        SystemExit: For ``--help``, ``--version`` and arguments that make no sense.
    """
    parser = argparse.ArgumentParser(
        prog="python -m llm_batch_coalesce",
        description="One call, many callers: concurrent callers that give the same key share one call.",
    )
    parser.add_argument("--version", action="version", version=f"llm-batch-coalesce {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    demo = commands.add_parser("demo", help=cli.SUMMARY, description=cli.DESCRIPTION, allow_abbrev=False)
    cli.add_arguments(demo)

    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    return cli.run(cli.read_options(demo, arguments))


if __name__ == "__main__":
    sys.exit(main())

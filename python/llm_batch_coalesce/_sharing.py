"""What of a failed call its waiters share, and the errors that concern one caller only."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Hashable
from typing import Any

from llm_batch_coalesce import _core
from llm_batch_coalesce._copying import make_template
from llm_batch_coalesce._errors import CallResultError, DeadlockError, MissingKeysError, RecursiveCallError
from llm_batch_coalesce._reports import in_coalescer, logger
from llm_batch_coalesce._shown import shown

# Each concerns one caller only. In a thread either CancelledError may come out of a call.
PRIVATE = (RecursiveCallError, DeadlockError, concurrent.futures.CancelledError, asyncio.CancelledError)


def settle(
    error: BaseException,
    private_errors: tuple[type[BaseException], ...],
    error_ttl_seconds: Callable[[Any], object] | None,
    name: str | None,
) -> tuple[Exception, float | None] | None:
    """Tell how a call's error is shared.

    Returns:
        The template of its copies, and how long it is retained in seconds, where that is not fixed; None if the error
        is not shared at all.
    """
    if not isinstance(error, Exception) or isinstance(error, (*PRIVATE, *private_errors)):
        return None
    template = make_template(error)
    if isinstance(error, CallResultError | MissingKeysError):
        return template, 0.0
    if error_ttl_seconds is None:
        return template, None
    try:
        seconds = error_ttl_seconds(error)
        return template, None if seconds is None else _core._check_seconds("its answer", seconds)  # noqa: SLF001
    except Exception:  # noqa: BLE001 - it is the user's
        failed = type(error).__qualname__
        logger.exception("error_ttl_seconds failed for %s%s, which is not retained", failed, in_coalescer(name))
        return template, 0.0


def recursive_error(key: Hashable, name: str | None) -> RecursiveCallError:
    """Make the error of a call that asks for the key it is computing."""
    return RecursiveCallError(
        f"the call that computes {shown(key)}{in_coalescer(name)} asks for the same key: it would wait for itself"
    )


def deadlock_error(key: Hashable, name: str | None) -> DeadlockError:
    """Make the error of a caller that would close a circle of waits."""
    return DeadlockError(
        f"waiting for {shown(key)}{in_coalescer(name)} would never end: its call depends on what asks for it"
    )


def timeout_error(key: Hashable, name: str | None, timeout: float | None) -> TimeoutError:
    """Make the error of a waiter whose timeout has passed."""
    return TimeoutError(f"the call of {shown(key)}{in_coalescer(name)} was not done within {timeout} seconds")


def cancelled_error(key: Hashable, name: str | None, in_task: bool) -> BaseException:  # noqa: FBT001
    """Make the error of a waiter whose call was cancelled."""
    kind = asyncio.CancelledError if in_task else concurrent.futures.CancelledError
    return kind(f"the call of {shown(key)}{in_coalescer(name)} was cancelled")

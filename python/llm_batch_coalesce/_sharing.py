"""What of a failed call its waiters share."""

import asyncio
import concurrent.futures
from collections.abc import Hashable

from llm_batch_coalesce._copying import make_template
from llm_batch_coalesce._core import Coalescer
from llm_batch_coalesce._errors import CallResultError, RecursiveCallError

# Both concern one caller only. In a thread either CancelledError may come out of a call.
_PRIVATE = (RecursiveCallError, concurrent.futures.CancelledError, asyncio.CancelledError)


def settle(_coalescer: Coalescer, error: BaseException) -> tuple[Exception, bool] | None:
    """Tell how a call's error is shared: as copies of a template, retained or not, or (None) not at all."""
    if not isinstance(error, Exception) or isinstance(error, _PRIVATE):
        return None
    return make_template(error), not isinstance(error, CallResultError)


def recursive_error(key: Hashable) -> RecursiveCallError:
    """Make the error of a call that asks for the key it is computing."""
    return RecursiveCallError(f"the call that computes {shown(key)} asks for the same key: it would wait for itself")


def shown(value: object) -> str:
    """Show enough of a value to recognise it: keys may hold whole prompts, and a `__repr__` may be broken."""
    limit = 80
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - it must not hide the error that this is for
        text = f"an object of type {type(value).__qualname__}"
    return text if len(text) <= limit else f"{text[:limit]}..."

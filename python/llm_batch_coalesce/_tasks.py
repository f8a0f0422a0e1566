"""The tasks that run calls."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import ReferenceType

CallTask = asyncio.Task[BaseException | None]


if sys.version_info >= (3, 12):

    def start(call: Coroutine[Any, Any, BaseException | None], loop: asyncio.AbstractEventLoop) -> CallTask:
        return asyncio.Task(call, loop=loop, eager_start=True)

else:

    def start(call: Coroutine[Any, Any, BaseException | None], loop: asyncio.AbstractEventLoop) -> CallTask:
        return loop.create_task(call)


def error_of(task: CallTask) -> BaseException | None:
    return task.result() if task.done() and not task.cancelled() else None


def cancel_call(reference: ReferenceType[CallTask]) -> None:
    """Cancel a call's task on its own loop; called in any thread when the last caller has left."""
    task = reference()
    if task is None:
        return
    loop = task.get_loop()
    if loop is _running_loop():
        task.cancel()
    else:
        _call_soon(loop, task.cancel)


def cancel_pump(reference: ReferenceType[CallTask], ends: Callable[[], bool]) -> None:
    """Cancel the task that pumps a stream, unless it ends by itself: then it may be awaiting the close of upstream.

    It is asked between two of its steps: the last reader may leave within one.
    """
    task = reference()
    if task is not None:
        _call_soon(task.get_loop(), lambda: ends() or task.cancel())


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    # A closed loop has nothing left to cancel.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def call_is_lost(reference: ReferenceType[CallTask]) -> bool:
    """Tell whether a call can never finish, because its loop is closed or its task is gone."""
    task = reference()
    return task is None or task.get_loop().is_closed()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

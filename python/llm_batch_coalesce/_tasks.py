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
    if task is not None:
        _on_its_loop(task, task.cancel)


def cancel_pump(reference: ReferenceType[CallTask], ends: Callable[[], bool]) -> None:
    """Cancel the task that pumps a stream, unless it has noticed itself: it may be awaiting the close of upstream."""
    task = reference()
    if task is not None:
        _on_its_loop(task, lambda: ends() or task.cancel())


def _on_its_loop(task: CallTask, function: Callable[[], object]) -> None:
    """Call a function between two steps of a task."""
    loop = task.get_loop()
    # A caller may be dropped within a step of the task.
    if loop is _running_loop() and task is not asyncio.current_task():
        function()
        return
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

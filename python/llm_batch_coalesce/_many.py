"""Many keys in one call: matching its result with the keys, and what a caller gets in the end."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llm_batch_coalesce._core import Token
from llm_batch_coalesce._errors import CallResultError, MissingKeysError
from llm_batch_coalesce._shown import shown
from llm_batch_coalesce._store import ask_store, checked, tell_store
from llm_batch_coalesce._tasks import CallTask, error_of, start

if TYPE_CHECKING:
    from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._reports import digest, logger

R = TypeVar("R")


def match_values(keys: list[Hashable], result: object) -> list[tuple[Any, MissingKeysError | None]]:
    """Find the value of each key in what a call has returned.

    Returns:
        For each key its value and None, or None and the error that it has no value.

    Raises:
        CallResultError: If the result is neither a mapping nor a sequence.
    """
    if isinstance(result, Mapping):
        wanted = set(keys)
        surplus = [key for key in result if key not in wanted]
        missing = [key for key in keys if key not in result]
        if surplus and not missing:
            logger.warning(
                "fn returned values for %d keys that were not asked for, the first of type %s with digest %s",
                len(surplus),
                type(surplus[0]).__qualname__,
                digest(surplus[0]),
            )
        lost = set(missing)
        return [(None, MissingKeysError([key], surplus)) if key in lost else (result[key], None) for key in keys]
    # Arrays are sequences, too, though they do not say so.
    is_sequence = isinstance(result, Sequence) or (hasattr(result, "__len__") and hasattr(result, "__getitem__"))
    if not is_sequence or isinstance(result, str | bytes | bytearray):
        if asyncio.iscoroutine(result):
            result.close()
        raise CallResultError(f"fn must return a mapping, or a sequence in the order of its keys, not {shown(result)}")
    values = list(result)  # type: ignore[call-overload]
    if len(values) != len(keys):
        reason = f"fn returned {len(values)} values for {len(keys)} keys"
        return [(None, MissingKeysError([key], reason=reason)) for key in keys]
    return [(value, None) for value in values]


def distinct(keys: Iterable[Hashable]) -> list[Hashable]:
    """Leave out keys that are equal to one before."""
    return list(dict.fromkeys(keys))


def gather_lists(keys: list[Hashable], values: list[Any], errors: list[BaseException | None]) -> dict[Hashable, Any]:
    """Return what a thread gets in the end, or raise what concerns it."""
    found = {key: value for key, value, error in zip(keys, values, errors, strict=True) if error is None}
    failed = {key: error for key, error in zip(keys, errors, strict=True) if error is not None}
    errors.clear()
    return gather(keys, found, failed)


def gather(
    keys: list[Hashable], values: dict[Hashable, Any], errors: dict[Hashable, BaseException]
) -> dict[Hashable, Any]:
    """Return what a caller gets in the end, or raise what concerns it."""
    raised = [errors.pop(key) for key in keys if key in errors]
    for error in raised:
        if not isinstance(error, MissingKeysError):
            # Its traceback will hold this frame.
            del raised
            try:
                raise error
            finally:
                del error
    if raised:
        missing = [error for error in raised if isinstance(error, MissingKeysError)]
        surplus = dict.fromkeys(key for error in missing for key in error.surplus)
        reason = next((error.reason for error in missing if error.reason), None)
        raise MissingKeysError([key for error in missing for key in error.missing], list(surplus), values, reason)
    return {key: values[key] for key in keys}


def single(fn: Callable[[list[Any]], Any], key: Hashable) -> Callable[[], Any]:
    """Make a call for one key of a call for many."""

    def call() -> Any:  # noqa: ANN401 - the key's value
        return _only(key, fn([key]))

    return call


def single_async(fn: Callable[[list[Any]], Awaitable[Any]], key: Hashable) -> Callable[[], Awaitable[Any]]:
    """Make a call for one key of a call for many, to be awaited."""

    async def call() -> Any:  # noqa: ANN401 - the key's value
        return _only(key, await checked(fn([key])))

    return call


def _only(key: Hashable, result: object) -> Any:  # noqa: ANN401 - the key's value
    ((value, error),) = match_values([key], result)
    if error is not None:
        raise error
    return value


async def lead_many(
    coalescer: "AsyncBatchCoalescer",
    led: Mapping[Any, Token],
    fn: Callable[[list[Any]], Awaitable[Any]],
    values: dict[Hashable, Any],
    errors: dict[Hashable, BaseException],
) -> None:
    """Run a call for many keys in a task of its own, and wait for it. Raises what the call raises."""
    loop = asyncio.get_running_loop()
    batch = _Batch(led, loop)
    task = start(_call_many(coalescer, batch, fn, values, errors), loop)
    if not task.done():
        await _wait_for(coalescer, batch, task, list(led.values()))
    error = task.result()
    if error is not None:
        try:
            raise error
        finally:
            # The error's traceback holds this frame.
            del error, task, batch


async def _wait_for(coalescer: "AsyncBatchCoalescer", batch: "_Batch", task: CallTask, tokens: list[Token]) -> None:
    loop = batch.loop
    batch.task = task
    for part, token in zip(batch.parts, tokens, strict=True):
        token.led_by(part, asyncio.current_task(loop) or task)
    future = loop.create_future()

    def done(task: CallTask) -> None:
        for token in tokens:
            token.task_done(task)
        # Until here the core, which knows its parts weakly, needs it.
        # The task has the error, and its traceback the batch.
        batch.parts.clear()
        batch.task = None
        if not future.done():
            future.set_result(None)

    task.add_done_callback(done)
    coalescer._hold(task)  # noqa: SLF001 - this is a part of it
    try:
        await future
    except BaseException:
        # The call may have ended in the very moment; what is no Exception must not be lost.
        if isinstance(error_of(task), Exception | None):
            raise


async def _call_many(
    coalescer: "AsyncBatchCoalescer",
    batch: "_Batch",
    fn: Callable[[list[Any]], Awaitable[Any]],
    values: dict[Hashable, Any],
    errors: dict[Hashable, BaseException],
) -> BaseException | None:
    """Run a call for many keys and end their flights. Returns the error that its own caller raises."""
    left = batch.left
    try:
        Token.enter_all(list(left.values()))
        await _serve_from_store(coalescer, left, values)
        for key in batch.abandoned & left.keys():
            del left[key]
        if left:
            matched = match_values(list(left), await checked(fn(list(left))))
            await _complete_all(coalescer, batch, matched, values, errors)
    except asyncio.CancelledError:
        _for_all(left, Token.lose_loop)
        raise
    except BaseException as error:
        delivered = _for_all(left, partial(_fail, error))
        if not all(delivered) and not isinstance(error, Exception):
            raise
        return error
    return None


def _fail(error: BaseException, token: Token) -> bool:
    return token.fail(error)


async def _complete_all(
    coalescer: "AsyncBatchCoalescer",
    batch: "_Batch",
    matched: list[tuple[Any, MissingKeysError | None]],
    values: dict[Hashable, Any],
    errors: dict[Hashable, BaseException],
) -> None:
    """Share the values of a call, each key's though another one's is interrupted."""
    interrupted: BaseException | None = None
    for (key, token), (value, missing) in zip(list(batch.left.items()), matched, strict=True):
        if missing is None:
            await tell_store(coalescer, token, key, value)
        # What is completed is over, even if Ctrl-C comes while its waiters are told.
        del batch.left[key]
        try:
            if missing is None:
                values[key] = token.complete(value)
            else:
                errors[key] = missing
                token.fail(missing)
        except BaseException as error:  # noqa: BLE001 - raised when all are completed
            interrupted = interrupted or error
    if interrupted is not None:
        raise interrupted


def _for_all(left: dict[Any, Token], end: Callable[[Token], R]) -> list[R]:
    """End all flights that are left; an interrupt of the one is raised when the others have ended, too."""
    ended: list[R] = []
    interrupted: BaseException | None = None
    for token in left.values():
        try:
            ended.append(end(token))
        except BaseException as error:  # noqa: BLE001 - raised when all have ended
            interrupted = interrupted or error
    left.clear()
    if interrupted is not None:
        raise interrupted
    return ended


async def _serve_from_store(
    coalescer: "AsyncBatchCoalescer", left: dict[Any, Token], values: dict[Hashable, Any]
) -> None:
    """Complete what the store has, and take it out of what is left."""
    store = coalescer._store  # noqa: SLF001 - this is a part of it
    if store is None:
        return
    for key, token in list(left.items()):
        found = await ask_store(coalescer, store, key)
        if found is not store:
            token.count_store_hit()
            del left[key]
            values[key] = token.complete(found)


class _Batch:
    """A call for many keys, whose task is cancelled when all that is left of it is abandoned."""

    __slots__ = ("abandoned", "left", "loop", "parts", "task")

    def __init__(self, led: Mapping[Any, Token], loop: asyncio.AbstractEventLoop) -> None:
        self.left = dict(led)
        self.abandoned: set[Any] = set()
        self.parts = [Part(self, key) for key in led]
        self.loop = loop
        # While it runs.
        self.task: CallTask | None = None


class Part:
    """What the core takes for the task of one flight of a batch."""

    __slots__ = ("__weakref__", "_batch", "_key")

    def __init__(self, batch: _Batch, key: Hashable) -> None:
        self._batch = batch
        self._key = key

    def cancel(self) -> None:
        """Note that this flight is abandoned; called on the task's loop."""
        batch = self._batch
        batch.abandoned.add(self._key)
        if batch.task is not None and batch.left.keys() <= batch.abandoned:
            batch.task.cancel()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the task's loop."""
        return self._batch.loop

    def get_name(self) -> str:
        """Return the task's name."""
        task = self._batch.task
        return "a task that has ended" if task is None else task.get_name()

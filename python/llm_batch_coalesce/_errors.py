"""The package's own errors; what the user's callable raises reaches callers as it is or as a copy (see `_copying`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_batch_coalesce._shown import shown

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence


class CoalesceError(Exception):
    """Base of the errors that the package itself raises, so that one `except` catches them all."""

    # Public names read as they are imported; pickle finds them there too, since the package re-exports them.
    __module__ = "llm_batch_coalesce"


class RecursiveCallError(CoalesceError, RuntimeError):
    """The callable asked for the very key that it is computing, and so would have waited for itself.

    Only that caller gets it: the flight's waiters do not share it, the next of them leads.
    """

    __module__ = "llm_batch_coalesce"


class DeadlockError(CoalesceError, RuntimeError):
    """Waiting would never end: the call that the caller asks for waits, in the end, for the caller.

    Two calls that ask for each other's keys, longer rings of them, or a thread that would block the very event loop
    that computes its key. Only the caller that would close the circle gets it: the flight's waiters do not share it,
    the next of them leads.
    """

    __module__ = "llm_batch_coalesce"


class SharedCallError(CoalesceError):
    """Stands in for the error of a shared call whose class cannot be copied.

    The caller that ran the callable gets the original error. Every other caller gets a copy of its own; where the
    class does not allow one (most often a class of an extension module), it gets this error, with the notes and the
    copied cause of the original.

    Args:
        error_type: Qualified name of the original error's class, such as `"some_package.SomeError"`.
        error_message: What `str()` of the original error gave.

    Attributes:
        error_type: Qualified name of the original error's class.
        error_message: What `str()` of the original error gave.

    Example:
        >>> str(SharedCallError("some_package.SomeError", "no such model"))
        'the shared call raised some_package.SomeError: no such model'
    """

    __module__ = "llm_batch_coalesce"

    error_type: str
    error_message: str

    def __init__(self, error_type: str, error_message: str) -> None:
        # both are args, so that pickle and copy can call the class again
        super().__init__(error_type, error_message)
        self.error_type = error_type
        self.error_message = error_message

    def __str__(self) -> str:
        """Return one line that names the original class and gives its message."""
        raised = f"the shared call raised {self.error_type}"
        return f"{raised}: {self.error_message}" if self.error_message else raised


class MissingKeysError(CoalesceError, LookupError):
    """A call for many keys gave no value for some of them.

    Only callers that asked for such a key get it, and it is not retained: the next caller of the key leads anew.

    Args:
        missing: The keys without a value.
        surplus: Keys that the call gave a value for though nobody asked for them, as a hint.
        values: What the caller's other keys gave.
        reason: What was wrong with the call's result as a whole.

    Attributes:
        missing: The caller's keys without a value.
        surplus: Keys that the call gave a value for though nobody asked for them.
        values: What the caller's other keys gave.
        reason: What was wrong with the call's result as a whole, or None.
    """

    __module__ = "llm_batch_coalesce"

    missing: list[Hashable]
    surplus: list[Hashable]
    values: dict[Hashable, Any]
    reason: str | None

    def __init__(
        self,
        missing: Sequence[Hashable],
        surplus: Sequence[Hashable] = (),
        values: Mapping[Hashable, Any] | None = None,
        reason: str | None = None,
    ) -> None:
        self.missing, self.surplus, self.values, self.reason = list(missing), list(surplus), dict(values or {}), reason
        super().__init__(self.missing, self.surplus, self.values, reason)

    def __str__(self) -> str:
        """Return one line that names the first keys."""
        text = f"the call gave no value for {_listed(self.missing)}"
        if self.reason is not None:
            text += f": {self.reason}"
        return f"{text}; it gave some for {_listed(self.surplus)}, which nobody asked for" if self.surplus else text


def _listed(keys: list[Hashable]) -> str:
    most = 3
    text = ", ".join(map(shown, keys[:most]))
    return text if len(keys) <= most else f"{text} and {len(keys) - most} more"


class StreamLagError(CoalesceError):
    """This reader of a shared stream was so far behind that items which it had not read have left the log.

    Only that reader gets it; see `max_buffered`.

    Args:
        message: What happened.
        missed: How many items it can no longer read.

    Attributes:
        missed: How many items it can no longer read.
    """

    __module__ = "llm_batch_coalesce"

    missed: int

    def __init__(self, message: str, missed: int) -> None:
        super().__init__(message, missed)
        self.missed = missed

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


class CallResultError(CoalesceError, TypeError):
    """`fn` returned something that its coalescer cannot share: a coroutine to threads, a plain value to tasks.

    In `stream()`, what is no iterator; in `get_or_call_many()`, what is neither a mapping nor a sequence.
    """

    __module__ = "llm_batch_coalesce"


class BackendError(CoalesceError):
    """The server that a fleet shares its flights on cannot be used, and there is no going on without it."""

    __module__ = "llm_batch_coalesce.redis"


class RemoteCallError(CoalesceError):
    """A call of another process failed.

    Args:
        error_type: Qualified name of the error's class, such as `"openai.RateLimitError"`.
        error_message: What `str()` of the error gave.
        leader: Which process made the call: its host, process id and coalescer.

    Attributes:
        error_type: Qualified name of the error's class.
        error_message: What `str()` of the error gave.
        leader: Which process made the call.
    """

    __module__ = "llm_batch_coalesce.redis"

    error_type: str
    error_message: str
    leader: str

    def __init__(self, error_type: str, error_message: str, leader: str) -> None:
        super().__init__(error_type, error_message, leader)
        self.error_type, self.error_message, self.leader = error_type, error_message, leader

    def __str__(self) -> str:
        """Return one line that names the original class and gives its message."""
        raised = f"the call of another process ({self.leader}) raised {self.error_type}"
        return f"{raised}: {self.error_message}" if self.error_message else raised


class SerializationError(CoalesceError):
    """A call of another process returned a value that its serializer does not take.

    The caller that made the call has the value; it is not retained.

    Args:
        value_type: Qualified name of the value's class.
        reason: Why the serializer refused it.

    Attributes:
        value_type: Qualified name of the value's class.
        reason: Why the serializer refused it.
    """

    __module__ = "llm_batch_coalesce.redis"

    value_type: str
    reason: str

    def __init__(self, value_type: str, reason: str) -> None:
        super().__init__(value_type, reason)
        self.value_type, self.reason = value_type, reason

    def __str__(self) -> str:
        """Return one line that names the type."""
        return f"the value of type {self.value_type} cannot be shared with other processes: {self.reason}"

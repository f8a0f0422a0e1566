"""The package's own errors; what the user's callable raises reaches callers as it is or as a copy (see `_copying`)."""

from __future__ import annotations


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


class CallResultError(CoalesceError, TypeError):
    """`fn` returned something that its coalescer cannot share: a coroutine to threads, a plain value to tasks."""

    __module__ = "llm_batch_coalesce"

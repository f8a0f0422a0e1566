"""One call, many callers: concurrent callers that give the same key share one underlying call.

    from llm_batch_coalesce import BatchCoalescer

    coalescer = BatchCoalescer(ttl_seconds=5.0)
    coalescer.get_or_call(key=f"define:{term}", fn=lambda: call_llm(f"Define '{term}' in one sentence."))

`BatchCoalescer` is for threads, `AsyncBatchCoalescer` for tasks of any number of event loops.
"""

from llm_batch_coalesce import _core
from llm_batch_coalesce._async import AsyncBatchCoalescer, call_is_lost, cancel_call
from llm_batch_coalesce._copying import copy_error
from llm_batch_coalesce._errors import CallResultError, CoalesceError, RecursiveCallError, SharedCallError
from llm_batch_coalesce._sharing import recursive_error, settle
from llm_batch_coalesce._sync import BatchCoalescer, refuse

__all__ = [
    "AsyncBatchCoalescer",
    "BatchCoalescer",
    "CallResultError",
    "CoalesceError",
    "RecursiveCallError",
    "SharedCallError",
    "__version__",
]

__version__: str = _core.__version__

_core._install(  # noqa: SLF001 - the package is one; the core knows the Python layer by these functions only
    refuse=refuse,
    settle=settle,
    copy_error=copy_error,
    recursive_error=recursive_error,
    cancel_call=cancel_call,
    call_is_lost=call_is_lost,
)

"""One call, many callers: concurrent callers that give the same key share one underlying call.

    from llm_batch_coalesce import BatchCoalescer

    coalescer = BatchCoalescer(ttl_seconds=5.0)
    coalescer.get_or_call(key=f"define:{term}", fn=lambda: call_llm(f"Define '{term}' in one sentence."))

`BatchCoalescer` is for threads, `AsyncBatchCoalescer` for tasks of any number of event loops.
"""

from llm_batch_coalesce import _hooks as _hooks
from llm_batch_coalesce._async import AsyncBatchCoalescer
from llm_batch_coalesce._core import Retain, __version__
from llm_batch_coalesce._errors import (
    CallResultError,
    CoalesceError,
    DeadlockError,
    MissingKeysError,
    RecursiveCallError,
    SharedCallError,
    StreamLagError,
)
from llm_batch_coalesce._reports import FlightInfo, Outcome, Stats
from llm_batch_coalesce._requests import request_key
from llm_batch_coalesce._shapes import AsyncRequestCoalescer, BatchCoalesce, CoalescerStats, RequestCoalescer
from llm_batch_coalesce._sync import BatchCoalescer

__all__ = [
    "AsyncBatchCoalescer",
    "AsyncRequestCoalescer",
    "BatchCoalesce",
    "BatchCoalescer",
    "CallResultError",
    "CoalesceError",
    "CoalescerStats",
    "DeadlockError",
    "FlightInfo",
    "MissingKeysError",
    "Outcome",
    "RecursiveCallError",
    "RequestCoalescer",
    "Retain",
    "SharedCallError",
    "Stats",
    "StreamLagError",
    "__version__",
    "request_key",
]

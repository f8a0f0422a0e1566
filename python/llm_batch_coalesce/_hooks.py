"""Gives the core the functions of the Python layer that it calls; importing this module does it."""

from llm_batch_coalesce._copying import copy_error, stand_in
from llm_batch_coalesce._core import _install
from llm_batch_coalesce._many import distinct, gather_lists, match_values, single
from llm_batch_coalesce._reports import Outcome, report_over_age
from llm_batch_coalesce._sharing import cancelled_error, deadlock_error, recursive_error, settle, timeout_error
from llm_batch_coalesce._store import adapt_store, report_store_error
from llm_batch_coalesce._streams import close_both, iterate, lost_stream_error, stream_lag_error
from llm_batch_coalesce._sync import refuse
from llm_batch_coalesce._tasks import call_is_lost, cancel_call, cancel_pump

_install(
    refuse=refuse,
    settle=settle,
    copy_error=copy_error,
    recursive_error=recursive_error,
    deadlock_error=deadlock_error,
    timeout_error=timeout_error,
    cancelled_error=cancelled_error,
    outcome=Outcome,
    iterate=iterate,
    broken_stream_error=stand_in,
    lost_stream_error=lost_stream_error,
    stream_lag_error=stream_lag_error,
    adapt_store=adapt_store,
    report_store_error=report_store_error,
    match_values=match_values,
    single=single,
    distinct=distinct,
    gather=gather_lists,
    close_both=close_both,
    report_over_age=report_over_age,
    cancel_call=cancel_call,
    cancel_pump=cancel_pump,
    call_is_lost=call_is_lost,
)

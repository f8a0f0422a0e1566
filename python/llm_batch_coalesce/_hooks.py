"""Gives the core the functions of the Python layer that it calls; importing this module does it."""

from llm_batch_coalesce._async import call_is_lost, cancel_call
from llm_batch_coalesce._copying import copy_error
from llm_batch_coalesce._core import _install
from llm_batch_coalesce._reports import Outcome, report_over_age
from llm_batch_coalesce._sharing import cancelled_error, deadlock_error, recursive_error, settle, timeout_error
from llm_batch_coalesce._sync import refuse

_install(
    refuse=refuse,
    settle=settle,
    copy_error=copy_error,
    recursive_error=recursive_error,
    deadlock_error=deadlock_error,
    timeout_error=timeout_error,
    cancelled_error=cancelled_error,
    outcome=Outcome,
    report_over_age=report_over_age,
    cancel_call=cancel_call,
    call_is_lost=call_is_lost,
)

//! The Python layer's part in a call, handed to the core when the package is imported.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// Functions of the Python layer. The core knows them by these names only.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(super) struct Hooks {
    /// `(fn, coroutine) -> exception`: closes the coroutine; the error of a callable that threads cannot share.
    pub(super) refuse: Py<PyAny>,
    /// `(exception, private_errors, error_ttl_seconds | None, coalescer's name) -> (template, seconds | None) | None`: how
    /// a failed call is shared and, where that is not fixed, how long it is retained; `None` for not shared at all.
    pub(super) settle: Py<PyAny>,
    /// `(template) -> exception`: a copy to raise.
    pub(super) copy_error: Py<PyAny>,
    /// `(key, coalescer's name) -> exception`: the error of a call that asks for its own key.
    pub(super) recursive_error: Py<PyAny>,
    /// The same of a caller that would close a circle of waits.
    pub(super) deadlock_error: Py<PyAny>,
    /// `(key, coalescer's name, timeout) -> exception`
    pub(super) timeout_error: Py<PyAny>,
    /// `(key, coalescer's name, in a task) -> exception`: the error of a waiter whose key was cancelled.
    pub(super) cancelled_error: Py<PyAny>,
    /// `(value, role, waiters, seconds) -> Outcome`
    pub(super) outcome: Py<PyAny>,
    /// `(fn) -> iterator`: begins an upstream that readers pull.
    pub(super) iterate: Py<PyAny>,
    /// `(error) -> template`: what others get of a stream that has ended with an error for its leader only.
    pub(super) broken_stream_error: Py<PyAny>,
    /// `(key, coalescer's name) -> exception`: the error of a reader whose stream's source has vanished.
    pub(super) lost_stream_error: Py<PyAny>,
    /// `(key, coalescer's name, items) -> exception`: the error of a reader that is too far behind.
    pub(super) stream_lag_error: Py<PyAny>,
    /// `(store, for tasks) -> store`: checks a store, and makes all kinds one: `get(key)` gives the store itself for what
    /// it does not have, and `set(key, value, seconds)`.
    pub(super) adapt_store: Py<PyAny>,
    /// `(error, verb, key, coalescer's name) -> None`: logs a store that has failed.
    pub(super) report_store_error: Py<PyAny>,
    /// `(keys, result) -> list`: the values of a call for many keys, in their order; a `MissingKeysError` in the place of
    /// each that it lacks.
    pub(super) match_values: Py<PyAny>,
    /// `(fn, key) -> callable`: a call for many keys as one for this key alone.
    pub(super) single: Py<PyAny>,
    /// `(keys) -> list`: without those that are equal to one before.
    pub(super) distinct: Py<PyAny>,
    /// `(keys, values, errors) -> dict`: what a caller of many keys gets, or raises what it is to raise. Of each key there is
    /// a value, or an error in the place of None.
    pub(super) gather: Py<PyAny>,
    /// `(iterator, what it iterates over | None) -> None`: closes both, if they can be closed.
    pub(super) close_both: Py<PyAny>,
    /// `(key, coalescer's name, seconds) -> None`: logs a flight that is over age.
    pub(super) report_over_age: Py<PyAny>,
    /// `(weak task) -> None`: cancels a call's task, from any thread.
    pub(super) cancel_call: Py<PyAny>,
    /// `(weak task, () -> bool) -> None`: the same for a stream's pump, unless it ends, as is asked on its own loop.
    pub(super) cancel_pump: Py<PyAny>,
    /// `(weak task) -> bool`: whether it can never finish.
    pub(super) call_is_lost: Py<PyAny>,
}

static HOOKS: PyOnceLock<Hooks> = PyOnceLock::new();

impl Hooks {
    pub(super) fn get(py: Python<'_>) -> PyResult<&Hooks> {
        HOOKS
            .get(py)
            .ok_or_else(|| PyRuntimeError::new_err("llm_batch_coalesce._core was imported on its own"))
    }
}

/// Installs the Python layer's functions; those given first stay, since a reload brings the same ones.
#[pyfunction]
#[pyo3(signature = (**hooks))]
pub(super) fn _install(py: Python<'_>, hooks: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
    if let Some(hooks) = hooks {
        let _ = HOOKS.set(py, hooks.extract()?);
    }
    Ok(())
}

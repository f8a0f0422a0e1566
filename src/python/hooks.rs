//! The Python layer's part in a call, handed to the core when the package is imported.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// Functions of the Python layer. The core knows them by these names only.
pub(super) struct Hooks {
    /// `(fn, coroutine) -> exception`: closes the coroutine; the error of a callable that threads cannot share.
    pub(super) refuse: Py<PyAny>,
    /// `(coalescer, exception) -> (template, retain) | None`: how a failed call is shared; `None` for not at all.
    pub(super) settle: Py<PyAny>,
    /// `(template) -> exception`: a copy to raise.
    pub(super) copy_error: Py<PyAny>,
    /// `(key) -> exception`: the error of a call that asks for its own key.
    pub(super) recursive_error: Py<PyAny>,
    /// `(weak task) -> None`: cancels a call's task, from any thread.
    pub(super) cancel_call: Py<PyAny>,
    /// `(weak task) -> bool`: whether it can never finish.
    pub(super) call_is_lost: Py<PyAny>,
    /// This module's own [`set_all_done`](super::family::set_all_done) as an object.
    pub(super) set_all_done: Py<PyAny>,
}

static HOOKS: PyOnceLock<Hooks> = PyOnceLock::new();

impl Hooks {
    pub(super) fn get(py: Python<'_>) -> PyResult<&Hooks> {
        HOOKS
            .get(py)
            .ok_or_else(|| PyRuntimeError::new_err("llm_batch_coalesce._core was imported on its own"))
    }
}

/// Installs the Python layer's functions; those given first stay.
#[pyfunction]
#[pyo3(signature = (*, refuse, settle, copy_error, recursive_error, cancel_call, call_is_lost))]
pub(super) fn _install(
    py: Python<'_>,
    refuse: Py<PyAny>,
    settle: Py<PyAny>,
    copy_error: Py<PyAny>,
    recursive_error: Py<PyAny>,
    cancel_call: Py<PyAny>,
    call_is_lost: Py<PyAny>,
) -> PyResult<()> {
    let set_all_done = wrap_pyfunction!(super::family::set_all_done, py)?.into_any().unbind();
    let hooks =
        Hooks { refuse, settle, copy_error, recursive_error, cancel_call, call_is_lost, set_all_done };
    // A second import (a reload) brings the same functions.
    let _ = HOOKS.set(py, hooks);
    Ok(())
}

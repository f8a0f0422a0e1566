//! The core's view of Python: what keys, outcomes and tasks are, and how tasks are woken.

use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyList;

use super::ffi;
use super::hooks::Hooks;
use crate::family::Family;
use crate::waiter::Waiter;

pub(super) struct Python3;

pub(super) enum Outcome {
    Value(Py<PyAny>),
    /// A template that is never raised: each caller gets a copy.
    Error(Py<PyAny>),
}

impl Outcome {
    /// What a caller gets: the value itself, or a copy of the error.
    pub(super) fn share<'py>(&self, py: Python<'py>) -> Shared<'py> {
        match self {
            Self::Value(value) => Shared::Value(value.bind(py).clone()),
            Self::Error(template) => Shared::Error(template.bind(py).clone()),
        }
    }
}

/// An outcome on its way to a caller. Taken in the table, turned into a result outside of it.
pub(super) enum Shared<'py> {
    Value(Bound<'py, PyAny>),
    Error(Bound<'py, PyAny>),
}

impl<'py> Shared<'py> {
    #[inline]
    pub(super) fn into_result(self) -> PyResult<Bound<'py, PyAny>> {
        match self {
            Self::Value(value) => Ok(value),
            Self::Error(template) => {
                let copy = Hooks::get(template.py())?.copy_error.bind(template.py()).call1((&template,))?;
                Err(PyErr::from_value(copy))
            }
        }
    }
}

/// A waiter's own future, and the loop that it belongs to.
pub(super) struct TaskWaiter {
    pub(super) event_loop: Py<PyAny>,
    pub(super) future: Py<PyAny>,
}

/// See [`Family::wake_fan`]; set when the module is initialised.
pub(super) static WAKE_FAN: AtomicUsize = AtomicUsize::new(1);

impl Family for Python3 {
    type Key = Py<PyAny>;
    type Outcome = Outcome;
    type Error = PyErr;
    type Task = TaskWaiter;
    /// A weak reference to the task.
    type Call = Py<PyAny>;

    fn wake_fan() -> usize {
        WAKE_FAN.load(Ordering::Relaxed)
    }

    #[inline]
    fn same(stored: &Py<PyAny>, wanted: &Py<PyAny>) -> PyResult<bool> {
        ffi::same_key(stored, wanted)
    }

    fn wake_tasks(waiters: Vec<std::sync::Arc<Waiter<Self>>>) {
        wake_tasks(ffi::attached(), &waiters);
    }

    fn share_call(call: &Py<PyAny>) -> Py<PyAny> {
        call.clone_ref(ffi::attached())
    }

    fn cancel_call(call: Py<PyAny>) {
        let py = ffi::attached();
        if let Err(error) = Hooks::get(py).and_then(|hooks| hooks.cancel_call.bind(py).call1((call,))) {
            error.write_unraisable(py, None);
        }
    }

    fn call_is_lost(call: &Py<PyAny>) -> bool {
        let py = ffi::attached();
        let answer = Hooks::get(py)
            .and_then(|hooks| hooks.call_is_lost.bind(py).call1((call,)))
            .and_then(|answer| answer.is_truthy());
        answer.unwrap_or_else(|error| {
            error.write_unraisable(py, None);
            false
        })
    }
}

/// The loop that runs in this thread; `None` outside of any.
pub(super) fn running_loop(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static GET: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    GET.import(py, "asyncio", "_get_running_loop")?.call0()
}

/// Sets the futures of the running loop here and now, those of each other loop with one call into it.
///
/// A loop that cannot be told holds up no other: its error goes to `sys.unraisablehook`.
fn wake_tasks(py: Python<'_>, waiters: &[std::sync::Arc<Waiter<Python3>>]) {
    let report = |result: PyResult<()>| {
        if let Err(error) = result {
            error.write_unraisable(py, None);
        }
    };
    let here = running_loop(py).ok();
    let mut elsewhere: Vec<(&Py<PyAny>, Vec<&Py<PyAny>>)> = Vec::new();
    for task in waiters.iter().filter_map(|waiter| waiter.task()) {
        if here.as_ref().is_some_and(|here| here.is(&task.event_loop)) {
            report(set_done(task.future.bind(py)));
            continue;
        }
        match elsewhere.iter_mut().find(|(event_loop, _)| event_loop.is(&task.event_loop)) {
            Some((_, futures)) => futures.push(&task.future),
            None => elsewhere.push((&task.event_loop, vec![&task.future])),
        }
    }
    for (event_loop, futures) in elsewhere {
        report(wake_elsewhere(event_loop.bind(py), &futures));
    }
}

fn wake_elsewhere(event_loop: &Bound<'_, PyAny>, futures: &[&Py<PyAny>]) -> PyResult<()> {
    let py = event_loop.py();
    let set_all = Hooks::get(py)?.set_all_done.bind(py);
    let futures = PyList::new(py, futures)?;
    match event_loop.call_method1(intern!(py, "call_soon_threadsafe"), (set_all, futures)) {
        // The loop is closed: its tasks will never run again.
        Err(_) if event_loop.call_method0(intern!(py, "is_closed"))?.is_truthy()? => Ok(()),
        sent => sent.map(drop),
    }
}

/// A future says "done" only; the outcome is read from the flight.
fn set_done(future: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = future.py();
    match future.call_method1(intern!(py, "set_result"), (py.None(),)) {
        // Its caller was cancelled a moment ago.
        Err(_) if future.call_method0(intern!(py, "done"))?.is_truthy()? => Ok(()),
        set => set.map(drop),
    }
}

/// Called on the loop that the futures belong to.
#[pyfunction]
pub(super) fn set_all_done(futures: &Bound<'_, PyList>) -> PyResult<()> {
    futures.iter().try_for_each(|future| set_done(&future))
}

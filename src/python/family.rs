//! The core's view of Python: what keys, outcomes and tasks are, and how tasks are woken.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyString};

use super::ffi::{self, Held};
use super::hooks::Hooks;
use super::signal::{self, Signal};
use crate::family::Family;
use crate::waiter::Waiter;

pub(super) struct Python3;

pub(super) enum Outcome {
    Value(Held),
    /// A template that is never raised: each caller gets a copy.
    Error(Held),
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
            Self::Error(template) => Err(copied(&template)),
        }
    }
}

/// A copy of an error, for one caller to raise.
#[cold]
fn copied(template: &Bound<'_, PyAny>) -> PyErr {
    let py = template.py();
    let copy = Hooks::get(py).and_then(|hooks| ffi::call(hooks.copy_error.bind(py), [template]));
    copy.map_or_else(|error| error, PyErr::from_value)
}

/// A waiter's own future, and the loop that it belongs to.
pub(super) struct TaskWaiter {
    pub(super) event_loop: Py<PyAny>,
    pub(super) future: Py<PyAny>,
}

/// The tasks of a flight that is led on an event loop, both held weakly.
pub(super) struct TaskCall {
    /// The call's own task.
    pub(super) task: Py<PyAny>,
    /// The task of the caller that leads.
    pub(super) caller: Py<PyAny>,
}

/// See [`Family::wake_fan`]; set when the module is initialised.
pub(super) static WAKE_FAN: AtomicUsize = AtomicUsize::new(1);

impl Family for Python3 {
    type Key = Py<PyAny>;
    type Outcome = Outcome;
    type Error = PyErr;
    type Task = TaskWaiter;
    type Call = TaskCall;

    fn wake_fan() -> usize {
        WAKE_FAN.load(Ordering::Relaxed)
    }

    #[inline]
    fn same(stored: &Py<PyAny>, wanted: &Py<PyAny>) -> PyResult<bool> {
        ffi::same_key(stored, wanted)
    }

    fn wake_tasks(waiters: Vec<std::sync::Arc<Waiter<Self>>>) {
        let py = ffi::attached();
        undisturbed(py, || wake_tasks(py, &waiters));
    }

    fn share_call(call: &TaskCall) -> TaskCall {
        let py = ffi::attached();
        TaskCall { task: call.task.clone_ref(py), caller: call.caller.clone_ref(py) }
    }

    fn cancel_call(call: TaskCall) {
        let py = ffi::attached();
        undisturbed(py, || {
            let cancel = || ffi::call(Hooks::get(py)?.cancel_call.bind(py), [call.task.bind(py)]);
            report(py, for_sure(py, cancel));
        });
    }

    fn call_is_lost(call: &TaskCall) -> bool {
        let py = ffi::attached();
        let answer = Hooks::get(py)
            .and_then(|hooks| ffi::call(hooks.call_is_lost.bind(py), [call.task.bind(py)]))
            .and_then(|answer| answer.is_truthy());
        report(py, answer).unwrap_or(false)
    }

    fn task_is_lost(task: &TaskWaiter) -> bool {
        let py = ffi::attached();
        undisturbed(py, || report(py, is_closed(task.event_loop.bind(py)))).unwrap_or(false)
    }

    fn report_over_age(name: Option<&str>, key: &Py<PyAny>, age: Duration) {
        let py = ffi::attached();
        let logged = Hooks::get(py).and_then(|hooks| {
            let (name, age) = (name.into_pyobject(py)?, age.as_secs_f64().into_pyobject(py)?);
            ffi::call(hooks.report_over_age.bind(py), [key.bind(py), &name, &age])
        });
        report(py, logged);
    }
}

thread_local! {
    /// What a signal handler raised in this thread while tasks were being woken.
    static INTERRUPT: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Raises what a signal handler raised while others were being served, now that they have been.
pub(super) fn check_interrupt() -> PyResult<()> {
    INTERRUPT.take().map_or(Ok(()), Err)
}

/// Hands an error that no caller can get to `sys.unraisablehook`. What is no `Exception` comes from a signal handler, and
/// is for this thread.
pub(super) fn report<T>(py: Python<'_>, result: PyResult<T>) -> Option<T> {
    result
        .map_err(|error| {
            if error.is_instance_of::<PyException>(py) {
                error.write_unraisable(py, None);
            } else {
                INTERRUPT.set(Some(error));
            }
        })
        .ok()
}

/// Tells Python something that must be heard, though a signal handler may raise before or after. Being told twice does no
/// harm.
pub(super) fn for_sure<R>(py: Python<'_>, tell: impl Fn() -> PyResult<R>) -> PyResult<R> {
    match tell() {
        Err(error) if !error.is_instance_of::<PyException>(py) => tell().and(Err(error)),
        told => told,
    }
}

/// Runs Python code that has nothing to do with an error that may be on its way: leads and seats are also dropped while
/// frames are unwound.
pub(super) fn undisturbed<R>(py: Python<'_>, run: impl FnOnce() -> R) -> R {
    let on_its_way = PyErr::take(py);
    let result = run();
    if let Some(error) = on_its_way {
        error.restore(py);
    }
    result
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
    let here = running_loop(py).ok();
    let mut elsewhere: Vec<(&Py<PyAny>, Vec<&Py<PyAny>>)> = Vec::new();
    let mut signals = Vec::new();
    for task in waiters.iter().filter_map(|waiter| waiter.task()) {
        if here.as_ref().is_some_and(|here| here.is(&task.event_loop)) {
            let future = &task.future;
            if future.bind(py).is_exact_instance_of::<Signal>() {
                signals.push(future);
            } else {
                report(py, set_done(future.bind(py)));
            }
            continue;
        }
        match elsewhere.iter_mut().find(|(event_loop, _)| event_loop.is(&task.event_loop)) {
            Some((_, futures)) => futures.push(&task.future),
            None => elsewhere.push((&task.event_loop, vec![&task.future])),
        }
    }
    if let Some(here) = here.filter(|_| !signals.is_empty()) {
        // Not here and now: another task is running.
        report(py, tell(intern!(py, "call_soon"), &here, &signals));
    }
    for (event_loop, futures) in elsewhere {
        report(py, tell(intern!(py, "call_soon_threadsafe"), event_loop.bind(py), &futures));
    }
}

/// Has a loop set these futures.
fn tell(how: &Bound<'_, PyString>, event_loop: &Bound<'_, PyAny>, futures: &[&Py<PyAny>]) -> PyResult<()> {
    let py = event_loop.py();
    let set_all = set_all(py)?;
    // The first one last, where it is taken from.
    let futures = PyList::new(py, futures.iter().rev())?;
    let tell = || match ffi::call_method(how, [event_loop, set_all, event_loop, &futures]) {
        // The loop is closed: its tasks will never run again.
        Err(_) if is_closed(event_loop)? => Ok(()),
        told => told.map(drop),
    };
    for_sure(py, tell)
}

fn is_closed(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    ffi::call_method(intern!(event_loop.py(), "is_closed"), [event_loop])?.is_truthy()
}

/// A future says "done" only; the outcome is read from the flight.
fn set_done(future: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = future.py();
    let is_done = || ffi::call_method(intern!(py, "done"), [future]).and_then(|done| done.is_truthy());
    match ffi::call_method(intern!(py, "set_result"), [future, py.None().bind(py)]) {
        // It was done before if its caller was cancelled a moment ago.
        Err(error) if error.is_instance_of::<PyException>(py) && is_done()? => Ok(()),
        set => set.map(drop),
    }
}

/// Called on the loop that the futures belong to; takes them from the list's end.
///
/// A task that is resumed may run the loop in its own step, or end it by an error that is no `Exception`. So whatever is
/// left has a callback of its own.
#[pyfunction]
fn set_all_done(event_loop: &Bound<'_, PyAny>, futures: &Bound<'_, PyList>) -> PyResult<()> {
    let py = futures.py();
    if futures.len() > 1 {
        let tell =
            || ffi::call_method(intern!(py, "call_soon"), [event_loop, set_all(py)?, event_loop, futures]);
        if let Err(error) = tell() {
            // As in `tell`: then it is the rest's callback that resumes them all.
            return tell().and(Err(error));
        }
    }
    while let Some(last) = futures.len().checked_sub(1) {
        let future = futures.get_item(last)?;
        futures.del_item(last)?;
        match signal::fire(&future).and_then(|fired| if fired { Ok(()) } else { set_done(&future) }) {
            Err(error) if !error.is_instance_of::<PyException>(py) => return Err(error),
            set => drop(report(py, set)),
        }
    }
    check_interrupt()
}

fn set_all(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static SET_ALL: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let make = || Ok::<_, PyErr>(wrap_pyfunction!(set_all_done, py)?.into_any().unbind());
    SET_ALL.get_or_try_init(py, make).map(|function| function.bind(py))
}

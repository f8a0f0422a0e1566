//! A future for many waits, whose tasks are woken by the hundred in one callback of their loop.
//!
//! `asyncio` takes every object for a future that has its protocol, which is that of `asyncio.Future` (see
//! `asyncio.isfuture`). Waking a task through a future of asyncio's own costs a new future, a call of the loop's
//! `call_soon` and a handle, most of it Python code. Here the loop gets one callback for all tasks that wake at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

use super::ffi;

#[pyclass(frozen, module = "llm_batch_coalesce._core")]
pub(super) struct Signal {
    event_loop: Py<PyAny>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of the protocol: a task was given it by `await`.
    blocking: bool,
    standing: Standing,
    /// What resumes the task, and the context that it runs in.
    callback: Option<(Py<PyAny>, Option<Py<PyAny>>)>,
}

#[derive(Default)]
enum Standing {
    #[default]
    Waiting,
    Done,
    Cancelled(Option<Py<PyAny>>),
}

impl Signal {
    pub(super) fn new(event_loop: &Bound<'_, PyAny>) -> Self {
        Self { event_loop: event_loop.clone().unbind(), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it ready for another wait of the same task.
    pub(super) fn rearm(&self) {
        let old = std::mem::take(&mut *self.lock());
        drop(old);
    }

    /// Resumes its task. Only in a callback of its loop, where no other task is running.
    fn fire(slf: &Bound<'_, Self>) -> PyResult<()> {
        let mut state = slf.get().lock();
        if !matches!(state.standing, Standing::Waiting) {
            return Ok(());
        }
        state.standing = Standing::Done;
        let callback = state.callback.take();
        drop(state);
        let Some((function, context)) = callback else { return Ok(()) };
        let function = function.bind(slf.py());
        match context {
            Some(context) => {
                ffi::call_method(intern!(slf.py(), "run"), [context.bind(slf.py()), function, slf.as_any()])
            }
            None => ffi::call(function, [slf.as_any()]),
        }
        .map(drop)
    }

    /// Has the loop resume the task soon.
    fn resume_soon(slf: &Bound<'_, Self>, callback: (Py<PyAny>, Option<Py<PyAny>>)) -> PyResult<()> {
        static NAMES: PyOnceLock<Py<PyTuple>> = PyOnceLock::new();
        let py = slf.py();
        let names = NAMES.get_or_try_init(py, || PyTuple::new(py, ["context"]).map(Bound::unbind))?.bind(py);
        let (function, context) = (callback.0.bind(py), callback.1.into_pyobject(py)?);
        let arguments = [slf.get().event_loop.bind(py), function, slf.as_any(), &context];
        ffi::call_method_named(intern!(py, "call_soon"), arguments, names).map(drop)
    }
}

/// Resumes the task of a signal; false if it is none. In a callback of its loop.
pub(super) fn fire(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    match object.cast::<Signal>() {
        Ok(signal) => Signal::fire(signal).map(|()| true),
        Err(_) => Ok(false),
    }
}

/// The protocol of futures, as far as tasks use it.
#[pymethods]
impl Signal {
    #[getter(_asyncio_future_blocking)]
    fn blocking(&self) -> bool {
        self.lock().blocking
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        self.lock().blocking = blocking;
    }

    fn get_loop(&self, py: Python<'_>) -> Py<PyAny> {
        self.event_loop.clone_ref(py)
    }

    fn done(&self) -> bool {
        !matches!(self.lock().standing, Standing::Waiting)
    }

    fn cancelled(&self) -> bool {
        matches!(self.lock().standing, Standing::Cancelled(_))
    }

    fn result(&self, py: Python<'_>) -> PyResult<()> {
        static CANCELLED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        static INVALID: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let state = self.lock();
        let (class, message) = match &state.standing {
            Standing::Done => return Ok(()),
            Standing::Waiting => (&INVALID, None),
            Standing::Cancelled(message) => {
                (&CANCELLED, Some(message.as_ref().map(|message| message.clone_ref(py))))
            }
        };
        drop(state);
        Err(match message {
            None => PyErr::from_value(class.import(py, "asyncio", "InvalidStateError")?.call0()?),
            Some(None) => PyErr::from_value(class.import(py, "asyncio", "CancelledError")?.call0()?),
            Some(Some(message)) => {
                PyErr::from_value(class.import(py, "asyncio", "CancelledError")?.call1((message,))?)
            }
        })
    }

    #[pyo3(signature = (msg = None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let mut state = slf.get().lock();
        if !matches!(state.standing, Standing::Waiting) {
            return Ok(false);
        }
        state.standing = Standing::Cancelled(msg);
        let callback = state.callback.take();
        drop(state);
        callback.map_or(Ok(()), |callback| Self::resume_soon(slf, callback)).map(|()| true)
    }

    #[pyo3(signature = (callback, /, *, context = None))]
    fn add_done_callback(
        slf: &Bound<'_, Self>,
        callback: Py<PyAny>,
        context: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let mut state = slf.get().lock();
        if matches!(state.standing, Standing::Waiting) {
            let old = state.callback.replace((callback, context));
            drop(state);
            drop(old);
            return Ok(());
        }
        drop(state);
        Self::resume_soon(slf, (callback, context))
    }

    fn __await__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(slf: &Bound<'_, Self>) -> PyResult<Option<Py<Self>>> {
        let mut state = slf.get().lock();
        if matches!(state.standing, Standing::Waiting) {
            state.blocking = true;
            return Ok(Some(slf.clone().unbind()));
        }
        drop(state);
        slf.get().result(slf.py()).map(|()| None)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        // Nobody is stopped while holding the lock.
        let state = self.lock();
        if let Some((function, context)) = &state.callback {
            visit.call(function)?;
            visit.call(context)?;
        }
        match &state.standing {
            Standing::Cancelled(message) => visit.call(message),
            Standing::Waiting | Standing::Done => Ok(()),
        }
    }

    fn __clear__(&self) {
        self.rearm();
    }
}

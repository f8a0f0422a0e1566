//! The iterator over a shared stream for threads. An item enters no Python frame of this package.

use std::mem::replace;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::IntoIter;

use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::coalescer::Coalescer;
use super::ffi::Held;
use super::reader::StreamReader;
use super::streams::Asked;
use crate::stream::Turn;

/// Iterates over a shared stream.
#[pyclass(frozen, weakref, module = "llm_batch_coalesce._core")]
pub(super) struct ThreadStream {
    coalescer: Py<Coalescer>,
    key: Py<PyAny>,
    r#fn: Py<PyAny>,
    asked: Asked,
    state: Mutex<State>,
}

#[derive(Default)]
enum State {
    /// Not begun, or not joined again.
    #[default]
    Outside,
    Reading(StreamReader, IntoIter<Held>),
    /// A thread is in it.
    Busy,
    Over,
}

impl ThreadStream {
    pub(super) fn new(
        coalescer: &Bound<'_, Coalescer>,
        key: &Bound<'_, PyAny>,
        r#fn: &Bound<'_, PyAny>,
        asked: Asked,
    ) -> Self {
        Self {
            coalescer: coalescer.clone().unbind(),
            key: key.clone().unbind(),
            r#fn: r#fn.clone().unbind(),
            asked,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the state out for one thread.
    fn enter(&self) -> PyResult<State> {
        let state = replace(&mut *self.lock(), State::Busy);
        match state {
            State::Busy => Err(PyValueError::new_err("stream already executing")),
            state => Ok(state),
        }
    }

    fn put_back(&self, state: State) {
        *self.lock() = state;
    }

    /// The next item, and the state after it.
    fn advance(&self, py: Python<'_>, mut state: State) -> PyResult<Option<(Py<PyAny>, State)>> {
        let (coalescer, key, r#fn) = (self.coalescer.bind(py), self.key.bind(py), self.r#fn.bind(py));
        loop {
            let (reader, mut items) = match state {
                State::Reading(reader, items) => (reader, items),
                State::Outside => {
                    let reader = StreamReader::open(coalescer, key, self.asked)?;
                    if reader.begins() {
                        reader.pull_next(r#fn)?;
                    }
                    (reader, Vec::new().into_iter())
                }
                State::Over | State::Busy => return Ok(None),
            };
            if let Some(item) = items.next() {
                return Ok(Some((item.into_object(), State::Reading(reader, items))));
            }
            state = match reader.turn(py)? {
                Turn::Items(items) => {
                    let items: Vec<_> = items.into_iter().map(Held::from).collect();
                    State::Reading(reader, items.into_iter())
                }
                Turn::Wait => {
                    reader.block(py, None)?;
                    State::Reading(reader, items)
                }
                Turn::Pull => {
                    reader.takes_duty();
                    reader.pull_next(r#fn)?;
                    State::Reading(reader, items)
                }
                Turn::StartOver => State::Outside,
                Turn::Finished | Turn::Failed(_) | Turn::Broken(_) | Turn::Lagged(_) => return Ok(None),
            };
        }
    }
}

#[pymethods]
impl ThreadStream {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let state = self.enter()?;
        match self.advance(py, state) {
            Ok(Some((item, state))) => {
                self.put_back(state);
                Ok(Some(item))
            }
            Ok(None) => {
                self.put_back(State::Over);
                Ok(None)
            }
            Err(error) => {
                self.put_back(State::Over);
                Err(error)
            }
        }
    }

    /// Leave the stream; the last reader to go closes upstream, whose errors are raised here.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let state = self.enter()?;
        self.put_back(State::Over);
        if let State::Reading(reader, _) = &state { reader.leave_now(py) } else { Ok(()) }
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }

    /// For annotations: `ThreadStream[str]`.
    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        item: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        class.py().import("types")?.getattr("GenericAlias")?.call1((class, item))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.coalescer)?;
        visit.call(&self.key)?;
        visit.call(&self.r#fn)?;
        // Nobody is stopped while holding the lock.
        match &*self.lock() {
            State::Reading(reader, items) => {
                reader.show(&visit)?;
                items.as_slice().iter().try_for_each(|item| visit.call(item.object()))
            }
            State::Outside | State::Busy | State::Over => Ok(()),
        }
    }

    fn __clear__(&self) {
        // Leaving the stream may run code that comes here.
        let state = replace(&mut *self.lock(), State::Over);
        drop(state);
    }
}

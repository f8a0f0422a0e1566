//! How failed calls are shared, and the errors that concern one caller only.

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::coalescer::Coalescer;
use super::family::{Outcome, Python3, check_interrupt};
use super::ffi;
use super::hooks::Hooks;
use super::options::{self, ErrorTtl, Ttl};
use crate::lead::Lead;
use crate::map::Map;

impl Coalescer {
    /// Publishes how a call failed. The error itself is for the leader's own caller; false if that is gone and nobody
    /// else has it.
    pub(super) fn settle_error(
        &self,
        lead: Lead<Python3>,
        error: &Bound<'_, PyAny>,
        ttl: Option<Ttl>,
    ) -> PyResult<bool> {
        // If this raises, the lead is dropped and so handed over.
        let delivered = match self.shared_error(error, ttl)? {
            None => lead.abandon(true),
            Some((template, ttl)) => {
                lead.complete(Outcome::Error(template.into()), ttl.nanos, true);
                true
            }
        };
        check_interrupt()?;
        Ok(delivered)
    }

    /// How an error is shared: the template of its copies, and its TTL. `None` if it is not shared at all.
    pub(super) fn shared_error(
        &self,
        error: &Bound<'_, PyAny>,
        ttl: Option<Ttl>,
    ) -> PyResult<Option<(Py<PyAny>, Ttl)>> {
        let py = error.py();
        let (none, nothing) = (py.None().into_bound(py), PyTuple::empty(py));
        let private = self.options().private_errors.as_ref().map_or(&nothing, |classes| classes.bind(py));
        let decide = match &self.options().error_ttl {
            ErrorTtl::Decided(decide) => decide.bind(py),
            ErrorTtl::Same | ErrorTtl::Fixed(_) => &none,
        };
        let name = self.options().name.as_deref().into_pyobject(py)?;
        let settled = ffi::call(Hooks::get(py)?.settle.bind(py), [error, private, decide, &name])?;
        if settled.is_none() {
            return Ok(None);
        }
        let (template, seconds): (Py<PyAny>, Option<Bound<'_, PyAny>>) = settled.extract()?;
        let ttl = match (seconds, &self.options().error_ttl) {
            (Some(seconds), _) => options::ttl("error_ttl_seconds", &seconds)?,
            (None, ErrorTtl::Fixed(ttl)) => *ttl,
            (None, ErrorTtl::Same | ErrorTtl::Decided(_)) => ttl.unwrap_or(self.options().ttl),
        };
        self.note_error();
        Ok(Some((template, ttl)))
    }

    pub(super) fn recursive_error(&self, key: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        let py = key.py();
        let name = self.options().name.as_deref().into_pyobject(py)?;
        Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.recursive_error.bind(py), [key, &name])?))
    }

    pub(super) fn deadlock_error(&self, key: &Bound<'_, PyAny>) -> PyResult<PyErr> {
        let py = key.py();
        let name = self.options().name.as_deref().into_pyobject(py)?;
        Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.deadlock_error.bind(py), [key, &name])?))
    }
}

pub(super) fn timeout_error(
    map: &Map<Python3>,
    key: &Bound<'_, PyAny>,
    timeout: &Bound<'_, PyAny>,
) -> PyResult<PyErr> {
    let py = key.py();
    let name = map.settings().name.as_deref().into_pyobject(py)?;
    Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.timeout_error.bind(py), [key, &name, timeout])?))
}

/// The error of a waiter whose key was cancelled.
pub(super) fn cancelled_error(map: &Map<Python3>, key: &Bound<'_, PyAny>, in_task: bool) -> PyResult<PyErr> {
    let py = key.py();
    let name = map.settings().name.as_deref().into_pyobject(py)?;
    let in_task = in_task.into_pyobject(py)?;
    Ok(PyErr::from_value(ffi::call(Hooks::get(py)?.cancelled_error.bind(py), [key, &name, &in_task])?))
}

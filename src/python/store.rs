//! The store behind a coalescer, as threads use it; for tasks the Python layer does.

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;

use super::coalescer::Coalescer;
use super::family::Python3;
use super::ffi;
use super::options::Ttl;
use super::retain::Retain;
use crate::lead::Lead;

impl Coalescer {
    /// Asks the store for a key. One that fails has nothing.
    pub(super) fn ask_store<'py>(
        &self,
        store: &Bound<'py, PyAny>,
        key: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match ffi::call_method(intern!(key.py(), "get"), [store, key]) {
            Ok(value) => Ok(Some(value).filter(|value| !value.is(store))),
            Err(error) => self.store_error(key, "get", error).map(|()| None),
        }
    }

    /// Gives a value that is about to be retained to the store.
    pub(super) fn tell_store(
        &self,
        store: &Bound<'_, PyAny>,
        lead: &Lead<Python3>,
        value: &Bound<'_, PyAny>,
        ttl: Option<Ttl>,
    ) -> PyResult<()> {
        let py = value.py();
        let seconds = self.retained_for(lead, value, ttl);
        if seconds == 0.0 {
            return Ok(());
        }
        let (value, _) = Retain::open(value.clone(), self.ttl());
        let (key, seconds) = (lead.flight().key().bind(py), seconds.into_pyobject(py)?);
        match ffi::call_method(intern!(py, "set"), [store, key, &value, &seconds]) {
            Ok(_) => Ok(()),
            Err(error) => self.store_error(key, "set", error),
        }
    }

    /// What is no `Exception` goes on.
    fn store_error(&self, key: &Bound<'_, PyAny>, verb: &str, error: PyErr) -> PyResult<()> {
        if !error.is_instance_of::<PyException>(key.py()) {
            return Err(error);
        }
        self.store_failed(key, verb, error.into_value(key.py()).bind(key.py()))
    }

    /// How long a call's result will be retained, in seconds; 0 for not at all.
    pub(super) fn retained_for(
        &self,
        lead: &Lead<Python3>,
        value: &Bound<'_, PyAny>,
        ttl: Option<Ttl>,
    ) -> f64 {
        let (_, ttl) = Retain::open(value.clone(), ttl.unwrap_or(self.ttl()));
        if lead.is_owned() { ttl.seconds } else { 0.0 }
    }
}

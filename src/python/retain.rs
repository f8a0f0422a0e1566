//! `Retain`: a result that brings its own TTL.

use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::options::{self, Ttl};

/// A call's result that sets its own TTL: return it from `fn`, and callers get the value.
///
/// Args:
///     value: What the callers get.
///     ttl_seconds: How long it is retained, in seconds; 0 does not retain it, `math.inf` retains it until it is
///         forgotten.
///
/// Raises:
///     TypeError: If the TTL is no number.
///     ValueError: If the TTL is negative or NaN.
#[pyclass(frozen, module = "llm_batch_coalesce")]
pub(super) struct Retain {
    #[pyo3(get)]
    value: Py<PyAny>,
    ttl: Ttl,
    /// Of a call that was made elsewhere: how long it took, in seconds.
    took: Option<f32>,
}

impl Retain {
    /// The result of a call that was made elsewhere.
    pub(super) fn of_call(value: Py<PyAny>, ttl: Ttl, took: f32) -> Self {
        Self { value, ttl, took: Some(took) }
    }

    pub(super) fn took(value: &Bound<'_, PyAny>) -> Option<f32> {
        value.cast_exact::<Self>().ok()?.get().took
    }

    /// A call's value and its TTL.
    #[inline]
    pub(super) fn open(value: Bound<'_, PyAny>, ttl: Ttl) -> (Bound<'_, PyAny>, Ttl) {
        match value.cast_exact::<Self>() {
            Ok(retain) => (retain.get().value.bind(value.py()).clone(), retain.get().ttl),
            Err(_) => (value, ttl),
        }
    }

    /// Where a value has a TTL beside it.
    pub(super) fn refuse(value: &Bound<'_, PyAny>) -> PyResult<()> {
        if value.is_exact_instance_of::<Self>() {
            return Err(PyTypeError::new_err(
                "value must not be a Retain: give put() the value and ttl_seconds",
            ));
        }
        Ok(())
    }
}

#[pymethods]
impl Retain {
    #[new]
    fn new(value: Py<PyAny>, #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: Ttl) -> Self {
        Self { value, ttl: ttl_seconds, took: None }
    }

    #[getter]
    fn ttl_seconds(&self) -> f64 {
        self.ttl.seconds
    }

    /// For annotations: `Retain[str]`.
    #[classmethod]
    #[pyo3(signature = (item, /))]
    fn __class_getitem__<'py>(
        class: &Bound<'py, PyType>,
        item: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        class.py().import("types")?.getattr("GenericAlias")?.call1((class, item))
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        Ok(format!("Retain({}, ttl_seconds={})", self.value.bind(py).repr()?, self.ttl.seconds))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.value)
    }
}

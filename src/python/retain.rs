//! `Retain`: a result that brings its own TTL.

use pyo3::exceptions::PyTypeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::options::{self, Ttl};

#[pyclass(frozen, module = "llm_batch_coalesce")]
pub(super) struct Retain {
    #[pyo3(get)]
    value: Py<PyAny>,
    ttl: Ttl,
}

impl Retain {
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
        Self { value, ttl: ttl_seconds }
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

//! Checks of arguments. Each error names the argument and its value.

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBool;

use crate::clock::{FOREVER, Nanos};

/// Seconds as given, and as the core counts them.
#[derive(Clone, Copy)]
pub(super) struct Ttl {
    pub(super) seconds: f64,
    pub(super) nanos: Nanos,
}

impl Ttl {
    pub(super) const DEFAULT: Self = Self { seconds: 5.0, nanos: 5_000_000_000 };
}

/// For the argument of this name.
pub(super) fn ttl_seconds(value: &Bound<'_, PyAny>) -> PyResult<Ttl> {
    ttl("ttl_seconds", value)
}

/// For the argument of this name; None stands for the `ttl_seconds` in force.
pub(super) fn error_ttl_seconds(value: &Bound<'_, PyAny>) -> PyResult<Option<Ttl>> {
    if value.is_none() { Ok(None) } else { ttl("error_ttl_seconds", value).map(Some) }
}

/// A number of seconds, zero and infinity included.
pub(super) fn ttl(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Ttl> {
    let number = if value.is_instance_of::<PyBool>() { None } else { value.extract::<f64>().ok() };
    let Some(seconds) = number else {
        let got = shown(value);
        return Err(PyTypeError::new_err(format!("{name} must be a number of seconds, not {got}")));
    };
    if seconds.is_nan() || seconds < 0.0 {
        let got = shown(value);
        return Err(PyValueError::new_err(format!("{name} must be zero or more seconds, not {got}")));
    }
    Ok(Ttl { seconds, nanos: nanos(seconds) })
}

fn nanos(seconds: f64) -> Nanos {
    // A TTL too small for the clock is still one: the outcome is retained, if only for a moment.
    let smallest = Nanos::from(seconds > 0.0);
    std::time::Duration::try_from_secs_f64(seconds).map_or(FOREVER, crate::clock::nanos).max(smallest)
}

/// The user's callable, looked at before anything is claimed for it.
pub(super) fn callable(name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
    if value.is_callable() {
        return Ok(());
    }
    let got = shown(value);
    Err(PyTypeError::new_err(format!("{name} must be callable, not {got}")))
}

/// How a value reads in an error; its own `__repr__` may be broken.
fn shown(value: &Bound<'_, PyAny>) -> String {
    value.repr().map_or_else(|_| format!("an object of type {}", value.get_type()), |text| text.to_string())
}

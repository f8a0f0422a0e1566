//! Checks of arguments. Each error names the argument and its value.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyBaseException, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyInt, PyString, PyTuple, PyType};

use super::ffi;
use super::hooks::Hooks;
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
pub(super) fn own_ttl_seconds(value: &Bound<'_, PyAny>) -> PyResult<Option<Ttl>> {
    if value.is_none() { Ok(None) } else { ttl_seconds(value).map(Some) }
}

/// How long errors are retained.
pub(super) enum ErrorTtl {
    /// As long as values.
    Same,
    Fixed(Ttl),
    /// As a callable of the error says.
    Decided(Py<PyAny>),
}

impl ErrorTtl {
    pub(super) fn clone_ref(&self, py: Python<'_>) -> Self {
        match self {
            Self::Same => Self::Same,
            Self::Fixed(ttl) => Self::Fixed(*ttl),
            Self::Decided(decide) => Self::Decided(decide.clone_ref(py)),
        }
    }
}

/// For the argument of this name.
pub(super) fn error_ttl_seconds(value: &Bound<'_, PyAny>) -> PyResult<ErrorTtl> {
    if value.is_none() {
        return Ok(ErrorTtl::Same);
    }
    if value.is_callable() {
        return Ok(ErrorTtl::Decided(value.clone().unbind()));
    }
    ttl("error_ttl_seconds", value).map(ErrorTtl::Fixed)
}

/// For the argument of this name: a class of errors, or several, as `except` takes them.
pub(super) fn private_errors(value: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyTuple>>> {
    let py = value.py();
    let is_error = |item: &Bound<'_, PyAny>| {
        item.cast::<PyType>().is_ok_and(|class| class.is_subclass_of::<PyBaseException>().unwrap_or(false))
    };
    if is_error(value) {
        return Ok(Some(PyTuple::new(py, [value])?.unbind()));
    }
    let classes: Option<Vec<_>> = value.try_iter().and_then(Iterator::collect::<PyResult<_>>).ok();
    match classes {
        Some(classes) if !value.is_instance_of::<PyString>() && classes.iter().all(is_error) => {
            Ok(Some(PyTuple::new(py, classes)?.unbind()))
        }
        _ => {
            let got = shown(value);
            Err(PyTypeError::new_err(format!("private_errors must be classes of exceptions, not {got}")))
        }
    }
}

/// For the argument of this name.
pub(super) fn max_flight_seconds(value: &Bound<'_, PyAny>) -> PyResult<Option<Ttl>> {
    if value.is_none() {
        return Ok(None);
    }
    let limit = ttl("max_flight_seconds", value)?;
    if limit.nanos == 0 {
        return Err(PyValueError::new_err("max_flight_seconds must be more than 0 seconds, not 0"));
    }
    Ok(Some(limit))
}

/// For the argument of this name.
pub(super) fn max_retained(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    most("max_retained", value)
}

/// How many items the log of a stream holds by default: more tokens than any answer has.
pub(super) const MAX_BUFFERED: usize = 65_536;

/// For the argument of this name: how many items the log of a stream holds.
pub(super) fn max_buffered(value: &Bound<'_, PyAny>) -> PyResult<usize> {
    let most = most("max_buffered", value)?;
    Ok(most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX))
}

/// A number that something must not exceed; None for no limit.
fn most(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    if value.is_none() {
        return Ok(None);
    }
    let got = || shown(value);
    if value.is_instance_of::<PyBool>() || !value.is_instance_of::<PyInt>() {
        return Err(PyTypeError::new_err(format!("{name} must be an int, not {}", got())));
    }
    match value.extract::<u64>() {
        Ok(most) if most > 0 => Ok(Some(most)),
        // More than anybody can have.
        Err(_) if value.gt(0)? => Ok(None),
        _ => Err(PyValueError::new_err(format!("{name} must be 1 or more, not {}", got()))),
    }
}

/// For the argument of this name.
pub(super) fn name(value: &Bound<'_, PyAny>) -> PyResult<Option<Arc<str>>> {
    if value.is_none() {
        return Ok(None);
    }
    match value.cast::<PyString>() {
        Ok(name) => Ok(Some(name.to_string_lossy().into())),
        Err(_) => Err(PyTypeError::new_err(format!("name must be a str, not {}", shown(value)))),
    }
}

/// For the argument of this name: the store as the Python layer adapts it, for tasks or for threads.
pub(super) fn store(value: Option<&Bound<'_, PyAny>>, for_tasks: bool) -> PyResult<Option<Py<PyAny>>> {
    let Some(value) = value else { return Ok(None) };
    let py = value.py();
    let for_tasks = for_tasks.into_pyobject(py)?;
    let adapted = ffi::call(Hooks::get(py)?.adapt_store.bind(py), [value, &for_tasks])?;
    Ok(Some(adapted.unbind()))
}

/// For the argument of this name: whether a call goes on when all its callers have left.
pub(super) fn on_abandoned(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    match value.cast::<PyString>().ok().and_then(|text| text.to_cow().ok()).as_deref() {
        Some("cancel") => Ok(false),
        Some("finish") => Ok(true),
        _ => {
            let got = shown(value);
            Err(PyValueError::new_err(format!("on_abandoned must be 'cancel' or 'finish', not {got}")))
        }
    }
}

/// How long a caller waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Endless,
    None,
    Limited(Duration),
}

/// For the argument of this name. None is the usual case.
#[inline]
pub(super) fn timeout(value: Option<&Bound<'_, PyAny>>) -> PyResult<Patience> {
    let Some(value) = value else { return Ok(Patience::Endless) };
    let limit = ttl("timeout", value)?;
    Ok(match limit.nanos {
        0 => Patience::None,
        FOREVER => Patience::Endless,
        nanos => Patience::Limited(Duration::from_nanos(nanos)),
    })
}

/// A number of seconds, zero and infinity included.
pub(super) fn ttl(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Ttl> {
    let number = match value.extract::<f64>() {
        _ if value.is_instance_of::<PyBool>() => None,
        Ok(number) => Some(number),
        // An int past all floats.
        Err(_) if value.is_instance_of::<PyInt>() => Some(if value.gt(0)? { f64::INFINITY } else { -1.0 }),
        Err(_) => None,
    };
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
    Duration::try_from_secs_f64(seconds).map_or(FOREVER, crate::clock::nanos).max(smallest)
}

/// The user's callable, looked at before anything is claimed for it.
pub(super) fn callable(name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
    if value.is_callable() {
        return Ok(());
    }
    let got = shown(value);
    Err(PyTypeError::new_err(format!("{name} must be callable, not {got}")))
}

/// How a value reads in an error, where it may be long, and its own `__repr__` broken.
fn shown(value: &Bound<'_, PyAny>) -> String {
    const MOST: usize = 80;
    let Ok(text) = value.repr() else { return format!("an object of type {}", value.get_type()) };
    let text = text.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

//! The binding: `llm_batch_coalesce._core`.

#![expect(clippy::doc_markdown, reason = "docs of Python's names are what `help()` shows, as in the stubs")]

mod answer;
mod coalescer;
mod errors;
mod family;
mod ffi;
mod held;
mod hooks;
mod inside;
mod key;
mod many;
mod options;
mod overview;
mod reader;
mod retain;
mod signal;
mod slot;
mod source;
mod store;
mod streams;
mod task;
mod thread;
mod thread_stream;

use std::sync::atomic::Ordering;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyTuple};

use crate::{clock, expiry, fork};

/// Starts the sweeper on a thread of Python's. A foreign thread would make and drop its Python state without holding the
/// interpreter, and a fork in that moment leaves a child of CPython 3.11 without a way out of `fork()`.
///
/// If there is no thread, it is tried again when the next outcome is retained.
fn start_sweeper() -> bool {
    fn start(py: Python<'_>) -> PyResult<()> {
        let starter = py.import("_thread")?.getattr("start_new_thread")?;
        if starter.is_instance_of::<PyCFunction>() {
            ffi::call(&starter, [wrap_pyfunction!(_sweep, py)?.as_any(), PyTuple::empty(py).as_any()])?;
        } else {
            // What gevent and its like have put there starts no thread.
            std::thread::Builder::new().spawn(|| Python::try_attach(|_| sweep()))?;
        }
        Ok(())
    }
    let py = ffi::attached();
    family::undisturbed(py, || start(py)).is_ok()
}

/// What the sweeper's thread does, attached to the interpreter.
fn sweep() {
    #[cfg(target_os = "linux")]
    rustix::thread::set_name(c"coalesce-sweep").unwrap_or_default();
    expiry::run();
}

#[pyfunction]
fn _sweep() {
    sweep();
}

/// Ends the sweeper before the interpreter goes.
#[pyfunction]
fn _stop_sweeper(py: Python<'_>) {
    py.detach(expiry::stop);
}

/// Moves the clock forward, for tests: what has expired by then is dropped without anybody waiting for it.
#[pyfunction]
fn _advance_clock(seconds: &Bound<'_, PyAny>) -> PyResult<()> {
    let by = options::ttl("seconds", seconds)?;
    clock::advance(Duration::from_nanos(by.nanos));
    expiry::wake_now();
    Ok(())
}

/// Marks the current context as that of the calls which this thread is inside of, for threads that are to run in it.
#[pyfunction]
fn _carry_calls(py: Python<'_>) -> PyResult<()> {
    inside::Within::enter(py, [])
}

/// Checks a number of seconds like any argument of that name.
#[pyfunction]
#[pyo3(signature = (name, value, /))]
fn _check_seconds(name: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    options::ttl(name, value).map(|ttl| ttl.seconds)
}

/// The result of a call that was made elsewhere and took `call_seconds`.
#[pyfunction]
#[pyo3(signature = (value, ttl_seconds, call_seconds, /))]
fn _retain_of_call(
    value: Py<PyAny>,
    #[pyo3(from_py_with = options::ttl_seconds)] ttl_seconds: options::Ttl,
    call_seconds: f32,
) -> retain::Retain {
    retain::Retain::of_call(value, ttl_seconds, call_seconds)
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<coalescer::Coalescer>()?;
    module.add_class::<thread::ThreadCoalescer>()?;
    module.add_class::<retain::Retain>()?;
    module.add_class::<thread_stream::ThreadStream>()?;
    module.add_class::<signal::Signal>()?;
    module.add_class::<reader::StreamReader>()?;
    module.add_class::<source::StreamSource>()?;
    module.add_class::<task::Ticket>()?;
    module.add_class::<task::Token>()?;
    module.add_function(wrap_pyfunction!(hooks::_install, module)?)?;
    module.add_function(wrap_pyfunction!(_stop_sweeper, module)?)?;
    module.add_function(wrap_pyfunction!(_advance_clock, module)?)?;
    module.add_function(wrap_pyfunction!(_carry_calls, module)?)?;
    module.add_function(wrap_pyfunction!(_check_seconds, module)?)?;
    module.add_function(wrap_pyfunction!(_retain_of_call, module)?)?;

    key::seed();
    fork::watch();
    // Where only one thread runs at a time, waking two at once makes them wait for each other.
    let parallel = match py.import("sys")?.getattr_opt("_is_gil_enabled")? {
        Some(enabled) => !enabled.call0()?.is_truthy()?,
        None => false,
    };
    family::WAKE_FAN.store(if parallel { 2 } else { 1 }, Ordering::Relaxed);
    expiry::install(expiry::Host {
        start: start_sweeper,
        detached: |pause| ffi::detached(ffi::attached(), pause),
    });
    py.import("atexit")?.call_method1("register", (module.getattr("_stop_sweeper")?,))?;
    Ok(())
}

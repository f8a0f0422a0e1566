//! The few operations that PyO3 has no safe form for.
#![allow(unsafe_code, reason = "calls that a finalizing interpreter may unwind through, and key comparison")]

use std::hint::black_box;
use std::mem::forget;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

/// Before CPython 3.14, a thread that takes the interpreter during finalization is ended by `pthread_exit`, whose
/// unwinding must not reach a frame of PyO3: that aborts the process. So it stops here, and the thread waits for the
/// process to end.
struct ParkOnUnwind;

impl Drop for ParkOnUnwind {
    fn drop(&mut self) {
        loop {
            std::thread::park();
        }
    }
}

/// Runs `call`, through which the thread may be unwound by `pthread_exit`, but not farther.
#[inline]
fn stop_unwinding<R>(call: impl FnOnce() -> R) -> R {
    let guard = ParkOnUnwind;
    let result = call();
    #[expect(clippy::mem_forget, reason = "the guard's drop is for unwinding only")]
    forget(guard);
    result
}

type CallNoArgs = unsafe extern "C-unwind" fn(*mut ffi::PyObject) -> *mut ffi::PyObject;
type RichCompareBool = unsafe extern "C-unwind" fn(*mut ffi::PyObject, *mut ffi::PyObject, i32) -> i32;
type RestoreThread = unsafe extern "C-unwind" fn(*mut ffi::PyThreadState);

/// Calls the user's callable.
pub(super) fn call0<'py>(callable: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    // SAFETY: the same function and the same calling convention; only unwinding is no longer ruled out. `black_box`
    // keeps the compiler from seeing that it is the function declared as never unwinding.
    let call: CallNoArgs = unsafe {
        std::mem::transmute::<*const (), CallNoArgs>(black_box(ffi::PyObject_CallNoArgs as *const ()))
    };
    // SAFETY: attached, since there is a `Bound`.
    let result = stop_unwinding(|| unsafe { call(callable.as_ptr()) });
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(callable.py(), result) }
}

/// Whether this is what calling an `async def` returns.
pub(super) fn is_coroutine(value: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached; the type is one of the interpreter's own.
    unsafe { ffi::PyCoro_CheckExact(value.as_ptr()) != 0 }
}

/// The value of a context variable that has a default.
pub(super) fn context_value<'py>(variable: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let py = variable.py();
    let mut value = null_mut();
    // SAFETY: attached; the type is checked by the call, and `value` is written when it succeeds.
    if unsafe { ffi::PyContextVar_Get(variable.as_ptr(), null_mut(), &raw mut value) } < 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference, or null if there were no default.
    Ok(unsafe { Bound::from_owned_ptr_or_opt(py, value) }.unwrap_or_else(|| py.None().into_bound(py)))
}

/// Whether an object can be part of a reference cycle, as its type tells; of a plain tuple, as its items tell, since
/// tuples of strings are common keys.
#[inline]
pub(super) fn may_refer(object: &Bound<'_, PyAny>) -> bool {
    if let Ok(items) = object.cast_exact::<PyTuple>() {
        return items.iter_borrowed().any(|item| is_collected(item.as_any()));
    }
    is_collected(object)
}

fn is_collected(object: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached, and the type is alive as long as the object.
    unsafe { ffi::PyType_IS_GC(ffi::Py_TYPE(object.as_ptr())) != 0 }
}

/// Runs `wait` while this thread is detached from the interpreter. `wait` must not touch any Python object.
pub(super) fn detached<R>(_py: Python<'_>, wait: impl FnOnce() -> R) -> R {
    // SAFETY: as in `call0`.
    let restore: RestoreThread = unsafe {
        std::mem::transmute::<*const (), RestoreThread>(black_box(ffi::PyEval_RestoreThread as *const ()))
    };
    // SAFETY: attached, as `_py` shows.
    let state = unsafe { ffi::PyEval_SaveThread() };
    let result = catch_unwind(AssertUnwindSafe(wait));
    // SAFETY: the state that this thread has just saved.
    stop_unwinding(|| unsafe { restore(state) });
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Whether two keys are one, as in a dict.
#[inline]
pub(super) fn same_key(stored: &Py<PyAny>, wanted: &Py<PyAny>) -> PyResult<bool> {
    if stored.is(wanted) {
        return Ok(true);
    }
    let py = attached();
    let (stored, wanted) = (stored.bind(py), wanted.bind(py));
    if stored.is_exact_instance_of::<PyString>() && wanted.is_exact_instance_of::<PyString>() {
        // SAFETY: both are strings, and comparing those cannot fail.
        return Ok(unsafe { ffi::PyUnicode_Compare(stored.as_ptr(), wanted.as_ptr()) } == 0);
    }
    compare(stored, wanted)
}

fn compare(stored: &Bound<'_, PyAny>, wanted: &Bound<'_, PyAny>) -> PyResult<bool> {
    // SAFETY: as in `call0`.
    let compare: RichCompareBool = unsafe {
        std::mem::transmute::<*const (), RichCompareBool>(black_box(
            ffi::PyObject_RichCompareBool as *const (),
        ))
    };
    // SAFETY: attached. The caller holds the one key, and the table's guard the flight that holds the other.
    match stop_unwinding(|| unsafe { compare(stored.as_ptr(), wanted.as_ptr(), ffi::Py_EQ) }) {
        -1 => Err(PyErr::fetch(stored.py())),
        answer => Ok(answer == 1),
    }
}

/// The interpreter, for functions that the core calls from threads that came from Python.
pub(super) fn attached<'py>() -> Python<'py> {
    // SAFETY: the core is entered by attached threads only, and detaches in `detached` alone, which calls nothing of
    // Python; the sweeper looks at maps inside `Python::try_attach`.
    unsafe { Python::assume_attached() }
}

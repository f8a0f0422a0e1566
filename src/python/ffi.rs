//! The few operations that PyO3 has no safe form for.
#![allow(unsafe_code, reason = "calls that a finalizing interpreter may unwind through, and key comparison")]

use std::hint::black_box;
use std::mem::{ManuallyDrop, forget};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::null_mut;

use pyo3::ffi::{self, PyObject};
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

type CallNoArgs = unsafe extern "C-unwind" fn(*mut PyObject) -> *mut PyObject;
type Vectorcall =
    unsafe extern "C-unwind" fn(*mut PyObject, *const *mut PyObject, usize, *mut PyObject) -> *mut PyObject;
type DecRef = unsafe extern "C-unwind" fn(*mut PyObject);
type Hash = unsafe extern "C-unwind" fn(*mut PyObject) -> isize;
type RichCompareBool = unsafe extern "C-unwind" fn(*mut PyObject, *mut PyObject, i32) -> i32;
type CheckSignals = unsafe extern "C-unwind" fn() -> i32;
type RestoreThread = unsafe extern "C-unwind" fn(*mut ffi::PyThreadState);

/// A function of CPython as one that may be unwound through. `black_box` keeps the compiler from seeing that it is the
/// one which is declared as never unwinding.
macro_rules! unwinding {
    ($function:ident as $kind:ty) => {
        // SAFETY: the same function and the same calling convention; only unwinding is no longer ruled out.
        unsafe { std::mem::transmute::<*const (), $kind>(black_box(ffi::$function as *const ())) }
    };
}

/// Calls the user's callable.
pub(super) fn call0<'py>(callable: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let call = unwinding!(PyObject_CallNoArgs as CallNoArgs);
    // SAFETY: attached, since there is a `Bound`.
    let result = stop_unwinding(|| unsafe { call(callable.as_ptr()) });
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(callable.py(), result) }
}

/// Calls what may be written in Python.
pub(super) fn call<'py, const N: usize>(
    callable: &Bound<'py, PyAny>,
    arguments: [&Bound<'py, PyAny>; N],
) -> PyResult<Bound<'py, PyAny>> {
    let call = unwinding!(PyObject_Vectorcall as Vectorcall);
    let arguments = arguments.map(Bound::as_ptr);
    // SAFETY: attached; the arguments are borrowed for the call, and there are no keywords.
    let result = stop_unwinding(|| unsafe { call(callable.as_ptr(), arguments.as_ptr(), N, null_mut()) });
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(callable.py(), result) }
}

/// Calls a method that may be written in Python; its object is the first argument.
pub(super) fn call_method<'py, const N: usize>(
    name: &Bound<'py, PyString>,
    arguments: [&Bound<'py, PyAny>; N],
) -> PyResult<Bound<'py, PyAny>> {
    const { assert!(N > 0, "a method has an object") };
    let call = unwinding!(PyObject_VectorcallMethod as Vectorcall);
    let arguments = arguments.map(Bound::as_ptr);
    // SAFETY: as in `call`.
    let result = stop_unwinding(|| unsafe { call(name.as_ptr(), arguments.as_ptr(), N, null_mut()) });
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(name.py(), result) }
}

/// The same; the last arguments have these names.
pub(super) fn call_method_named<'py, const N: usize>(
    name: &Bound<'py, PyString>,
    arguments: [&Bound<'py, PyAny>; N],
    names: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    assert!(N > names.len(), "a method has an object, which has no name");
    let call = unwinding!(PyObject_VectorcallMethod as Vectorcall);
    let arguments = arguments.map(Bound::as_ptr);
    let positional = N - names.len();
    // SAFETY: attached; the arguments and the names are borrowed for the call, and there is an argument for each name.
    let result =
        stop_unwinding(|| unsafe { call(name.as_ptr(), arguments.as_ptr(), positional, names.as_ptr()) });
    // SAFETY: a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(name.py(), result) }
}

/// A user's object, whose `__del__` may run when it is dropped, on whatever thread.
pub(super) struct Held(ManuallyDrop<Py<PyAny>>);

impl Held {
    #[inline]
    pub(super) fn bind<'a, 'py>(&'a self, py: Python<'py>) -> &'a Bound<'py, PyAny> {
        self.0.bind(py)
    }

    #[inline]
    pub(super) fn object(&self) -> &Py<PyAny> {
        &self.0
    }

    pub(super) fn into_object(self) -> Py<PyAny> {
        let held = ManuallyDrop::new(self);
        // SAFETY: `held` is not used any more, and not dropped.
        unsafe { std::ptr::read(&raw const *held.0) }
    }
}

impl From<Py<PyAny>> for Held {
    fn from(object: Py<PyAny>) -> Self {
        Self(ManuallyDrop::new(object))
    }
}

impl From<Bound<'_, PyAny>> for Held {
    fn from(object: Bound<'_, PyAny>) -> Self {
        object.unbind().into()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: it is not used after this.
        let object = unsafe { ManuallyDrop::take(&mut self.0) };
        // SAFETY: may be called by any thread.
        if unsafe { ffi::PyGILState_Check() } == 0 {
            // The core drops objects only where it is attached. Should it not be: PyO3's own drop would take a thread in
            // `detached` for an attached one, so the object is rather kept for ever.
            let _kept = object.into_ptr();
            return;
        }
        let release = unwinding!(Py_DecRef as DecRef);
        let object = object.into_ptr();
        // SAFETY: attached, as was just seen; the reference was owned.
        stop_unwinding(|| unsafe { release(object) });
    }
}

/// What `hash()` returns, as it is in memory.
#[inline]
pub(super) fn hash(object: &Bound<'_, PyAny>) -> PyResult<u64> {
    let hash = unwinding!(PyObject_Hash as Hash);
    // SAFETY: attached.
    match stop_unwinding(|| unsafe { hash(object.as_ptr()) }) {
        -1 => Err(PyErr::fetch(object.py())),
        hash => Ok(hash.cast_unsigned() as u64),
    }
}

/// Runs the handlers of signals that have come.
pub(super) fn check_signals(py: Python<'_>) -> PyResult<()> {
    let check = unwinding!(PyErr_CheckSignals as CheckSignals);
    // SAFETY: attached, as `py` shows.
    match stop_unwinding(|| unsafe { check() }) {
        0 => Ok(()),
        _ => Err(PyErr::fetch(py)),
    }
}

// PyO3 has it since 0.30.
unsafe extern "C" {
    safe fn PyThread_get_thread_ident() -> std::ffi::c_ulong;
}

/// What `threading.get_ident()` returns.
#[inline]
#[allow(clippy::useless_conversion, reason = "it has 32 bits on Windows")]
pub(super) fn thread_number() -> u64 {
    PyThread_get_thread_ident().into()
}

/// Whether this is what calling an `async def` returns.
pub(super) fn is_coroutine(value: &Bound<'_, PyAny>) -> bool {
    // SAFETY: attached; the type is one of the interpreter's own.
    unsafe { ffi::PyCoro_CheckExact(value.as_ptr()) != 0 }
}

/// The value of a context variable in the current context.
pub(super) fn context_value<'py>(variable: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = variable.py();
    let mut value = null_mut();
    // SAFETY: attached; the type is checked by the call, and `value` is written when it succeeds.
    if unsafe { ffi::PyContextVar_Get(variable.as_ptr(), null_mut(), &raw mut value) } < 0 {
        return Err(PyErr::fetch(py));
    }
    // SAFETY: a new reference, or null where there is no value.
    Ok(unsafe { Bound::from_owned_ptr_or_opt(py, value) })
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
    let restore = unwinding!(PyEval_RestoreThread as RestoreThread);
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
    let compare = unwinding!(PyObject_RichCompareBool as RichCompareBool);
    // SAFETY: attached. The caller holds the one key, and the table's guard the flight that holds the other.
    match stop_unwinding(|| unsafe { compare(stored.as_ptr(), wanted.as_ptr(), ffi::Py_EQ) }) {
        -1 => Err(PyErr::fetch(stored.py())),
        answer => Ok(answer == 1),
    }
}

/// The interpreter, for functions that the core calls from threads that came from Python.
pub(super) fn attached<'py>() -> Python<'py> {
    // SAFETY: the core is entered by attached threads only, and detaches in `detached` alone, which calls nothing of
    // Python; the sweeper's thread is attached, too.
    unsafe { Python::assume_attached() }
}

//! Python objects as keys.

use std::cell::{Cell, RefCell};

use pyo3::prelude::*;

thread_local! {
    static FAILED: Cell<bool> = const { Cell::new(false) };
    static FAILURE: RefCell<Option<PyErr>> = const { RefCell::new(None) };
}

/// Keeps the error of a key's `__eq__` until the operation on the table is over.
pub(super) fn remember_failure(error: PyErr) {
    // The first one counts, as in a dict.
    let surplus = if FAILED.replace(true) { Some(error) } else { FAILURE.replace(Some(error)) };
    drop(surplus);
}

#[inline]
pub(super) fn has_failed() -> bool {
    FAILED.get()
}

/// Hands over the error, if there was one.
pub(super) fn take_failure() -> PyResult<()> {
    if FAILED.replace(false)
        && let Some(error) = FAILURE.take()
    {
        return Err(error);
    }
    Ok(())
}

/// Python's hash of a key, mixed: small integers hash to themselves, and the table wants all bits to matter.
#[inline]
pub(super) fn hash(key: &Bound<'_, PyAny>) -> PyResult<u64> {
    Ok(mix(key.hash()?.cast_unsigned() as u64))
}

/// The finalizer of `MurmurHash3` (Austin Appleby, public domain).
#[inline]
fn mix(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

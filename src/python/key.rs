//! Python objects as keys.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::prelude::*;

use super::ffi;

/// Keeps others from choosing integers that collide in the table; set when the module is first initialised.
static SEED: AtomicU64 = AtomicU64::new(0);

/// Chooses the seed, once: maps that are in use when the module is imported a second time must find their keys again.
pub(super) fn seed() {
    let seed = std::hash::RandomState::new().hash_one(0) | 1;
    // Relaxed: imports are ordered. An error means that there is one.
    let _ = SEED.compare_exchange(0, seed, Ordering::Relaxed, Ordering::Relaxed);
}

/// Python's hash of a key, mixed: small integers hash to themselves, and the table wants all bits to matter.
#[inline]
pub(super) fn hash(key: &Bound<'_, PyAny>) -> PyResult<u64> {
    Ok(mix(ffi::hash(key)? ^ SEED.load(Ordering::Relaxed)))
}

/// The finalizer of `MurmurHash3` (Austin Appleby, public domain).
#[inline]
fn mix(hash: u64) -> u64 {
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

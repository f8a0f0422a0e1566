//! The one place that chooses between the standard library's primitives and loom's.
//!
//! Mutexes here never poison: a panic inside one of the short sections that they guard would be a defect of
//! this crate, and a server must not lose a key for ever because of it.

#[cfg(loom)]
pub(crate) use loom::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    thread::{Thread, current},
};
#[cfg(not(loom))]
pub(crate) use std::{
    sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    thread::{Thread, current},
};

// Loom's own `Arc` has no `Weak`; ownership is not what the models are about.
pub(crate) use std::sync::{Arc, OnceLock, Weak};

#[cfg(loom)]
type RawMutex<T> = loom::sync::Mutex<T>;
#[cfg(loom)]
pub(crate) type MutexGuard<'a, T> = loom::sync::MutexGuard<'a, T>;
#[cfg(not(loom))]
type RawMutex<T> = std::sync::Mutex<T>;
#[cfg(not(loom))]
pub(crate) type MutexGuard<'a, T> = std::sync::MutexGuard<'a, T>;

/// A mutex that guards Rust work only: nobody runs or drops foreign code while holding it.
#[derive(Debug)]
pub(crate) struct Mutex<T>(RawMutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(RawMutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A value on cache lines of its own, so that neighbours do not slow each other down.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub(crate) T);

/// Blocks this thread, which whoever makes `over` true unparks. False if `limit` has passed before.
#[cfg(not(loom))]
pub(crate) fn park_until(limit: Option<std::time::Duration>, over: impl Fn() -> bool) -> bool {
    let until = limit.map(|limit| std::time::Instant::now() + limit);
    while !over() {
        match until {
            None => std::thread::park(),
            Some(until) => {
                let left = until.saturating_duration_since(std::time::Instant::now());
                if left.is_zero() {
                    return false;
                }
                std::thread::park_timeout(left);
            }
        }
    }
    true
}

/// The same in a model, where no time passes.
#[cfg(loom)]
pub(crate) fn park_until(_limit: Option<std::time::Duration>, over: impl Fn() -> bool) -> bool {
    while !over() {
        loom::thread::park();
    }
    true
}

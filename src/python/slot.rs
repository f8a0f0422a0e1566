//! A place that holds a value or nothing.

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Moves a value in or out under a short lock; what comes out is dropped after it.
pub(super) struct Slot<T>(Mutex<Option<T>>);

impl<T> Slot<T> {
    pub(super) fn new(value: Option<T>) -> Self {
        Self(Mutex::new(value))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the garbage collector. Nobody is stopped while holding the lock; if it is held all the same, the next
    /// collection will do.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, Option<T>>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(super) fn take(&self) -> Option<T> {
        self.lock().take()
    }

    pub(super) fn put(&self, value: T) {
        let old = self.lock().replace(value);
        drop(old);
    }
}

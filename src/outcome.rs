//! The place in a flight where its outcome is written, once.
#![allow(unsafe_code, reason = "the outcome is read on the hit path without a lock or a second allocation")]

#[cfg(loom)]
use loom::cell::UnsafeCell;

#[cfg(not(loom))]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

// Loom's interface, so that its models check the very accesses below.
#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    #[inline]
    fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    #[inline]
    fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

/// Written by the one that lands the flight, read by whoever has seen the flight's state say so.
///
/// All functions are for the flight and its seats alone, whose rules make them sound.
pub(crate) struct OutcomeCell<O>(UnsafeCell<Option<O>>);

// SAFETY: the flight writes once before it publishes its state (release) and reads after it has acquired that state;
// clearing happens when the last of the counted readers is done (see the flight's rule 4). So it is a plain shared
// value, for which `O: Send + Sync` is enough.
unsafe impl<O: Send + Sync> Sync for OutcomeCell<O> {}

impl<O> OutcomeCell<O> {
    pub(crate) fn empty() -> Self {
        Self(UnsafeCell::new(None))
    }

    pub(crate) fn holding(outcome: O) -> Self {
        Self(UnsafeCell::new(Some(outcome)))
    }

    /// Only under the flight's mutex, while the flight is pending.
    pub(crate) fn set(&self, outcome: O) {
        self.0.with_mut(|place| {
            // SAFETY: nobody reads before the state is published, and the mutex excludes a second writer.
            unsafe { *place = Some(outcome) };
        });
    }

    /// Only after the flight was seen to be retained: from then on nobody writes.
    #[inline]
    pub(crate) fn get_retained(&self) -> Option<&O> {
        // SAFETY: the write came before the state that the caller has acquired, and a retained outcome is never
        // cleared, so the reference is good as long as the flight.
        self.0.with(|place| unsafe { (*place).as_ref() })
    }

    /// Only through a seat that the flight had when it landed: the outcome stays at least as long as the seat.
    pub(crate) fn get_seated(&self) -> Option<&O> {
        // SAFETY: as above; and it is cleared only after this seat, one of the counted takers, has been left.
        self.0.with(|place| unsafe { (*place).as_ref() })
    }

    /// Only by the last taker of an outcome that is not retained.
    pub(crate) fn take_last(&self) -> Option<O> {
        // SAFETY: all other takers have left (acquired by the count), and nobody else can read an ended flight.
        self.0.with_mut(|place| unsafe { (*place).take() })
    }
}

//! Monotonic time in nanoseconds: a coarse clock for reading (about 5 ns a look, good to 4 ms), a fine one for
//! deadlines. Both can be moved forward in tests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Nanoseconds on the monotonic clock. `FOREVER` is later than any of them.
pub type Nanos = u64;
pub const FOREVER: Nanos = u64::MAX;

static ADVANCED_BY: AtomicU64 = AtomicU64::new(0);

/// Time as of the last timer tick: never ahead of [`now`], at most a tick (4 ms on Linux) behind.
#[inline]
pub fn now_coarse() -> Nanos {
    // Relaxed: only tests write it, and they order themselves.
    raw_coarse() + ADVANCED_BY.load(Ordering::Relaxed)
}

/// Time as exact as the system has it.
#[inline]
pub fn now() -> Nanos {
    raw_fine() + ADVANCED_BY.load(Ordering::Relaxed)
}

/// Moves both clocks forward. For tests: deadlines come due without anybody sleeping.
pub fn advance(by: Duration) {
    ADVANCED_BY.fetch_add(nanos(by), Ordering::Relaxed);
}

/// A duration in nanoseconds; what does not fit (585 years) is for ever.
pub fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(FOREVER)
}

#[cfg(target_os = "linux")]
fn read(id: rustix::time::ClockId) -> Nanos {
    let time = rustix::time::clock_gettime(id);
    // The monotonic clock starts at boot, so neither part is ever negative.
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

#[cfg(target_os = "linux")]
#[inline]
fn raw_coarse() -> Nanos {
    read(rustix::time::ClockId::MonotonicCoarse)
}

#[cfg(target_os = "linux")]
#[inline]
fn raw_fine() -> Nanos {
    read(rustix::time::ClockId::Monotonic)
}

#[cfg(not(target_os = "linux"))]
fn raw_fine() -> Nanos {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    nanos(START.get_or_init(std::time::Instant::now).elapsed())
}

#[cfg(not(target_os = "linux"))]
fn raw_coarse() -> Nanos {
    raw_fine()
}

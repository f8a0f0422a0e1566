//! Which process this is: `fork()` copies the memory, but only the thread that called it.
//!
//! A child's flights would never end, and whatever the other threads were doing stays half done. So nothing is repaired:
//! each map, and the sweeper, has a *birth*, and one that was born before the fork gets a successor on its first use in
//! the child. Leads and seats from before do nothing any more.

#[cfg(all(unix, not(loom)))]
mod unix {
    #![allow(unsafe_code, reason = "a handler that the system calls in the child")]

    use std::sync::Once;
    use std::sync::atomic::{AtomicU32, Ordering};

    static FORKS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn in_child() {
        // Relaxed: the child has one thread.
        FORKS.fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn birth() -> u32 {
        FORKS.load(Ordering::Relaxed)
    }

    /// Counts forks from now on.
    pub fn watch() {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            // SAFETY: the handler only adds to an atomic, which is allowed in a child of whatever process.
            let failed = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
            assert_eq!(failed, 0, "no memory for the handler of forks");
        });
    }
}

#[cfg(all(unix, not(loom)))]
pub(crate) use unix::birth;
#[cfg(all(unix, not(loom)))]
pub use unix::watch;

/// The number of forks that lie between the first process and this one.
#[cfg(not(all(unix, not(loom))))]
#[inline]
pub(crate) fn birth() -> u32 {
    0
}

/// Counts forks from now on.
#[cfg(not(all(unix, not(loom))))]
pub fn watch() {}

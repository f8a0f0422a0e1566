//! Models of the core's concurrency: loom runs each of them in every order that two preemptions allow.
//!
//! The rules that they hold the core to, one module each:
//!
//! 1. `election`: of all callers one leads, whatever becomes of the lead, and nobody who joins is forgotten.
//! 2. `outcome`: whoever sees that a flight has landed sees its outcome; one that is not retained is cleared once, by
//!    the last who may read it, and one that was forgotten is never found again.
//! 3. `baton`: a landed flight reaches every thread that waits for it, however the others leave.
//! 4. `lead`: of all that may end a flight one does, and a stale lead publishes nothing.
//! 5. `watch`: a caller that depends on another event loop is looked after from the moment that it waits.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 CARGO_TARGET_DIR=target/loom cargo test
//! --no-default-features --test loom`. A model that fails names the broken promise; a deadlock is a lost wakeup.
#![cfg(loom)]

mod baton;
mod election;
mod lead;
mod outcome;
mod support;
mod watch;

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
//! 6. `hand_over`: a lead that is given up reaches a waiter that can take it, and one only, though others withdraw it.
//! 7. `forget`: what was under way when its key was forgotten is never found again, and takes nothing from anybody.
//! 8. `cancel`: every waiter is served or cancelled, never both; nothing of what was cancelled is retained.
//! 9. `put`: what is put is what is found from then on, whatever lands at that moment.
//! 10. `room`: of outcomes that come at once as many are dropped as are too many, and what goes makes room once.
//! 11. `stream`: no reader of a shared stream misses an item or its end, one of them pulls, and the last ends it.
//! 12. `busy`: a waiter that is busy at first is served, offered the lead or told to ask again, whenever it begins to wait.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 CARGO_TARGET_DIR=target/loom cargo test
//! --no-default-features --test loom`. A model that fails names the broken promise; a deadlock is a lost wakeup.
#![cfg(loom)]

mod baton;
mod busy;
mod cancel;
mod election;
mod forget;
mod hand_over;
mod lead;
mod outcome;
mod put;
mod room;
mod stream;
mod support;
mod watch;

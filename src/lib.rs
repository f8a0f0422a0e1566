//! The core of `llm_batch_coalesce`: concurrent callers of one key share one underlying call.
//!
//! # Invariants
//!
//! 1. A caller that hits a retained outcome takes no lock (`table`), and electing a leader is one atomic operation of
//!    the table.
//! 2. Every claimed flight ends exactly once: with an outcome, or abandoned. [`lead::Lead`] ends it on every path; its
//!    drop hands over (`flight`).
//! 3. No mutex is held while foreign code can run or a foreign object is dropped. What is to be dropped or woken is
//!    handed out of the locked section first.
//! 4. An outcome has left the table, or is visible in it as retained, before any waiter wakes.
//! 5. An entry is removed by identity, so nobody removes a newer flight of the same key.
//! 6. What a process has inherited by `fork()` is never repaired, but replaced (`fork`).
//! 7. A landed flight reaches every thread that waits for it, however the others leave (`waiter::Chain`).
//!
//! Everything outside of `python` is generic and names no Python: it is tested and model-checked without an
//! interpreter (`cargo test --no-default-features`, and with `RUSTFLAGS="--cfg loom"`).

#![cfg_attr(loom, allow(dead_code, unused_imports, reason = "models have no sweeper"))]

mod aftermath;
pub mod circle;
pub mod clock;
pub mod expiry;
pub mod family;
pub mod flight;
pub mod fork;
pub mod lead;
pub mod map;
mod outcome;
mod roster;
pub mod seat;
mod shard;
pub mod stats;
pub mod stream;
mod sync;
mod table;
pub mod waiter;

#[cfg(feature = "python")]
mod python;

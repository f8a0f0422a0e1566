//! What the core promises, shown with ordinary threads and with event loops that are only numbers.
//!
//! No test sleeps or measures time: threads meet at barriers and channels, the clock is moved by hand, and a test that
//! hangs fails after half a minute (`support::in_time`). Tests that move the clock, or would notice if another one
//! did, hold it (`support::Clock`).
#![cfg(not(loom))]

mod busy;
mod cancel;
mod circle;
mod clear;
mod counters;
mod election;
mod finishes;
mod forget;
mod hand_over;
mod keys;
mod offers;
mod ops;
mod over_age;
mod overview;
mod put;
mod requests;
mod retention;
mod room;
mod stale_lead;
mod stream;
mod stream_ends;
mod support;
mod tasks;

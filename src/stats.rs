//! Counters. What the hit path counts is spread over stripes, each written by few threads.

use std::cell::Cell;
use std::num::NonZeroUsize;

use crate::sync::{AtomicIsize, AtomicU64, Ordering, Padded};

/// A counter whose increments from several threads go to different cache lines.
pub(crate) struct Striped(Box<[Padded<AtomicU64>]>);

impl Striped {
    pub(crate) fn new(stripes: usize) -> Self {
        Self((0..stripes.next_power_of_two()).map(|_| Padded(AtomicU64::new(0))).collect())
    }

    #[inline]
    pub(crate) fn add_one(&self) {
        let stripe = thread_number() & (self.0.len() - 1);
        // Relaxed: a count orders nothing.
        self.0[stripe].0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.0.load(Ordering::Relaxed)).sum()
    }
}

#[inline]
fn thread_number() -> usize {
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    NUMBER.with(|number| {
        if number.get() == usize::MAX {
            number.set(next_number());
        }
        number.get()
    })
}

#[cold]
fn next_number() -> usize {
    // Never loom's: it is no part of any model.
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Counters of what is rarer than a hit; one set a shard.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) calls: AtomicU64,
    pub(crate) joined: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) in_flight: AtomicIsize,
    pub(crate) retained: AtomicIsize,
}

/// A reading of all counters. Exact while nobody calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Callers that led.
    pub calls: u64,
    /// Callers that got the outcome of a flight that they joined.
    pub joined: u64,
    /// Callers served from a retained outcome.
    pub hits: u64,
    /// Calls that failed.
    pub errors: u64,
    /// Flights under way. This and `retained` may be off by a few, even below zero, while others call.
    pub in_flight: isize,
    pub retained: isize,
}

impl Counters {
    pub(crate) fn add_to(&self, stats: &mut Stats) {
        stats.calls += self.calls.load(Ordering::Relaxed);
        stats.joined += self.joined.load(Ordering::Relaxed);
        stats.errors += self.errors.load(Ordering::Relaxed);
        stats.in_flight += self.in_flight.load(Ordering::Relaxed);
        stats.retained += self.retained.load(Ordering::Relaxed);
    }
}

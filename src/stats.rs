//! Counters. What the hit path counts is spread over stripes, each written by few threads.

use std::num::NonZeroUsize;

use crate::sync::{AtomicU64, Ordering, Padded};

/// A counter for the hit path. Each of the first threads has a cache line that only it writes, so that counting needs
/// no atomic read-modify-write; the others share a few.
pub(crate) struct Striped {
    own: Box<[Padded<AtomicU64>]>,
    shared: Box<[Padded<AtomicU64>]>,
}

impl Striped {
    pub(crate) fn new() -> Self {
        let stripes = |count: usize| (0..count).map(|_| Padded(AtomicU64::new(0))).collect();
        Self { own: stripes(4 * cpus()), shared: stripes(cpus().next_power_of_two()) }
    }

    /// `thread` numbers the threads that are alive; no two have the same number at a time.
    #[inline]
    pub(crate) fn add_one(&self, thread: usize) {
        // Relaxed: a count orders nothing. A number passes from a thread that has ended to a new one in order.
        if let Some(Padded(stripe)) = self.own.get(thread) {
            stripe.store(stripe.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        } else {
            self.shared[thread & (self.shared.len() - 1)].0.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn sum(&self) -> u64 {
        self.own.iter().chain(&self.shared).map(|stripe| stripe.0.load(Ordering::Relaxed)).sum()
    }
}

pub(crate) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Counters of what is rarer than a hit; one set a shard. They only grow: a claim and its retained outcome cost one
/// increment each, and what is under way is a difference.
#[derive(Default)]
pub(crate) struct Counters {
    /// Flights put into the table.
    pub(crate) claimed: AtomicU64,
    /// Outcomes that were put there without a call.
    pub(crate) primed: AtomicU64,
    /// Waiters that took over a flight.
    pub(crate) taken_over: AtomicU64,
    /// Flights whose outcome was retained, and those of them that have left the table.
    pub(crate) retained: AtomicU64,
    pub(crate) released: AtomicU64,
    /// Those that left it for want of room.
    pub(crate) evicted: AtomicU64,
    /// Flights that ended without one.
    pub(crate) ended: AtomicU64,
    pub(crate) joined: AtomicU64,
    pub(crate) timeouts: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) errors: AtomicU64,
    /// Flights that were given up before their call, since their caller was refused.
    pub(crate) refused: AtomicU64,
    /// Leads whose outcome came from a store.
    pub(crate) store_hits: AtomicU64,
    pub(crate) store_errors: AtomicU64,
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
    /// Waiters whose timeout passed.
    pub timeouts: u64,
    /// Waiters that were cancelled or interrupted.
    pub cancelled: u64,
    /// Waiters that took over a flight; they are among the calls.
    pub handed_over: u64,
    /// Outcomes dropped for want of room.
    pub evicted: u64,
    /// Flights under way.
    pub in_flight: u64,
    pub retained: u64,
    /// Callers that would have led, but were served by a store; they are among the hits.
    pub store_hits: u64,
    /// Failures of the store.
    pub store_errors: u64,
}

impl Stats {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            joined: self.joined + other.joined,
            hits: self.hits + other.hits,
            errors: self.errors + other.errors,
            timeouts: self.timeouts + other.timeouts,
            cancelled: self.cancelled + other.cancelled,
            handed_over: self.handed_over + other.handed_over,
            evicted: self.evicted + other.evicted,
            in_flight: self.in_flight + other.in_flight,
            retained: self.retained + other.retained,
            store_hits: self.store_hits + other.store_hits,
            store_errors: self.store_errors + other.store_errors,
        }
    }

    /// What was counted since an earlier reading. What is under way or retained is no count.
    #[must_use]
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            calls: self.calls.saturating_sub(earlier.calls),
            joined: self.joined.saturating_sub(earlier.joined),
            hits: self.hits.saturating_sub(earlier.hits),
            errors: self.errors.saturating_sub(earlier.errors),
            timeouts: self.timeouts.saturating_sub(earlier.timeouts),
            cancelled: self.cancelled.saturating_sub(earlier.cancelled),
            handed_over: self.handed_over.saturating_sub(earlier.handed_over),
            evicted: self.evicted.saturating_sub(earlier.evicted),
            in_flight: self.in_flight,
            retained: self.retained,
            store_hits: self.store_hits.saturating_sub(earlier.store_hits),
            store_errors: self.store_errors.saturating_sub(earlier.store_errors),
        }
    }
}

impl Counters {
    pub(crate) fn add_to(&self, stats: &mut Stats) {
        // Relaxed: exact while nobody calls, and then everything is ordered. What must not be the larger is read first.
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (released, ended) = (read(&self.released), read(&self.ended));
        let (store_hits, refused) = (read(&self.store_hits), read(&self.refused));
        let retained = read(&self.retained);
        let (claimed, primed) = (read(&self.claimed), read(&self.primed));
        let taken_over = read(&self.taken_over);
        stats.calls += (claimed + taken_over).saturating_sub(store_hits + refused);
        stats.hits += store_hits;
        stats.store_hits += store_hits;
        stats.store_errors += read(&self.store_errors);
        stats.handed_over += taken_over;
        stats.joined += read(&self.joined);
        stats.errors += read(&self.errors);
        stats.timeouts += read(&self.timeouts);
        stats.cancelled += read(&self.cancelled);
        stats.evicted += read(&self.evicted);
        stats.in_flight += (claimed + primed).saturating_sub(retained + ended);
        stats.retained += retained.saturating_sub(released);
    }
}

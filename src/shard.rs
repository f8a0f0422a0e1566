//! One shard of the map: its table, the deadlines of what it retains, and its counters.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::clock::{FOREVER, Nanos};
use crate::family::Family;
use crate::flight::{Flight, State};
use crate::stats::Counters;
use crate::sync::{Arc, Mutex, Ordering, Weak};
use crate::table::Table;

#[repr(align(128))]
pub(crate) struct Shard<F: Family> {
    pub(crate) table: Table<F>,
    /// Never held while an `Arc` of a flight is dropped: that may run foreign code.
    deadlines: Mutex<Deadlines<F>>,
    pub(crate) counters: Counters,
}

struct Deadlines<F: Family> {
    heap: BinaryHeap<Reverse<Deadline<F>>>,
    /// How many of the heap's flights have left the table before their time.
    stale: usize,
}

/// Orders by time alone.
struct Deadline<F: Family> {
    at: Nanos,
    flight: Weak<Flight<F>>,
}

impl<F: Family> PartialEq for Deadline<F> {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl<F: Family> Eq for Deadline<F> {}

impl<F: Family> PartialOrd for Deadline<F> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<F: Family> Ord for Deadline<F> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

/// Below this size a heap is not worth compacting.
const COMPACT_FROM: usize = 64;

/// Claims between two looks at the table's room.
const MAKE_ROOM_EVERY: u64 = 32;

impl<F: Family> Shard<F> {
    pub(crate) fn new() -> Self {
        let deadlines = Mutex::new(Deadlines { heap: BinaryHeap::new(), stale: 0 });
        Self { table: Table::new(), deadlines, counters: Counters::default() }
    }

    /// Notes that a flight was put into the table.
    pub(crate) fn note_claimed(&self) {
        if self.counters.claimed.fetch_add(1, Ordering::Relaxed).is_multiple_of(MAKE_ROOM_EVERY) {
            self.table.make_room();
        }
    }

    /// Notes that a flight has become retained. True if the sweeper has to know of its deadline.
    pub(crate) fn note_retained(&self, flight: &Arc<Flight<F>>, at: Nanos) -> bool {
        self.counters.retained.fetch_add(1, Ordering::Relaxed);
        if at == FOREVER {
            return false;
        }
        self.deadlines.lock().heap.push(Reverse(Deadline { at, flight: Arc::downgrade(flight) }));
        true
    }

    /// Takes a flight out of the table, retained or not, if it is still there.
    pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
        let removed = self.table.remove(flight);
        if removed {
            self.note_removed(flight, false);
        }
        removed
    }

    /// Keeps the books when a flight has left the table.
    pub(crate) fn note_removed(&self, flight: &Flight<F>, expired: bool) {
        if flight.state() != State::Retained {
            return;
        }
        self.counters.released.fetch_add(1, Ordering::Relaxed);
        if !expired {
            let mut deadlines = self.deadlines.lock();
            deadlines.stale += 1;
            if deadlines.stale * 2 > deadlines.heap.len() && deadlines.heap.len() >= COMPACT_FROM {
                deadlines.heap.retain(|Reverse(deadline)| deadline.flight.strong_count() > 0);
                deadlines.stale = 0;
            }
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.lock().heap.peek().map(|Reverse(deadline)| deadline.at)
    }

    /// Removes up to `limit` expired outcomes and tells which, for who wants to know when they are dropped.
    pub(crate) fn expire(&self, now: Nanos, limit: usize) -> Vec<Weak<Flight<F>>> {
        let mut due = Vec::new();
        {
            let mut deadlines = self.deadlines.lock();
            while due.len() < limit && deadlines.heap.peek().is_some_and(|Reverse(first)| first.at <= now) {
                due.extend(deadlines.heap.pop().map(|Reverse(deadline)| deadline.flight));
            }
            if deadlines.heap.is_empty() {
                // A quiet map gives its memory back.
                deadlines.heap = BinaryHeap::new();
                deadlines.stale = 0;
            }
        }
        for flight in due.iter().filter_map(Weak::upgrade) {
            if self.table.remove(&flight) {
                self.note_removed(&flight, true);
            }
        }
        if !due.is_empty() {
            self.table.flush();
        }
        due
    }
}

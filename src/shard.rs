//! One shard of the map: its table, the deadlines of what it retains, and its counters.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::clock::{FOREVER, Nanos};
use crate::family::Family;
use crate::flight::{Flight, State};
use crate::stats::Counters;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, Weak};
use crate::table::Table;

#[repr(align(128))]
pub(crate) struct Shard<F: Family> {
    pub(crate) table: Table<F>,
    /// Never held while an `Arc` of a flight is dropped: that may run foreign code.
    deadlines: Mutex<Deadlines<F>>,
    /// Set if the map retains a limited number of outcomes.
    room: Option<Room<F>>,
    pub(crate) counters: Counters,
}

/// How many outcomes all shards together may retain, and how many there are.
pub(crate) struct Quota {
    pub(crate) most: u64,
    pub(crate) retained: AtomicU64,
}

struct Room<F: Family> {
    quota: Arc<Quota>,
    /// Never held while an `Arc` of a flight is dropped.
    by_age: Mutex<ByAge<F>>,
}

/// What a shard retains, oldest completion first, and how many of these have left the table.
struct ByAge<F: Family> {
    flights: VecDeque<Weak<Flight<F>>>,
    stale: usize,
}

struct Deadlines<F: Family> {
    heap: BinaryHeap<Reverse<Deadline<F>>>,
    /// How many of the heap's flights have left the table before their time.
    stale: usize,
}

/// How a flight left the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removed {
    /// Its deadline was taken off the heap.
    Expired,
    /// It was taken off the list by age, and is no longer counted.
    Evicted,
    Dropped,
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
    pub(crate) fn new(quota: Option<&Arc<Quota>>) -> Self {
        let deadlines = Mutex::new(Deadlines { heap: BinaryHeap::new(), stale: 0 });
        let room = quota.map(|quota| Room {
            quota: Arc::clone(quota),
            by_age: Mutex::new(ByAge { flights: VecDeque::new(), stale: 0 }),
        });
        Self { table: Table::new(), deadlines, room, counters: Counters::default() }
    }

    /// Notes that a flight was put into the table.
    pub(crate) fn note_claimed(&self) {
        if self.counters.claimed.fetch_add(1, Ordering::Relaxed).is_multiple_of(MAKE_ROOM_EVERY) {
            self.table.make_room();
        }
    }

    /// Notes that an outcome without a call was put into the table.
    pub(crate) fn note_primed(&self) {
        self.counters.primed.fetch_add(1, Ordering::Relaxed);
        self.table.make_room();
    }

    /// Notes that a flight has become retained. True if the sweeper has to know of its deadline.
    pub(crate) fn note_retained(&self, flight: &Arc<Flight<F>>, at: Nanos) -> bool {
        self.counters.retained.fetch_add(1, Ordering::Relaxed);
        if let Some(room) = &self.room {
            self.evict(room, flight);
        }
        if at == FOREVER {
            return false;
        }
        self.deadlines.lock().heap.push(Reverse(Deadline { at, flight: Arc::downgrade(flight) }));
        true
    }

    /// Whether another retained outcome would make it too many.
    pub(crate) fn is_full(&self) -> bool {
        let full = |room: &Room<F>| room.quota.retained.load(Ordering::Acquire) >= room.quota.most;
        self.room.as_ref().is_some_and(full)
    }

    /// Drops the oldest outcomes of this shard, never the newest, while all shards together have too many.
    fn evict(&self, room: &Room<F>, newest: &Arc<Flight<F>>) {
        let Quota { most, retained } = &*room.quota;
        retained.fetch_add(1, Ordering::AcqRel);
        room.by_age.lock().flights.push_back(Arc::downgrade(newest));
        let mut evicted = 0;
        // The count goes down first, so that two shards do not both make room for the same outcome.
        while retained
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n > *most).then(|| n - 1))
            .is_ok()
        {
            if !self.evict_oldest(room) {
                retained.fetch_add(1, Ordering::AcqRel);
                break;
            }
            evicted += 1;
        }
        if evicted > 0 {
            self.counters.evicted.fetch_add(evicted, Ordering::Relaxed);
            self.table.flush();
        }
    }

    fn evict_oldest(&self, room: &Room<F>) -> bool {
        loop {
            let oldest = {
                let mut by_age = room.by_age.lock();
                if by_age.flights.len() > 1 { by_age.flights.pop_front() } else { None }
            };
            let Some(oldest) = oldest else { return false };
            if let Some(flight) = oldest.upgrade()
                && self.table.remove(&flight)
            {
                self.note_removed(&flight, Removed::Evicted);
                return true;
            }
            let mut by_age = room.by_age.lock();
            by_age.stale = by_age.stale.saturating_sub(1);
        }
    }

    /// Takes a flight out of the table, retained or not, if it is still there.
    pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
        let removed = self.table.remove(flight);
        if removed {
            self.note_removed(flight, Removed::Dropped);
        }
        removed
    }

    /// Keeps the books when a flight has left the table.
    pub(crate) fn note_removed(&self, flight: &Flight<F>, how: Removed) {
        if flight.state() != State::Retained {
            return;
        }
        self.counters.released.fetch_add(1, Ordering::Relaxed);
        if let Some(room) = &self.room
            && how != Removed::Evicted
        {
            room.quota.retained.fetch_sub(1, Ordering::AcqRel);
            let mut by_age = room.by_age.lock();
            by_age.stale += 1;
            if by_age.stale * 2 > by_age.flights.len() && by_age.flights.len() >= COMPACT_FROM {
                by_age.flights.retain(|flight| flight.strong_count() > 0);
                by_age.stale = 0;
            }
        }
        if how != Removed::Expired && flight.deadline() != FOREVER {
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
                self.note_removed(&flight, Removed::Expired);
            }
        }
        if !due.is_empty() {
            self.table.flush();
        }
        due
    }
}

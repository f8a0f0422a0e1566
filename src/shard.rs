//! One shard of the map: its table, the deadlines of what it retains, and its counters.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use crate::clock::{FOREVER, Nanos};
use crate::family::Family;
use crate::flight::Flight;
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
    most: u64,
    /// May be below zero for a moment, since an outcome can be dropped before it is counted.
    retained: AtomicU64,
}

impl Quota {
    pub(crate) fn new(most: u64) -> Self {
        Self { most: most.min(i64::MAX.cast_unsigned()), retained: AtomicU64::new(0) }
    }

    fn add(&self) {
        self.retained.fetch_add(1, Ordering::AcqRel);
    }

    fn subtract(&self) {
        self.retained.fetch_sub(1, Ordering::AcqRel);
    }

    fn has_surplus(&self) -> bool {
        self.retained.load(Ordering::Acquire).cast_signed() > self.most.cast_signed()
    }

    /// Counts one less, if there are too many.
    fn subtract_surplus(&self) -> bool {
        let less = |retained: u64| {
            (retained.cast_signed() > self.most.cast_signed()).then(|| retained.wrapping_sub(1))
        };
        self.retained.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok()
    }
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
            room.quota.add();
            room.by_age.lock().flights.push_back(Arc::downgrade(flight));
        }
        // None if it was dropped in this very moment.
        if at == FOREVER || at == 0 {
            return false;
        }
        self.deadlines.lock().heap.push(Reverse(Deadline { at, flight: Arc::downgrade(flight) }));
        true
    }

    /// Whether all shards together retain too many.
    pub(crate) fn has_surplus(&self) -> bool {
        self.room.as_ref().is_some_and(|room| room.quota.has_surplus())
    }

    /// Drops the oldest outcomes of this shard, never the newest, while all shards together have too many.
    pub(crate) fn evict(&self) {
        let Some(room) = &self.room else { return };
        let mut evicted = 0;
        // The count goes down first, so that two shards do not both make room for the same outcome.
        while room.quota.subtract_surplus() {
            if !self.evict_oldest(room) {
                room.quota.add();
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
                && let Some(deadline) = flight.release()
            {
                self.table.remove(&flight);
                self.counters.released.fetch_add(1, Ordering::Relaxed);
                self.note_stale_deadline(deadline);
                return true;
            }
            let mut by_age = room.by_age.lock();
            by_age.stale = by_age.stale.saturating_sub(1);
        }
    }

    /// Takes a flight out of the table, retained or not. False if it was not there any more.
    pub(crate) fn remove(&self, flight: &Arc<Flight<F>>) -> bool {
        // The books first, so that nothing is evicted to make room that this makes.
        self.note_removed(flight);
        self.table.remove(flight)
    }

    /// Keeps the books when a flight leaves the table.
    pub(crate) fn note_removed(&self, flight: &Flight<F>) {
        if let Some(deadline) = flight.release() {
            self.note_released(1);
            self.note_stale_deadline(deadline);
        }
    }

    fn note_released(&self, count: usize) {
        self.counters.released.fetch_add(count as u64, Ordering::Relaxed);
        let Some(room) = &self.room else { return };
        (0..count).for_each(|_| room.quota.subtract());
        let mut by_age = room.by_age.lock();
        by_age.stale += count;
        if by_age.stale * 2 > by_age.flights.len() && by_age.flights.len() >= COMPACT_FROM {
            by_age.flights.retain(|flight| flight.strong_count() > 0);
            by_age.stale = 0;
        }
    }

    fn note_stale_deadline(&self, deadline: Nanos) {
        if deadline == FOREVER {
            return;
        }
        let mut deadlines = self.deadlines.lock();
        deadlines.stale += 1;
        if deadlines.stale * 2 > deadlines.heap.len() && deadlines.heap.len() >= COMPACT_FROM {
            deadlines.heap.retain(|Reverse(deadline)| deadline.flight.strong_count() > 0);
            deadlines.stale = 0;
        }
    }

    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        self.deadlines.lock().heap.peek().map(|Reverse(deadline)| deadline.at)
    }

    /// Removes up to `limit` expired outcomes and tells which, for who wants to know when they are dropped.
    pub(crate) fn expire(&self, now: Nanos, limit: usize) -> Vec<Weak<Flight<F>>> {
        let (mut due, mut flights) = (Vec::new(), Vec::new());
        {
            let mut deadlines = self.deadlines.lock();
            while due.len() < limit && deadlines.heap.peek().is_some_and(|Reverse(first)| first.at <= now) {
                let Some(Reverse(Deadline { flight, .. })) = deadlines.heap.pop() else { break };
                flights.extend(flight.upgrade());
                due.push(flight);
            }
            // Under the mutex, so that nobody finds the heap empty and what was on it still counted.
            let released = flights.iter().filter(|flight| flight.release().is_some()).count();
            if released > 0 {
                self.note_released(released);
            }
            if deadlines.heap.is_empty() {
                // A quiet map gives its memory back.
                deadlines.heap = BinaryHeap::new();
                deadlines.stale = 0;
            }
        }
        for flight in &flights {
            self.table.remove(flight);
        }
        drop(flights);
        if !due.is_empty() {
            self.table.flush();
        }
        due
    }
}

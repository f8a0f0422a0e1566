//! Lists of flights that have to be found without their keys.

use crate::family::Family;
use crate::flight::{Flight, State};
use crate::sync::{Arc, Mutex, Weak};

/// Flights under way, and some that have landed.
pub(crate) struct Roster<F: Family>(Mutex<Listed<F>>);

struct Listed<F: Family> {
    flights: Vec<Weak<Flight<F>>>,
    /// The length at which those that have landed are sorted out.
    prune_at: usize,
}

impl<F: Family> Roster<F> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Listed { flights: Vec::new(), prune_at: 64 }))
    }

    pub(crate) fn add(&self, flight: &Arc<Flight<F>>) {
        // Dropped after the lock, since the last handle to a flight may be among them.
        let mut held = Vec::new();
        let mut listed = self.0.lock();
        listed.flights.push(Arc::downgrade(flight));
        if listed.flights.len() >= listed.prune_at {
            held.extend(listed.flights.iter().filter_map(Weak::upgrade));
            let under_way = held.iter().filter(|flight| flight.state() == State::Pending);
            listed.flights = under_way.map(Arc::downgrade).collect();
            listed.prune_at = 2 * listed.flights.len().max(32);
        }
        drop(listed);
        drop(held);
    }

    pub(crate) fn under_way(&self) -> Vec<Arc<Flight<F>>> {
        let flights = self.0.lock().flights.clone();
        flights.iter().filter_map(Weak::upgrade).filter(|flight| flight.state() == State::Pending).collect()
    }
}

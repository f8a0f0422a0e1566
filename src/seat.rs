//! A caller's place in a flight.

use crate::aftermath::Left;
use crate::clock::Nanos;
use crate::family::Family;
use crate::flight::{Flight, State};
use crate::sync::{Arc, park_until};
use crate::waiter::{Fate, Waiter, Wakeup};

/// How a waiter's flight stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Waiting,
    /// The outcome is there to read.
    Landed,
    Offered,
    Private,
    Cancelled,
    Withdrawn,
}

/// A caller's place in a flight. Dropping it leaves the flight.
pub struct Seat<F: Family> {
    pub(crate) flight: Arc<Flight<F>>,
    pub(crate) waiter: Arc<Waiter<F>>,
}

impl<F: Family> Seat<F> {
    pub fn standing(&self) -> Standing {
        // The state first, see rule 6.
        let state = self.flight.state();
        match self.waiter.fate() {
            Fate::Waiting if state == State::Pending => Standing::Waiting,
            Fate::Waiting => Standing::Landed,
            Fate::Offered => Standing::Offered,
            Fate::Private => Standing::Private,
            Fate::Cancelled => Standing::Cancelled,
            Fate::Withdrawn => Standing::Withdrawn,
        }
    }

    pub fn flight(&self) -> &Arc<Flight<F>> {
        &self.flight
    }

    /// What wakes this seat's task, if the seat alone holds it: not the flight, too, or who is about to wake it.
    pub fn own_task(&self) -> Option<&F::Task> {
        if Arc::strong_count(&self.waiter) == 1 { self.waiter.task() } else { None }
    }

    /// Whether it is the seat of the caller whose call this is.
    pub fn is_callers_own(&self) -> bool {
        matches!(self.waiter.wakeup, Wakeup::Caller(_))
    }

    /// The outcome, when the flight has landed with this seat in it.
    pub fn outcome(&self) -> Option<&F::Outcome> {
        if self.standing() == Standing::Landed { self.flight.outcome.get_seated() } else { None }
    }

    pub(crate) fn accept_offer(&self, thread: u64, max_flight: Nanos) -> Option<u32> {
        self.flight.accept_offer(&self.waiter, thread, max_flight)
    }

    /// Gives the caller's own future to its seat. False when there is nothing left to wait for.
    pub(crate) fn wait_with(&self, task: F::Task) -> bool {
        let pending = self.flight.pending.lock();
        if pending.is_none() || self.waiter.fate() != Fate::Waiting {
            drop(pending);
            drop(task);
            return false;
        }
        let refused = match &self.waiter.wakeup {
            Wakeup::Caller(cell) => cell.set(task).err(),
            Wakeup::Thread(_) | Wakeup::Task(_) => Some(task),
        };
        drop(pending);
        refused.is_none()
    }

    pub(crate) fn begin_waiting(&self) {
        self.flight.begin_waiting(&self.waiter);
    }

    /// Blocks this thread until its flight has something for it, or until `limit` has passed.
    pub fn wait(&self, limit: Option<std::time::Duration>) -> Standing {
        park_until(limit, || self.standing() != Standing::Waiting);
        self.standing()
    }

    /// Wakes on the threads that wait behind this one; a woken waiter does so before anything that can fail.
    pub fn pass_baton(&self) {
        self.waiter.pass_baton();
    }

    pub(crate) fn leave(&self) -> Left<F> {
        self.flight.leave(&self.waiter)
    }
}

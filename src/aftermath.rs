//! What is left to do for a flight once its mutex is released: whom to wake, and what to drop.

use crate::family::Family;
use crate::flight::{Pending, State};
use crate::sync::Arc;
use crate::waiter::{Chain, Waiter};

/// What is left to do, outside of the mutex, for a flight that has just landed.
pub(crate) struct Landed<F: Family> {
    pub(crate) state: State,
    pub(crate) owned: bool,
    pub(crate) wake: Wake<F>,
    // Dropped late, since it may hold foreign objects.
    pub(crate) _rest: Box<Pending<F>>,
    pub(crate) _untaken: Option<F::Outcome>,
}

/// Whom the lead of a flight went to.
pub(crate) enum NextLead {
    /// There was nobody, and the flight ended; `owned` if the table still has it.
    Nobody {
        owned: bool,
    },
    Thread,
    /// It is offered to a task, which may not come for it.
    Task,
}

pub(crate) struct HandedOver<F: Family> {
    pub(crate) to: NextLead,
    /// Whether the caller whose call ended was still there.
    pub(crate) caller_present: bool,
    /// The task that the lead is offered to.
    pub(crate) offered_to: Option<Arc<Waiter<F>>>,
    pub(crate) wake: Wake<F>,
    // Dropped late, since they may hold foreign objects.
    pub(crate) rest: Option<Box<Pending<F>>>,
    pub(crate) call: Option<F::Call>,
}

impl<F: Family> HandedOver<F> {
    pub(crate) fn wake(self) {
        let Self { wake, rest, call, .. } = self;
        wake.now();
        drop((rest, call));
    }
}

/// Waiters to wake once no mutex is held.
pub(crate) struct Wake<F: Family> {
    pub(crate) threads: Option<Arc<Chain<F>>>,
    pub(crate) one: Option<Arc<Waiter<F>>>,
    pub(crate) tasks: Vec<Arc<Waiter<F>>>,
}

impl<F: Family> Wake<F> {
    pub(crate) fn nobody() -> Self {
        Self { threads: None, one: None, tasks: Vec::new() }
    }

    pub(crate) fn is_for_somebody(&self) -> bool {
        self.threads.is_some() || self.one.is_some() || !self.tasks.is_empty()
    }

    pub(crate) fn now(self) {
        if let Some(chain) = self.threads {
            chain.pass();
        }
        if let Some(waiter) = self.one {
            waiter.unpark();
        }
        if !self.tasks.is_empty() {
            F::wake_tasks(self.tasks);
        }
    }
}

/// What a caller that left a pending flight has to see to.
pub(crate) enum Left<F: Family> {
    Nothing,
    /// It held the offer of the lead.
    HandedOver(HandedOver<F>),
    /// It was the last; the call may be cancelled, and nobody can join the flight any more.
    Alone {
        call: F::Call,
        owned: bool,
        _rest: Box<Pending<F>>,
    },
}

/// What a flight's waiters are left with when their key is cancelled.
pub(crate) struct Cancelled<F: Family> {
    pub(crate) wake: Wake<F>,
    /// Whether nobody is left to wait for the call, so that the flight has ended.
    pub(crate) ended: bool,
    /// The call, if it is to be cancelled, too.
    pub(crate) call: Option<F::Call>,
    // Dropped late, since it may hold foreign objects.
    pub(crate) _rest: Option<Box<Pending<F>>>,
}

/// What a caller that has joined has to tell the map.
pub(crate) struct News {
    /// The flight [needs watching](Flight::needs_watch), because another loop than the joiner's leads.
    pub(crate) watch: bool,
    /// Its first task has joined.
    pub(crate) awaited: bool,
}

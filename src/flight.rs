//! One underlying call of one key, from claim to outcome.
//!
//! 1. `state` goes from pending to retained or to ended, once. An ended flight cannot be joined, and a claim replaces
//!    it in the table.
//! 2. `pending` holds all that only a flight under way needs. It is `Some` exactly while `state` is pending, and both
//!    change together under its mutex.
//! 3. At most one [`Lead`](crate::map::Lead) can end the flight: the one whose `epoch` is the pending part's. Whoever
//!    takes the lead away (hand-over, a lost loop) raises the epoch, and a stale lead publishes nothing.
//! 4. The outcome is written once, under the mutex, before `state` says so. A retained one stays until the flight is
//!    dropped. One that is not retained is there for the seats that the flight had when it landed (`takers`); the
//!    last of them clears it.
//! 5. A waiter's fate changes under the mutex only, and before `state` does. So who reads the state first and then
//!    `Waiting` knows that the outcome is its own to read.

use std::collections::VecDeque;

use crate::clock::{FOREVER, Nanos, now};
use crate::family::Family;
use crate::outcome::OutcomeCell;
use crate::sync::{Arc, AtomicU8, AtomicU32, AtomicU64, Mutex, MutexGuard, OnceLock, Ordering};
use crate::waiter::{Chain, Fate, LoopId, NO_LOOP, Waiter, Wakeup};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Pending,
    Retained,
    Ended,
}

pub struct Flight<F: Family> {
    hash: u64,
    key: F::Key,
    outcome: OutcomeCell<F::Outcome>,
    /// When a retained outcome expires.
    deadline: AtomicU64,
    takers: AtomicU32,
    state: AtomicU8,
    pending: Mutex<Option<Box<Pending<F>>>>,
}

pub(crate) struct Pending<F: Family> {
    epoch: u32,
    /// Seats whose callers still want the outcome.
    callers: u32,
    /// Those that have not been offered the lead, first come first.
    waiters: VecDeque<Arc<Waiter<F>>>,
    offer: Option<Offer<F>>,
    /// Whether the table still has this flight. If not, the outcome is not retained.
    owned: bool,
    /// The caller whose call this is, where the call runs in a task of its own.
    caller: Option<Arc<Waiter<F>>>,
    call: Option<F::Call>,
    led_on: LoopId,
}

struct Offer<F: Family> {
    to: Arc<Waiter<F>>,
    since: Nanos,
}

/// What is left to do, outside of the mutex, for a flight that has just landed.
pub(crate) struct Landed<F: Family> {
    pub(crate) state: State,
    pub(crate) owned: bool,
    pub(crate) deadline: Nanos,
    pub(crate) wake: Wake<F>,
    // Dropped late, since it may hold foreign objects.
    _rest: Box<Pending<F>>,
    _untaken: Option<F::Outcome>,
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
    wake: Wake<F>,
    // Dropped late, since they may hold foreign objects.
    rest: Option<Box<Pending<F>>>,
    call: Option<F::Call>,
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
    threads: Option<Arc<Chain<F>>>,
    one: Option<Arc<Waiter<F>>>,
    tasks: Vec<Arc<Waiter<F>>>,
}

impl<F: Family> Wake<F> {
    fn nobody() -> Self {
        Self { threads: None, one: None, tasks: Vec::new() }
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

impl<F: Family> Flight<F> {
    pub(crate) fn new(hash: u64, key: F::Key, led_on: LoopId) -> Self {
        let pending = Pending {
            epoch: 0,
            callers: 0,
            waiters: VecDeque::new(),
            offer: None,
            owned: true,
            caller: None,
            call: None,
            led_on,
        };
        Self {
            hash,
            key,
            outcome: OutcomeCell::empty(),
            deadline: AtomicU64::new(0),
            takers: AtomicU32::new(0),
            state: AtomicU8::new(State::Pending as u8),
            pending: Mutex::new(Some(Box::new(pending))),
        }
    }

    #[inline]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    #[inline]
    pub fn key(&self) -> &F::Key {
        &self.key
    }

    #[inline]
    pub fn state(&self) -> State {
        // Acquire: pairs with `set_state`, which comes after the outcome and the fates were written.
        match self.state.load(Ordering::Acquire) {
            0 => State::Pending,
            1 => State::Retained,
            _ => State::Ended,
        }
    }

    fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// The retained outcome, if there is one and it has not expired.
    #[inline]
    pub fn retained(&self, now: Nanos) -> Option<&F::Outcome> {
        // Relaxed: written before the state that was just acquired.
        if self.state() == State::Retained && now < self.deadline.load(Ordering::Relaxed) {
            self.outcome.get_retained()
        } else {
            None
        }
    }

    /// The retained outcome, expired or not, for the garbage collector.
    pub fn retained_at_all(&self) -> Option<&F::Outcome> {
        if self.state() == State::Retained { self.outcome.get_retained() } else { None }
    }

    /// Whether a caller that finds this flight must not lead one of its own.
    #[inline]
    pub fn is_live(&self, now: Nanos) -> bool {
        self.state() == State::Pending || self.retained(now).is_some()
    }

    /// The number of the present lead; `None` when the flight is over.
    pub fn epoch(&self) -> Option<u32> {
        self.pending.lock().as_ref().map(|pending| pending.epoch)
    }

    /// How many callers have joined and wait.
    pub fn waiters(&self) -> usize {
        self.pending.lock().as_ref().map_or(0, |open| open.waiters.len())
    }

    /// The call's task and the loop that it runs on, if another loop than `from` leads.
    pub(crate) fn call_led_elsewhere(&self, from: LoopId) -> Option<(F::Call, u32)> {
        let pending = self.pending.lock();
        let pending = pending.as_ref()?;
        if pending.led_on == from {
            return None;
        }
        pending.call.as_ref().map(|call| (F::share_call(call), pending.epoch))
    }

    /// Takes a seat, if the flight is still under way. Also tells whether another loop than the joiner's leads, so that
    /// the flight [needs watching](Self::needs_watch).
    pub(crate) fn join(self: &Arc<Self>, loop_id: LoopId, wakeup: Wakeup<F>) -> Option<(Seat<F>, bool)> {
        let waiter = Waiter::new(loop_id, wakeup);
        let mut pending = self.pending.lock();
        let open = pending.as_mut()?;
        open.callers += 1;
        open.waiters.push_back(Arc::clone(&waiter));
        let led_elsewhere = open.led_on != NO_LOOP && open.led_on != loop_id;
        drop(pending);
        Some((Seat { flight: Arc::clone(self), waiter }, led_elsewhere))
    }

    /// A seat for the caller whose call is about to run in a task of its own.
    pub(crate) fn seat_caller(self: &Arc<Self>, epoch: u32, loop_id: LoopId) -> Seat<F> {
        let waiter = Waiter::new(loop_id, Wakeup::Caller(OnceLock::new()));
        let mut pending = self.pending.lock();
        match pending.as_mut().filter(|open| open.epoch == epoch) {
            Some(open) => {
                open.callers += 1;
                open.caller = Some(Arc::clone(&waiter));
                open.led_on = loop_id;
            }
            None => waiter.set_fate(Fate::Private),
        }
        drop(pending);
        Seat { flight: Arc::clone(self), waiter }
    }

    /// Tells which task runs the call, so that the last caller to leave can cancel it.
    pub(crate) fn led_by(&self, epoch: u32, call: F::Call) {
        let mut pending = self.pending.lock();
        let refused = match pending.as_mut().filter(|open| open.epoch == epoch) {
            Some(open) => open.call.replace(call),
            None => Some(call),
        };
        drop(pending);
        drop(refused);
    }

    /// Takes the flight out of the map's hands: its outcome will not be retained.
    pub(crate) fn disown(&self) {
        if let Some(pending) = self.pending.lock().as_mut() {
            pending.owned = false;
        }
    }

    /// Ends the flight with an outcome, unless `epoch` no longer has the lead.
    pub(crate) fn land(&self, epoch: u32, outcome: F::Outcome, ttl: Nanos) -> Result<Landed<F>, F::Outcome> {
        let deadline = if ttl == FOREVER { FOREVER } else { now().saturating_add(ttl) };
        let mut slot = self.pending.lock();
        let Some(mut rest) = slot.take_if(|open| open.epoch == epoch) else {
            drop(slot);
            return Err(outcome);
        };
        let takers = rest.callers;
        let retain = rest.owned && ttl > 0;
        let mut untaken = None;
        let mut threads = Vec::new();
        let mut tasks = Vec::new();
        for waiter in rest.waiters.drain(..).chain(rest.caller.take()) {
            match waiter.wakeup {
                Wakeup::Thread(_) => threads.push(waiter),
                Wakeup::Task(_) | Wakeup::Caller(_) => tasks.push(waiter),
            }
        }
        let threads = (!threads.is_empty()).then(|| Chain::link(threads));
        let state = if retain {
            self.outcome.set(outcome);
            // Relaxed: published by the state.
            self.deadline.store(deadline, Ordering::Relaxed);
            State::Retained
        } else {
            if takers > 0 {
                self.outcome.set(outcome);
            } else {
                untaken = Some(outcome);
            }
            // Relaxed: published by the state.
            self.takers.store(takers, Ordering::Relaxed);
            State::Ended
        };
        self.set_state(state);
        drop(slot);
        let wake = Wake { threads, one: None, tasks };
        Ok(Landed { state, owned: rest.owned, deadline, wake, _rest: rest, _untaken: untaken })
    }

    /// Gives the lead to the next waiter, because the present call ended in a way that others do not share.
    ///
    /// With `loop_lost`, waiters on the leader's loop are cancelled with it. `None` if `epoch` has no lead to give.
    pub(crate) fn hand_over(&self, epoch: u32, loop_lost: bool) -> Option<HandedOver<F>> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut().filter(|open| open.epoch == epoch)?;
        let mut tasks = Vec::new();
        let caller = open.caller.take();
        let caller_present = caller.is_some();
        if let Some(caller) = caller {
            caller.set_fate(if loop_lost { Fate::Cancelled } else { Fate::Private });
            open.callers -= 1;
            tasks.push(caller);
        }
        if loop_lost && open.led_on != NO_LOOP {
            let lost = open.led_on;
            let (gone, stay): (VecDeque<_>, _) = open.waiters.drain(..).partition(|w| w.loop_id == lost);
            open.waiters = stay;
            for waiter in gone {
                waiter.set_fate(Fate::Cancelled);
                open.callers -= 1;
                tasks.push(waiter);
            }
        }
        let mut handed = self.offer_next(slot);
        handed.caller_present = caller_present;
        handed.wake.tasks.append(&mut tasks);
        Some(handed)
    }

    /// Offers the lead to the first waiter, or ends the flight.
    fn offer_next(&self, mut slot: MutexGuard<'_, Option<Box<Pending<F>>>>) -> HandedOver<F> {
        let nobody = NextLead::Nobody { owned: false };
        let mut handed =
            HandedOver { to: nobody, caller_present: false, wake: Wake::nobody(), rest: None, call: None };
        let Some(open) = slot.as_mut() else { return handed };
        open.epoch += 1;
        open.offer = None;
        handed.call = open.call.take();
        let Some(next) = open.waiters.pop_front() else {
            handed.to = NextLead::Nobody { owned: open.owned };
            handed.rest = slot.take();
            self.set_state(State::Ended);
            return handed;
        };
        next.set_fate(Fate::Offered);
        open.led_on = next.loop_id;
        if next.task().is_some() {
            handed.to = NextLead::Task;
            handed.wake.tasks.push(Arc::clone(&next));
        } else {
            handed.to = NextLead::Thread;
            handed.wake.one = Some(Arc::clone(&next));
        }
        open.offer = Some(Offer { to: next, since: now() });
        handed
    }

    /// Takes back an offer that a task has not come for since before `since`.
    pub(crate) fn withdraw_offer(&self, since: Nanos) -> Option<HandedOver<F>> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut()?;
        let offer = open.offer.take_if(|offer| offer.to.task().is_some() && offer.since <= since)?;
        offer.to.set_fate(Fate::Withdrawn);
        open.callers -= 1;
        let handed = self.offer_next(slot);
        Some(handed)
    }

    /// Whether somebody else than the tasks of the leader's loop depends on this flight, so that it needs a look from
    /// time to time.
    pub(crate) fn needs_watch(&self) -> bool {
        let pending = self.pending.lock();
        pending.as_ref().is_some_and(|open| {
            let elsewhere = open.led_on != NO_LOOP && open.waiters.iter().any(|w| w.loop_id != open.led_on);
            elsewhere || open.offer.as_ref().is_some_and(|offer| offer.to.task().is_some())
        })
    }

    /// The epoch of the lead that was offered to this waiter, if the offer stands.
    fn accept_offer(&self, waiter: &Arc<Waiter<F>>) -> Option<u32> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut()?;
        let offer = open.offer.take_if(|offer| Arc::ptr_eq(&offer.to, waiter))?;
        // From now on it is a leader; if its call runs in a task, it takes a caller's seat.
        open.callers -= 1;
        waiter.set_fate(Fate::Private);
        let epoch = open.epoch;
        drop(slot);
        drop(offer);
        Some(epoch)
    }

    fn leave(&self, waiter: &Arc<Waiter<F>>) -> Left<F> {
        let mut slot = self.pending.lock();
        let Some(open) = slot.as_mut() else {
            drop(slot);
            // It has landed with this waiter in it, so others count on being woken by it.
            waiter.pass_baton();
            self.release_outcome(waiter);
            return Left::Nothing;
        };
        match waiter.fate() {
            Fate::Offered => {
                open.callers -= 1;
                return Left::HandedOver(self.offer_next(slot));
            }
            Fate::Waiting => {}
            Fate::Private | Fate::Cancelled | Fate::Withdrawn => return Left::Nothing,
        }
        open.callers -= 1;
        if open.caller.take_if(|caller| Arc::ptr_eq(caller, waiter)).is_none() {
            open.waiters.retain(|other| !Arc::ptr_eq(other, waiter));
        }
        if open.callers > 0 || open.call.is_none() {
            return Left::Nothing;
        }
        let Some(mut rest) = slot.take() else { return Left::Nothing };
        self.set_state(State::Ended);
        drop(slot);
        match rest.call.take() {
            Some(call) => Left::Alone { call, owned: rest.owned, _rest: rest },
            None => Left::Nothing,
        }
    }

    /// The last seat of a flight whose outcome is not retained clears it.
    fn release_outcome(&self, waiter: &Waiter<F>) {
        if self.state() != State::Ended || waiter.fate() != Fate::Waiting {
            return;
        }
        // AcqRel: every other seat's reading comes before the clearing.
        if self.takers.fetch_sub(1, Ordering::AcqRel) == 1 {
            drop(self.outcome.take_last());
        }
    }
}

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
    flight: Arc<Flight<F>>,
    waiter: Arc<Waiter<F>>,
}

impl<F: Family> Seat<F> {
    pub fn standing(&self) -> Standing {
        // The state first, see rule 5.
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

    pub fn task(&self) -> Option<&F::Task> {
        self.waiter.task()
    }

    /// Whether it is the seat of the caller whose call this is.
    pub fn is_callers_own(&self) -> bool {
        matches!(self.waiter.wakeup, Wakeup::Caller(_))
    }

    /// The outcome, when the flight has landed with this seat in it.
    pub fn outcome(&self) -> Option<&F::Outcome> {
        if self.standing() == Standing::Landed { self.flight.outcome.get_seated() } else { None }
    }

    pub(crate) fn accept_offer(&self) -> Option<u32> {
        self.flight.accept_offer(&self.waiter)
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

    /// Blocks this thread until its flight has something for it, or until `limit` has passed.
    #[cfg(not(loom))]
    pub fn wait(&self, limit: Option<std::time::Duration>) -> Standing {
        let until = limit.map(|limit| std::time::Instant::now() + limit);
        loop {
            let standing = self.standing();
            if standing != Standing::Waiting {
                return standing;
            }
            match until {
                None => crate::sync::park(),
                Some(until) => {
                    let left = until.saturating_duration_since(std::time::Instant::now());
                    if left.is_zero() {
                        return standing;
                    }
                    crate::sync::park_timeout(left);
                }
            }
        }
    }

    /// Blocks this thread until its flight has something for it.
    #[cfg(loom)]
    pub fn wait(&self) -> Standing {
        loop {
            let standing = self.standing();
            if standing != Standing::Waiting {
                return standing;
            }
            crate::sync::park();
        }
    }

    /// Wakes on the threads that wait behind this one; a woken waiter does so before anything that can fail.
    pub fn pass_baton(&self) {
        self.waiter.pass_baton();
    }

    pub(crate) fn leave(&self) -> Left<F> {
        self.flight.leave(&self.waiter)
    }
}

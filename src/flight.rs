//! One underlying call of one key, from claim to outcome.
//!
//! 1. `state` goes from pending to retained or to ended, once. An ended flight cannot be joined, and a claim replaces
//!    it in the table.
//! 2. `pending` holds all that only a flight under way needs. It is `Some` exactly while `state` is pending, and both
//!    change together under its mutex.
//! 3. At most one [`Lead`](crate::lead::Lead) can end the flight: the one whose `epoch` is the pending part's. Whoever
//!    takes the lead away (hand-over, a lost loop) raises the epoch, and a stale lead publishes nothing.
//! 4. The outcome is written once, under the mutex, before `state` says so. A retained one stays until the flight is
//!    dropped. One that is not retained is there for the seats that the flight had when it landed (`takers`); the
//!    last of them clears it.
//! 5. While pending, `deadline` tells when the flight is over age: from then on it is no longer joined, but replaced.
//! 6. A waiter's fate changes under the mutex only, and before `state` does. So who reads the state first and then
//!    `Waiting` knows that the outcome is its own to read.

use std::collections::VecDeque;

use crate::aftermath::{Cancelled, HandedOver, Landed, Left, News, NextLead, Wake};
use crate::circle::is_blocked;
use crate::clock::{FOREVER, Nanos, now};
use crate::family::Family;
use crate::outcome::OutcomeCell;
use crate::seat::Seat;
use crate::sync::{Arc, AtomicU8, AtomicU32, AtomicU64, Mutex, MutexGuard, OnceLock, Ordering};
use crate::waiter::{Chain, Fate, LoopId, NO_LOOP, Origin, Waiter, Wakeup};

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
    pub(crate) outcome: OutcomeCell<F::Outcome>,
    /// When a retained outcome expires, or a pending flight is over age.
    deadline: AtomicU64,
    takers: AtomicU32,
    /// Of a flight that has landed: how many joined it, and how long the call took (the bits of an `f32`, in seconds).
    joined: AtomicU32,
    duration: AtomicU32,
    state: AtomicU8,
    pub(crate) pending: Mutex<Option<Box<Pending<F>>>>,
}

#[expect(clippy::struct_excessive_bools, reason = "they are independent of each other")]
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
    /// Whether the call goes on when all its callers have left.
    finishes: bool,
    led_by: Origin,
    /// When the present attempt began.
    since: Nanos,
    joined: u32,
    /// Whether the map's list of watched flights has this one, and that of flights with tasks.
    watched: bool,
    awaited: bool,
    /// Whether it was reported to be over age.
    reported: bool,
}

struct Offer<F: Family> {
    to: Arc<Waiter<F>>,
    since: Nanos,
}

/// A flight under way, as an operator sees it.
pub struct View<F: Family> {
    pub flight: Arc<Flight<F>>,
    pub age: Nanos,
    pub waiters: usize,
    pub led_by: Origin,
    pub call: Option<F::Call>,
    /// Whether the lead is offered to a waiter that has not taken it yet.
    pub offered: bool,
}

impl<F: Family> Flight<F> {
    pub(crate) fn new(
        hash: u64,
        key: F::Key,
        led_by: Origin,
        call: Option<F::Call>,
        since: Nanos,
        over_age_at: Nanos,
    ) -> Self {
        let pending = Pending {
            epoch: 0,
            callers: 0,
            waiters: VecDeque::new(),
            offer: None,
            owned: true,
            caller: None,
            call,
            finishes: false,
            led_by,
            since,
            joined: 0,
            watched: over_age_at != FOREVER,
            awaited: false,
            reported: false,
        };
        Self {
            hash,
            key,
            outcome: OutcomeCell::empty(),
            deadline: AtomicU64::new(over_age_at),
            takers: AtomicU32::new(0),
            joined: AtomicU32::new(0),
            duration: AtomicU32::new(0),
            state: AtomicU8::new(State::Pending as u8),
            pending: Mutex::new(Some(Box::new(pending))),
        }
    }

    /// One that has landed already, with an outcome that no call has made.
    pub(crate) fn landed(hash: u64, key: F::Key, outcome: F::Outcome, deadline: Nanos) -> Self {
        Self {
            hash,
            key,
            outcome: OutcomeCell::holding(outcome),
            deadline: AtomicU64::new(deadline),
            takers: AtomicU32::new(0),
            joined: AtomicU32::new(0),
            duration: AtomicU32::new(0),
            state: AtomicU8::new(State::Retained as u8),
            pending: Mutex::new(None),
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
        self.can_be_joined(now) || self.retained(now).is_some()
    }

    /// Whether the key is in flight or retained.
    pub fn is_there(&self, now: Nanos) -> bool {
        self.state() == State::Pending || self.retained(now).is_some()
    }

    /// Whether it is under way and not over age.
    pub fn can_be_joined(&self, now: Nanos) -> bool {
        // Relaxed: a flight that lands at this moment has a deadline in the future, too.
        self.state() == State::Pending && now < self.deadline.load(Ordering::Relaxed)
    }

    /// Notes how many seconds the call took, before it lands, if that is known better than by when it began here.
    pub fn took(&self, seconds: f32) {
        // Relaxed: published by the state.
        self.duration.store(seconds.to_bits(), Ordering::Relaxed);
    }

    /// How many callers joined the flight, and how many seconds the call took; of one that has landed.
    pub fn report(&self) -> (u32, f32) {
        // Relaxed: published by the state.
        (self.joined.load(Ordering::Relaxed), f32::from_bits(self.duration.load(Ordering::Relaxed)))
    }

    /// Takes a retained outcome off the books: from now on it counts as expired. The deadline that it had, or `None` if it
    /// is not on them, or no more.
    pub(crate) fn release(&self) -> Option<Nanos> {
        if self.state() != State::Retained {
            return None;
        }
        match self.deadline.swap(0, Ordering::AcqRel) {
            0 => None,
            deadline => Some(deadline),
        }
    }

    pub(crate) fn deadline(&self) -> Nanos {
        // Relaxed: published by the state.
        self.deadline.load(Ordering::Relaxed)
    }

    /// The number of the present lead; `None` when the flight is over.
    pub fn epoch(&self) -> Option<u32> {
        self.pending.lock().as_ref().map(|pending| pending.epoch)
    }

    /// How many callers have joined and wait.
    pub fn waiters(&self) -> usize {
        self.pending.lock().as_ref().map_or(0, |open| open.waiters.len())
    }

    /// The call, if one is known and under way.
    pub fn call(&self) -> Option<F::Call> {
        self.pending.lock().as_ref().and_then(|open| open.call.as_ref().map(F::share_call))
    }

    /// The call's task and the loop that it runs on, if another loop than `from` leads.
    pub(crate) fn call_led_elsewhere(&self, from: LoopId) -> Option<(F::Call, u32)> {
        let pending = self.pending.lock();
        let pending = pending.as_ref()?;
        if pending.led_by.loop_id == from {
            return None;
        }
        pending.call.as_ref().map(|call| (F::share_call(call), pending.epoch))
    }

    /// The number of the present lead and the loop that it needs; `None` when the flight is over.
    pub(crate) fn lead(&self) -> Option<(u32, LoopId)> {
        let pending = self.pending.lock();
        let open = pending.as_ref()?;
        // An offer that is not taken goes to somebody else.
        let loop_id = if open.offer.is_some() { NO_LOOP } else { open.led_by.loop_id };
        Some((open.epoch, loop_id))
    }

    pub(crate) fn view(self: &Arc<Self>, now: Nanos) -> Option<View<F>> {
        let slot = self.pending.lock();
        let open = slot.as_ref()?;
        let view = View {
            flight: Arc::clone(self),
            age: now.saturating_sub(open.since),
            waiters: open.waiters.len() + usize::from(open.offer.is_some()),
            led_by: open.led_by,
            call: open.call.as_ref().map(F::share_call),
            offered: open.offer.is_some(),
        };
        drop(slot);
        Some(view)
    }

    /// Takes a seat, if the flight is still under way. Also tells which lists of the map lack the flight now.
    pub(crate) fn join(
        self: &Arc<Self>,
        loop_id: LoopId,
        wakeup: Wakeup<F>,
        busy: bool,
    ) -> Option<(Seat<F>, News)> {
        use std::mem::replace;
        let waiter = Waiter::new(loop_id, wakeup);
        waiter.set_busy(busy);
        let mut pending = self.pending.lock();
        let open = pending.as_mut()?;
        open.callers += 1;
        open.joined += 1;
        open.waiters.push_back(Arc::clone(&waiter));
        let led_elsewhere = open.led_by.loop_id != NO_LOOP && open.led_by.loop_id != loop_id;
        let watch = led_elsewhere && !replace(&mut open.watched, true);
        let awaited = waiter.task().is_some() && !replace(&mut open.awaited, true);
        drop(pending);
        Some((Seat { flight: Arc::clone(self), waiter }, News { watch, awaited }))
    }

    /// The waiter has nothing else to do any more.
    pub(crate) fn begin_waiting(&self, waiter: &Waiter<F>) {
        let pending = self.pending.lock();
        waiter.set_busy(false);
        drop(pending);
    }

    /// Whether the lead of this number is under way, and the map still has the flight.
    pub(crate) fn is_owned(&self, epoch: u32) -> bool {
        self.pending.lock().as_ref().is_some_and(|open| open.epoch == epoch && open.owned)
    }

    /// True if it is under way and was not on the list of flights to watch, where its caller puts it now.
    pub(crate) fn note_watched(&self) -> bool {
        let mut pending = self.pending.lock();
        pending.as_mut().is_some_and(|open| !std::mem::replace(&mut open.watched, true))
    }

    /// A seat for the caller whose call is about to run in a task of its own.
    ///
    /// Also true if it is the first task that may wait for the flight.
    pub(crate) fn seat_caller(
        self: &Arc<Self>,
        epoch: u32,
        loop_id: LoopId,
        finishes: bool,
    ) -> (Seat<F>, bool) {
        let waiter = Waiter::new(loop_id, Wakeup::Caller(OnceLock::new()));
        let mut awaited = false;
        let mut pending = self.pending.lock();
        match pending.as_mut().filter(|open| open.epoch == epoch) {
            Some(open) => {
                open.callers += 1;
                open.caller = Some(Arc::clone(&waiter));
                open.led_by.loop_id = loop_id;
                open.finishes = finishes;
                awaited = !std::mem::replace(&mut open.awaited, true);
            }
            None => waiter.set_fate(Fate::Private),
        }
        drop(pending);
        (Seat { flight: Arc::clone(self), waiter }, awaited)
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

    /// Takes the flight out of the map's hands: its outcome will not be retained. False if it is not under way.
    pub(crate) fn disown(&self) -> bool {
        let mut pending = self.pending.lock();
        pending.as_mut().map(|open| open.owned = false).is_some()
    }

    /// Cancels all waiters, and the call too if they were the last to wait for it. The map has let go of the flight.
    pub(crate) fn cancel(&self) -> Option<Cancelled<F>> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut()?;
        open.owned = false;
        let offer = open.offer.take();
        let leaderless = offer.is_some();
        let waiters: Vec<_> = offer.map(|offer| offer.to).into_iter().chain(open.waiters.drain(..)).collect();
        open.callers -= u32::try_from(waiters.len()).unwrap_or(u32::MAX);
        let (tasks, mut threads): (Vec<_>, Vec<_>) =
            waiters.iter().cloned().partition(|waiter| waiter.task().is_some());
        threads.retain(|waiter| !waiter.is_busy());
        // Before their fates: who sees its fate passes the baton on.
        let threads = (!threads.is_empty()).then(|| Chain::link(threads));
        for waiter in &waiters {
            waiter.set_fate(Fate::Cancelled);
        }
        let wake = Wake { threads, one: None, tasks };
        let abandoned = open.callers == 0 && open.call.is_some() && !open.finishes;
        let ended = leaderless || abandoned;
        let (mut call, mut rest) = (None, None);
        if ended {
            call = open.call.take();
            rest = slot.take();
            self.set_state(State::Ended);
        }
        drop(slot);
        Some(Cancelled { wake, ended, call, _rest: rest })
    }

    /// Ends the flight with an outcome, unless `epoch` no longer has the lead.
    pub(crate) fn land(&self, epoch: u32, outcome: F::Outcome, ttl: Nanos) -> Result<Landed<F>, F::Outcome> {
        let landing = now();
        let deadline = landing.saturating_add(ttl);
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
                Wakeup::Thread(_) if waiter.is_busy() => {}
                Wakeup::Thread(_) => threads.push(waiter),
                Wakeup::Task(_) | Wakeup::Caller(_) => tasks.push(waiter),
            }
        }
        let threads = (!threads.is_empty()).then(|| Chain::link(threads));
        let duration = std::time::Duration::from_nanos(landing.saturating_sub(rest.since)).as_secs_f32();
        // Relaxed: published by the state.
        self.joined.store(rest.joined, Ordering::Relaxed);
        if self.duration.load(Ordering::Relaxed) == 0 {
            self.duration.store(duration.to_bits(), Ordering::Relaxed);
        }
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
        Ok(Landed { state, owned: rest.owned, wake, _rest: rest, _untaken: untaken })
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
        let lost = open.led_by.loop_id;
        if loop_lost && lost != NO_LOOP {
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
        let mut handed = HandedOver {
            to: nobody,
            caller_present: false,
            offered_to: None,
            wake: Wake::nobody(),
            rest: None,
            call: None,
        };
        let Some(open) = slot.as_mut() else { return handed };
        open.epoch += 1;
        open.offer = None;
        handed.call = open.call.take();
        // One whose loop is blocked could not come for it, unless nobody else can.
        let idle = |waiter: &Arc<Waiter<F>>| !waiter.is_busy();
        let able = |waiter: &Arc<Waiter<F>>| idle(waiter) && !is_blocked(waiter.loop_id);
        let first = open.waiters.iter().position(able).or_else(|| open.waiters.iter().position(idle));
        let Some(next) = first.and_then(|first| open.waiters.remove(first)) else {
            // Those who are busy ask again when they come; tasks find their futures done.
            open.waiters.iter().for_each(|waiter| waiter.set_fate(Fate::Withdrawn));
            handed.wake.tasks.extend(open.waiters.iter().filter(|waiter| waiter.task().is_some()).cloned());
            handed.to = NextLead::Nobody { owned: open.owned };
            handed.rest = slot.take();
            self.set_state(State::Ended);
            return handed;
        };
        next.set_fate(Fate::Offered);
        open.led_by.loop_id = next.loop_id;
        if next.task().is_some() {
            handed.to = NextLead::Task;
            handed.offered_to = Some(Arc::clone(&next));
            handed.wake.tasks.push(Arc::clone(&next));
        } else {
            handed.to = NextLead::Thread;
            handed.wake.one = Some(Arc::clone(&next));
        }
        open.offer = Some(Offer { to: next, since: now() });
        handed
    }

    /// Takes back an offer that a task has not come for since before `since`.
    pub(crate) fn withdraw_stale_offer(&self, since: Nanos) -> Option<HandedOver<F>> {
        self.withdraw_offer(|offer| offer.to.task().is_some() && offer.since <= since)
    }

    /// Takes back the offer to this task.
    pub(crate) fn withdraw_offer_to(&self, waiter: &Arc<Waiter<F>>) -> Option<HandedOver<F>> {
        self.withdraw_offer(|offer| Arc::ptr_eq(&offer.to, waiter))
    }

    fn withdraw_offer(&self, which: impl FnOnce(&mut Offer<F>) -> bool) -> Option<HandedOver<F>> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut()?;
        let offer = open.offer.take_if(which)?;
        offer.to.set_fate(Fate::Withdrawn);
        open.callers -= 1;
        open.joined -= 1;
        let handed = self.offer_next(slot);
        drop(offer);
        Some(handed)
    }

    /// Shows the tasks that wait for this flight, for the garbage collector: it is the flight that keeps them.
    pub fn for_each_task(&self, mut look: impl FnMut(&F::Task)) {
        let slot = self.pending.lock();
        let Some(open) = slot.as_ref() else { return };
        let offered = open.offer.as_ref().map(|offer| &offer.to);
        open.waiters
            .iter()
            .chain(&open.caller)
            .chain(offered)
            .filter_map(|waiter| waiter.task())
            .for_each(&mut look);
    }

    /// Whether this flight needs a look from time to time: somebody else than the tasks of the leader's loop depends on
    /// it, or it may come over age. If not, it leaves the list of watched flights.
    pub(crate) fn needs_watch(&self) -> bool {
        let mut pending = self.pending.lock();
        let Some(open) = pending.as_mut() else { return false };
        let led_on = open.led_by.loop_id;
        let elsewhere = led_on != NO_LOOP
            && (open.waiters.iter().any(|waiter| waiter.loop_id != led_on)
                || open.call.as_ref().is_some_and(F::is_needed_elsewhere));
        let offered = open.offer.as_ref().is_some_and(|offer| offer.to.task().is_some());
        let may_age = self.deadline() != FOREVER && !open.reported;
        open.watched = elsewhere || offered || may_age;
        open.watched
    }

    /// The flight's age, if it is over age and that was not reported yet.
    pub(crate) fn report_over_age(&self, now: Nanos) -> Option<Nanos> {
        let mut pending = self.pending.lock();
        let open = pending.as_mut()?;
        if now < self.deadline() || std::mem::replace(&mut open.reported, true) {
            return None;
        }
        Some(now.saturating_sub(open.since))
    }

    /// The epoch of the lead that was offered to this waiter, if the offer stands.
    pub(crate) fn accept_offer(
        &self,
        waiter: &Arc<Waiter<F>>,
        thread: u64,
        max_flight: Nanos,
    ) -> Option<u32> {
        let mut slot = self.pending.lock();
        let open = slot.as_mut()?;
        let offer = open.offer.take_if(|offer| Arc::ptr_eq(&offer.to, waiter))?;
        // From now on it is a leader; if its call runs in a task, it takes a caller's seat.
        open.callers -= 1;
        open.joined -= 1;
        open.led_by.thread = thread;
        open.since = now();
        open.reported = false;
        self.deadline.store(open.since.saturating_add(max_flight), Ordering::Relaxed);
        waiter.set_fate(Fate::Private);
        let epoch = open.epoch;
        drop(slot);
        drop(offer);
        Some(epoch)
    }

    pub(crate) fn leave(&self, waiter: &Arc<Waiter<F>>) -> Left<F> {
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
            Fate::Private | Fate::Cancelled | Fate::Withdrawn => {
                drop(slot);
                waiter.pass_baton();
                return Left::Nothing;
            }
        }
        open.callers -= 1;
        if open.caller.take_if(|caller| Arc::ptr_eq(caller, waiter)).is_none() {
            open.waiters.retain(|other| !Arc::ptr_eq(other, waiter));
        }
        if open.callers > 0 || open.call.is_none() || open.finishes {
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

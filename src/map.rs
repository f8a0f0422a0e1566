//! The map of all flights: shards, the way of a request through them, and the leader's guard.

use crate::clock::{Nanos, now, now_coarse};
use crate::expiry::{self, Sweep, Swept};
use crate::family::Family;
use crate::flight::{Flight, HandedOver, Left, NextLead, Seat, State};
use crate::shard::Shard;
use crate::stats::{Stats, Striped, cpus};
use crate::sync::{Arc, Mutex, Ordering, Weak};
use crate::table::Claim;
use crate::waiter::{LoopId, NO_LOOP, Wakeup};

/// More shards than this only cost memory: a shard's mutex is held for some 20 ns a flight.
const MOST_SHARDS: usize = 64;
/// How long an offer of the lead stands before a loop that does not run loses it.
const OFFER_STANDS: Nanos = 1_000_000_000;

pub struct Map<F: Family> {
    shards: Box<[Shard<F>]>,
    hits: Striped,
    /// Flights that end only if somebody looks after them: see [`Flight::needs_watch`].
    watched: Mutex<Vec<Weak<Flight<F>>>>,
    /// Expired outcomes that a reader could still see when they left the table.
    dying: Mutex<Vec<Weak<Flight<F>>>>,
    /// Known to the sweeper.
    pub(crate) registered: std::sync::atomic::AtomicBool,
}

/// How a key stands when a request looks for it.
pub enum Found<F: Family, R> {
    Hit(R),
    /// Another caller is computing the outcome: join.
    Pending(Arc<Flight<F>>),
    /// Claim.
    Nothing,
}

impl<F: Family> Map<F> {
    pub fn new() -> Arc<Self> {
        let shards = (2 * cpus()).next_power_of_two().min(MOST_SHARDS);
        Self::with_shards(shards)
    }

    /// `shards` is a power of two.
    pub fn with_shards(shards: usize) -> Arc<Self> {
        Arc::new(Self {
            shards: (0..shards).map(|_| Shard::new()).collect(),
            hits: Striped::new(),
            watched: Mutex::new(Vec::new()),
            dying: Mutex::new(Vec::new()),
            registered: std::sync::atomic::AtomicBool::new(false),
        })
    }

    #[inline]
    fn shard(&self, hash: u64) -> &Shard<F> {
        // Bits that the table does not use: it takes its slot from the low ones and a tag from the top seven.
        let bits = usize::try_from(hash >> 40 & 0xffff).unwrap_or_default();
        &self.shards[bits & (self.shards.len() - 1)]
    }

    /// Looks for the live flight of a key, and takes the outcome if it is retained.
    #[inline]
    pub fn find<R>(
        &self,
        hash: u64,
        key: &F::Key,
        take: impl FnOnce(&F::Outcome) -> R,
    ) -> Result<Found<F, R>, F::Error> {
        let found = self.shard(hash).table.read(hash, key, |flight, thread| {
            if let Some(outcome) = flight.retained(now_coarse()) {
                self.hits.add_one(thread);
                return Found::Hit(take(outcome));
            }
            if flight.state() == State::Pending { Found::Pending(Arc::clone(flight)) } else { Found::Nothing }
        })?;
        Ok(found.unwrap_or(Found::Nothing))
    }

    /// Claims a flight for a key that was not found. `None` if another one was faster: look again.
    ///
    /// `led_on` is the loop that the call will run on.
    pub fn claim(
        self: &Arc<Self>,
        hash: u64,
        key: F::Key,
        led_on: LoopId,
    ) -> Result<Option<Lead<F>>, F::Error> {
        let shard = self.shard(hash);
        let flight = Arc::new(Flight::new(hash, key, led_on));
        let Claim::Claimed { replaced } = shard.table.claim(&flight, now_coarse)? else { return Ok(None) };
        if let Some(old) = replaced {
            shard.note_removed(&old, false);
        }
        shard.note_claimed();
        Ok(Some(Lead { map: Arc::clone(self), flight, epoch: 0, over: false }))
    }

    /// Takes a seat in a pending flight; `None` when it has just ended, and the request starts over.
    pub fn join(
        self: &Arc<Self>,
        flight: &Arc<Flight<F>>,
        loop_id: LoopId,
        wakeup: Wakeup<F>,
    ) -> Option<Place<F>> {
        if let Some((call, epoch)) = flight.call_led_elsewhere(loop_id)
            && F::call_is_lost(&call)
        {
            self.lose_call(flight, epoch);
        }
        let (seat, led_elsewhere) = flight.join(loop_id, wakeup)?;
        if led_elsewhere {
            self.watch(flight);
        }
        Some(Place { map: Arc::clone(self), seat })
    }

    /// Whether the key is retained or in flight.
    pub fn contains(&self, hash: u64, key: &F::Key) -> Result<bool, F::Error> {
        let live = self.shard(hash).table.read(hash, key, |flight, _| flight.is_live(now_coarse()))?;
        Ok(live.unwrap_or(false))
    }

    /// How many callers wait for the key's flight.
    pub fn waiters(&self, hash: u64, key: &F::Key) -> Result<usize, F::Error> {
        Ok(self.shard(hash).table.read(hash, key, |flight, _| flight.waiters())?.unwrap_or(0))
    }

    /// How many keys are retained or in flight.
    pub fn keys(&self) -> usize {
        self.expire();
        self.shards.iter().map(|shard| shard.table.len()).sum()
    }

    /// Drops what has expired, so that what is counted is retained.
    pub fn expire(&self) {
        let now = now();
        self.shards.iter().for_each(|shard| drop(shard.expire(now, usize::MAX)));
    }

    /// Drops all retained outcomes and disowns the flights: their callers keep waiting, new ones lead anew.
    pub fn clear(&self) {
        for shard in &self.shards {
            let mut flights = Vec::new();
            shard.table.for_each(|flight| flights.push(Arc::clone(flight)));
            for flight in flights {
                flight.disown();
                shard.remove(&flight);
            }
            shard.table.flush();
        }
    }

    pub fn for_each(&self, mut look: impl FnMut(&Arc<Flight<F>>)) {
        for shard in &self.shards {
            shard.table.for_each(&mut look);
        }
    }

    pub fn stats(&self) -> Stats {
        let mut stats = Stats { hits: self.hits.sum(), ..Stats::default() };
        for shard in &self.shards {
            shard.counters.add_to(&mut stats);
        }
        stats
    }

    /// What ends when a flight does; `owned` if the table may still have it.
    fn flight_over(&self, flight: &Arc<Flight<F>>, owned: bool) {
        let shard = self.shard(flight.hash());
        shard.counters.ended.fetch_add(1, Ordering::Relaxed);
        if owned && shard.remove(flight) {
            shard.table.flush();
        }
    }

    fn settle(self: &Arc<Self>, flight: &Arc<Flight<F>>, handed: HandedOver<F>) {
        match handed.to {
            NextLead::Nobody { owned } => self.flight_over(flight, owned),
            NextLead::Task => self.watch(flight),
            NextLead::Thread => {}
        }
        handed.wake();
    }

    /// The call can no longer end by itself: its loop is closed.
    fn lose_call(self: &Arc<Self>, flight: &Arc<Flight<F>>, epoch: u32) {
        if let Some(handed) = flight.hand_over(epoch, true) {
            self.settle(flight, handed);
        }
    }

    fn watch(self: &Arc<Self>, flight: &Arc<Flight<F>>) {
        let flight = Arc::downgrade(flight);
        let mut watched = self.watched.lock();
        let known = watched.iter().any(|other| other.ptr_eq(&flight));
        if !known {
            watched.push(flight);
        }
        drop(watched);
        if !known {
            expiry::wake_for_watch(self);
        }
    }

    /// Looks after the flights that depend on a loop elsewhere. True while there are any.
    pub fn tick(self: &Arc<Self>) -> bool {
        let watched = std::mem::take(&mut *self.watched.lock());
        let mut still = Vec::new();
        for weak in watched {
            let Some(flight) = weak.upgrade() else { continue };
            if let Some((call, epoch)) = flight.call_led_elsewhere(NO_LOOP)
                && F::call_is_lost(&call)
            {
                self.lose_call(&flight, epoch);
            }
            if let Some(handed) = flight.withdraw_offer(now().saturating_sub(OFFER_STANDS)) {
                self.settle(&flight, handed);
            }
            if flight.needs_watch() {
                still.push(weak);
            }
        }
        let mut watched = self.watched.lock();
        watched.append(&mut still);
        !watched.is_empty()
    }
}

#[cfg(not(loom))]
impl<F: Family> Sweep for Map<F> {
    fn sweep(self: Arc<Self>, now: Nanos, limit: usize) -> Swept {
        let mut dying = std::mem::take(&mut *self.dying.lock());
        if dying.iter().any(|flight| flight.strong_count() > 0) {
            self.shards.iter().for_each(|shard| shard.table.flush());
        }
        let mut removed = 0;
        for shard in &self.shards {
            let expired = shard.expire(now, limit - removed);
            removed += expired.len();
            dying.extend(expired);
        }
        dying.retain(|flight| flight.strong_count() > 0);
        let still_dying = !dying.is_empty();
        self.dying.lock().append(&mut dying);
        let next = self.shards.iter().filter_map(Shard::next_deadline).min();
        Swept { removed, dying: still_dying, watching: self.tick(), next }
    }
}

/// The right and the duty to end a flight. Dropping it unfinished hands the flight over.
pub struct Lead<F: Family> {
    map: Arc<Map<F>>,
    flight: Arc<Flight<F>>,
    epoch: u32,
    over: bool,
}

impl<F: Family> Lead<F> {
    pub fn flight(&self) -> &Arc<Flight<F>> {
        &self.flight
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// A seat for the caller, where the call is to run in a task of `loop_id`.
    pub fn seat_caller(&self, loop_id: LoopId) -> Place<F> {
        let seat = self.flight.seat_caller(self.epoch, loop_id);
        Place { map: Arc::clone(&self.map), seat }
    }

    /// Tells which task runs the call.
    pub fn led_by(&self, call: F::Call) {
        self.flight.led_by(self.epoch, call);
    }

    /// Shares the outcome, retained for `ttl` from now. False if the lead was taken away in the meantime.
    pub fn complete(mut self, outcome: F::Outcome, ttl: Nanos, failed: bool) -> bool {
        self.over = true;
        let shard = self.map.shard(self.flight.hash());
        if failed {
            shard.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        let Ok(landed) = self.flight.land(self.epoch, outcome, ttl) else { return false };
        if landed.state == State::Retained {
            if shard.note_retained(&self.flight, landed.deadline) {
                expiry::wake_for_deadline(&self.map, landed.deadline);
            }
        } else {
            self.map.flight_over(&self.flight, landed.owned);
        }
        landed.wake.now();
        true
    }

    /// Ends the call for its own caller only; the next waiter leads. True if that caller was waiting in a seat.
    pub fn abandon(mut self, failed: bool) -> bool {
        if failed {
            self.map.shard(self.flight.hash()).counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.give_up(false)
    }

    /// The call was cancelled with its loop: waiters on that loop are cancelled, the next one elsewhere leads.
    pub fn lose_loop(mut self) {
        self.give_up(true);
    }

    fn give_up(&mut self, loop_lost: bool) -> bool {
        self.over = true;
        let Some(handed) = self.flight.hand_over(self.epoch, loop_lost) else { return false };
        let caller_present = handed.caller_present;
        self.map.settle(&self.flight, handed);
        caller_present
    }
}

impl<F: Family> Drop for Lead<F> {
    fn drop(&mut self) {
        if !self.over {
            self.give_up(false);
        }
    }
}

/// A seat in a flight of a map. Dropping it leaves the flight.
pub struct Place<F: Family> {
    map: Arc<Map<F>>,
    seat: Seat<F>,
}

impl<F: Family> std::ops::Deref for Place<F> {
    type Target = Seat<F>;

    fn deref(&self) -> &Seat<F> {
        &self.seat
    }
}

impl<F: Family> Place<F> {
    /// Becomes the leader, if the lead is still offered.
    pub fn take_lead(&self) -> Option<Lead<F>> {
        let epoch = self.seat.accept_offer()?;
        let flight = Arc::clone(self.seat.flight());
        self.map.shard(flight.hash()).counters.taken_over.fetch_add(1, Ordering::Relaxed);
        Some(Lead { map: Arc::clone(&self.map), flight, epoch, over: false })
    }

    /// Counts a waiter that was served.
    pub fn count_joined(&self) {
        self.map.shard(self.seat.flight().hash()).counters.joined.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives the caller its future. False when there is nothing to wait for any more.
    pub fn wait_with(&self, task: F::Task) -> bool {
        self.seat.wait_with(task)
    }
}

impl<F: Family> Drop for Place<F> {
    fn drop(&mut self) {
        match self.seat.leave() {
            Left::Nothing => {}
            Left::HandedOver(handed) => self.map.settle(self.seat.flight(), handed),
            Left::Alone { call, owned, _rest } => {
                self.map.flight_over(self.seat.flight(), owned);
                F::cancel_call(call);
            }
        }
    }
}

//! The map of all flights: shards, the way of a request through them, and the leader's guard.

use std::time::Duration;

use crate::aftermath::{Cancelled, HandedOver, NextLead};
use crate::clock::{FOREVER, Nanos, now, now_coarse};
use crate::expiry::{self, Sweep, Swept};
use crate::family::Family;
use crate::flight::{Flight, State, View};
use crate::fork;
use crate::lead::{Lead, Place};
use crate::roster::Roster;
use crate::shard::{Quota, Shard};
use crate::stats::{Stats, Striped, cpus};
use crate::sync::{Arc, AtomicU64, Mutex, OnceLock, Ordering, Weak};
use crate::table::Claim;
use crate::waiter::{LoopId, NO_LOOP, Origin, Wakeup};

/// More shards than this only cost memory: a shard's mutex is held for some 20 ns a flight.
const MOST_SHARDS: usize = 64;
/// How long an offer of the lead stands before a loop that does not run loses it.
const OFFER_STANDS: Nanos = 1_000_000_000;

#[derive(Clone, Debug)]
pub struct Settings {
    /// What reports call the map.
    pub name: Option<Arc<str>>,
    /// The age from which on a flight is no longer joined.
    pub max_flight: Nanos,
    pub max_retained: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { name: None, max_flight: FOREVER, max_retained: None }
    }
}

pub struct Map<F: Family> {
    birth: u32,
    shards: Box<[Shard<F>]>,
    hits: Striped,
    uncounted_hits: AtomicU64,
    settings: Settings,
    /// Flights that end only if somebody looks after them: see [`Flight::needs_watch`].
    watched: Mutex<Vec<Weak<Flight<F>>>>,
    /// Flights under way that are no longer in a table.
    forgotten: Roster<F>,
    /// Flights under way that tasks wait for.
    pub(crate) awaited: Roster<F>,
    /// Expired outcomes that a reader could still see when they left the table.
    dying: Mutex<Vec<Weak<Flight<F>>>>,
    /// The counters as they were when they were last reset.
    counted_from: Mutex<Stats>,
    /// Known to the sweeper.
    pub(crate) registered: std::sync::atomic::AtomicBool,
    /// What takes this map's place after a fork.
    successor: OnceLock<Arc<Self>>,
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
    pub fn new(settings: Settings) -> Arc<Self> {
        let shards = (2 * cpus()).next_power_of_two().min(MOST_SHARDS);
        Self::with_shards(shards, settings)
    }

    /// `shards` is a power of two.
    pub fn with_shards(shards: usize, settings: Settings) -> Arc<Self> {
        let quota = settings.max_retained.map(|most| Arc::new(Quota::new(most)));
        Arc::new(Self {
            birth: fork::birth(),
            shards: (0..shards).map(|_| Shard::new(quota.as_ref())).collect(),
            hits: Striped::new(),
            uncounted_hits: AtomicU64::new(0),
            settings,
            watched: Mutex::new(Vec::new()),
            forgotten: Roster::new(),
            awaited: Roster::new(),
            dying: Mutex::new(Vec::new()),
            counted_from: Mutex::new(Stats::default()),
            registered: std::sync::atomic::AtomicBool::new(false),
            successor: OnceLock::new(),
        })
    }

    /// The map to use in this process: this one, or its successor after a fork.
    #[inline]
    pub fn current(self: &Arc<Self>) -> &Arc<Self> {
        if self.is_current() { self } else { self.inherited() }
    }

    /// The newest map in this one's place so far, for the garbage collector.
    pub fn newest(self: &Arc<Self>) -> &Arc<Self> {
        let mut map = self;
        while let Some(successor) = map.successor.get() {
            map = successor;
        }
        map
    }

    #[inline]
    pub(crate) fn is_current(&self) -> bool {
        self.birth == fork::birth()
    }

    #[cold]
    fn inherited(self: &Arc<Self>) -> &Arc<Self> {
        let mut map = self;
        while !map.is_current() {
            let mut new = false;
            let heir = map.successor.get_or_init(|| {
                new = true;
                map.bequeath()
            });
            if new {
                // Not before, since this may run foreign code that comes here.
                map.let_heir_own();
                expiry::wake_for_deadline(heir, now());
            }
            map = heir;
        }
        map
    }

    /// A new map with what this one has retained. The other threads have vanished, each between two operations of the
    /// core or inside a look at a table, which leaves the table whole but may keep it from ever dropping anything.
    fn bequeath(&self) -> Arc<Self> {
        let heir = Self::with_shards(self.shards.len(), self.settings.clone());
        let time = now();
        for (old, new) in self.shards.iter().zip(&heir.shards) {
            let mut flights = Vec::new();
            old.table.for_each(|flight| flights.push(Arc::clone(flight)));
            for flight in flights.iter().filter(|flight| flight.retained(time).is_some()) {
                new.table.insert_other(flight);
                new.note_primed();
                new.note_retained(flight, flight.deadline());
            }
        }
        heir
    }

    #[inline]
    pub(crate) fn shard(&self, hash: u64) -> &Shard<F> {
        // Bits that the table does not use: it takes its slot from the low ones and a tag from the top seven.
        let bits = usize::try_from(hash >> 40 & 0xffff).unwrap_or_default();
        &self.shards[bits & (self.shards.len() - 1)]
    }

    /// Takes everything out of the tables. The books are the heir's, with whom the flights go on.
    fn let_heir_own(&self) {
        for shard in &self.shards {
            let mut flights = Vec::new();
            shard.table.for_each(|flight| flights.push(Arc::clone(flight)));
            for flight in &flights {
                shard.table.remove(flight);
            }
            shard.table.flush();
        }
    }

    /// Looks for the live flight of a key, and takes the outcome if it is retained.
    #[inline]
    pub fn find<R>(
        &self,
        hash: u64,
        key: &F::Key,
        take: impl FnOnce(&F::Outcome, &Flight<F>) -> R,
    ) -> Result<Found<F, R>, F::Error> {
        let found = self.shard(hash).table.read(hash, key, |flight, thread| {
            if let Some(outcome) = flight.retained(now_coarse()) {
                self.hits.add_one(thread);
                return Found::Hit(take(outcome, flight));
            }
            if flight.can_be_joined(now_coarse()) {
                Found::Pending(Arc::clone(flight))
            } else {
                Found::Nothing
            }
        })?;
        Ok(found.unwrap_or(Found::Nothing))
    }

    /// Claims a flight for a key that was not found. `None` if another one was faster: look again.
    pub fn claim(
        self: &Arc<Self>,
        hash: u64,
        key: F::Key,
        origin: Origin,
    ) -> Result<Option<Lead<F>>, F::Error> {
        self.claim_for(hash, key, origin, None)
    }

    /// The same for a call that is known already.
    pub fn claim_for(
        self: &Arc<Self>,
        hash: u64,
        key: F::Key,
        origin: Origin,
        call: Option<F::Call>,
    ) -> Result<Option<Lead<F>>, F::Error> {
        let shard = self.shard(hash);
        let since = now();
        let over_age_at = since.saturating_add(self.settings.max_flight);
        let flight = Arc::new(Flight::new(hash, key, origin, call, since, over_age_at));
        let gives_way = |found: &Flight<F>| !found.is_live(now_coarse());
        let Claim::Claimed { replaced } = shard.table.insert(&flight, gives_way)? else { return Ok(None) };
        if let Some(old) = replaced {
            self.note_replaced(shard, &old);
        }
        shard.note_claimed();
        if over_age_at != FOREVER {
            self.watch_noted(&flight);
        }
        Ok(Some(Lead::new(self, flight, 0)))
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn note_replaced(&self, shard: &Shard<F>, old: &Arc<Flight<F>>) {
        if old.disown() {
            self.forgotten.add(old);
        }
        shard.note_removed(old);
    }

    /// Retains an outcome that no call has made, for `ttl` from now, in the place of whatever the key has.
    pub fn put(
        self: &Arc<Self>,
        hash: u64,
        key: F::Key,
        outcome: F::Outcome,
        ttl: Nanos,
    ) -> Result<(), F::Error> {
        let shard = self.shard(hash);
        let flight = Arc::new(Flight::landed(hash, key, outcome, now().saturating_add(ttl)));
        if let Claim::Claimed { replaced: Some(old) } = shard.table.insert(&flight, |_| true)? {
            self.note_replaced(shard, &old);
        }
        shard.note_primed();
        self.note_retained(shard, &flight);
        self.make_room(shard);
        Ok(())
    }

    pub(crate) fn note_retained(self: &Arc<Self>, shard: &Shard<F>, flight: &Arc<Flight<F>>) {
        let deadline = flight.deadline();
        if shard.note_retained(flight, deadline) {
            expiry::wake_for_deadline(self, deadline);
        }
    }

    /// Drops what this shard has too much since another outcome was retained.
    pub(crate) fn make_room(&self, shard: &Shard<F>) {
        if shard.has_surplus() {
            // What has expired takes no room away.
            self.expire();
            shard.evict();
        }
    }

    /// The key's flight, under way, retained or over.
    pub fn get(&self, hash: u64, key: &F::Key) -> Result<Option<Arc<Flight<F>>>, F::Error> {
        self.shard(hash).table.read(hash, key, |flight, _| Arc::clone(flight))
    }

    /// Drops a key: present waiters keep waiting, the next caller leads. True if something live was there.
    pub fn forget(&self, hash: u64, key: &F::Key) -> Result<bool, F::Error> {
        let Some(flight) = self.get(hash, key)? else { return Ok(false) };
        let there = flight.is_there(now_coarse());
        self.let_go(&flight);
        Ok(there)
    }

    /// Drops this very flight.
    pub fn let_go(&self, flight: &Arc<Flight<F>>) {
        let shard = self.shard(flight.hash());
        if self.take_out(shard, flight) {
            shard.table.flush();
        }
    }

    /// Takes a flight out of its table, and sees to it that it does not retain its outcome. False if it is not there.
    fn take_out(&self, shard: &Shard<F>, flight: &Arc<Flight<F>>) -> bool {
        let under_way = flight.disown();
        let removed = shard.remove(flight);
        // Who else has taken it out has noted it.
        if removed && under_way {
            self.forgotten.add(flight);
        }
        removed
    }

    /// Cancels the waiters of a key's flight, and drops the key. False if no flight is under way.
    pub fn cancel(self: &Arc<Self>, hash: u64, key: &F::Key) -> Result<bool, F::Error> {
        let Some(flight) = self.get(hash, key)? else { return Ok(false) };
        // One that lands in this moment either stays as it is or is not retained.
        if !flight.disown() {
            return Ok(false);
        }
        // Before anybody wakes, so that nobody who was cancelled can join it again.
        self.let_go(&flight);
        let Some(Cancelled { wake, ended, call, _rest }) = flight.cancel() else { return Ok(true) };
        if ended {
            self.flight_over(&flight, false);
        }
        if let Some(call) = call {
            F::cancel_call(call);
        }
        wake.now();
        Ok(true)
    }

    /// Takes a seat in a pending flight; `None` when it has just ended, and the request starts over.
    pub fn join(
        self: &Arc<Self>,
        flight: &Arc<Flight<F>>,
        loop_id: LoopId,
        wakeup: Wakeup<F>,
    ) -> Option<Place<F>> {
        self.take_seat(flight, loop_id, wakeup, false)
    }

    /// The same for a caller that has something else to do before it [begins to wait](Place::begin_waiting). Until then
    /// the lead goes to others; if there are none, the caller asks again.
    pub fn join_busy(
        self: &Arc<Self>,
        flight: &Arc<Flight<F>>,
        loop_id: LoopId,
        wakeup: Wakeup<F>,
    ) -> Option<Place<F>> {
        self.take_seat(flight, loop_id, wakeup, true)
    }

    fn take_seat(
        self: &Arc<Self>,
        flight: &Arc<Flight<F>>,
        loop_id: LoopId,
        wakeup: Wakeup<F>,
        busy: bool,
    ) -> Option<Place<F>> {
        if let Some((call, epoch)) = flight.call_led_elsewhere(loop_id)
            && F::call_is_lost(&call)
        {
            self.lose_call(flight, epoch);
        }
        // In a child, the leader may be gone.
        if !self.is_current() {
            return None;
        }
        let (seat, news) = flight.join(loop_id, wakeup, busy)?;
        if news.watch {
            self.watch_noted(flight);
        }
        if news.awaited {
            self.awaited.add(flight);
        }
        Some(Place::new(self, seat, false))
    }

    /// Takes back that a hit was counted, since its caller will ask again.
    pub fn uncount_hit(&self) {
        self.uncounted_hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a store that failed.
    pub fn count_store_error(&self, hash: u64) {
        self.shard(hash).counters.store_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a caller that shares a flight without a seat in it.
    pub fn count_joined(&self, hash: u64) {
        self.shard(hash).counters.joined.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one that left such a flight with nothing.
    pub fn count_cancelled(&self, hash: u64) {
        self.shard(hash).counters.cancelled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a caller that did not want to wait.
    pub fn count_timeout(&self, hash: u64) {
        self.shard(hash).counters.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    /// The retained outcome of a key. Asking is no request.
    pub fn peek<R>(
        &self,
        hash: u64,
        key: &F::Key,
        take: impl FnOnce(&F::Outcome) -> R,
    ) -> Result<Option<R>, F::Error> {
        Ok(self
            .shard(hash)
            .table
            .read(hash, key, |flight, _| flight.retained(now_coarse()).map(take))?
            .flatten())
    }

    /// Whether the key is retained or in flight.
    pub fn contains(&self, hash: u64, key: &F::Key) -> Result<bool, F::Error> {
        let there = self.shard(hash).table.read(hash, key, |flight, _| flight.is_there(now_coarse()))?;
        Ok(there.unwrap_or(false))
    }

    /// How many callers wait for the key's flight.
    pub fn waiters(&self, hash: u64, key: &F::Key) -> Result<usize, F::Error> {
        Ok(self.shard(hash).table.read(hash, key, |flight, _| flight.waiters())?.unwrap_or(0))
    }

    /// How many keys are retained or in flight.
    pub fn keys(&self) -> usize {
        self.expire();
        let stats = self.count();
        // Not what the tables hold: the sweeper may be taking out what has expired.
        let there = stats.retained + stats.in_flight;
        usize::try_from(there).unwrap_or(usize::MAX).saturating_sub(self.forgotten.under_way().len())
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
                self.take_out(shard, &flight);
            }
            shard.table.flush();
        }
    }

    /// Shows the tasks that wait for flights of this map, for the garbage collector.
    pub fn for_each_task(&self, mut look: impl FnMut(&F::Task)) {
        for flight in self.awaited.under_way() {
            flight.for_each_task(&mut look);
        }
    }

    pub fn for_each(&self, mut look: impl FnMut(&Arc<Flight<F>>)) {
        for shard in &self.shards {
            shard.table.for_each(&mut look);
        }
    }

    /// All flights under way, forgotten ones too.
    pub fn flights(&self) -> Vec<View<F>> {
        let time = now();
        let mut flights = Vec::new();
        self.for_each(|flight| {
            if flight.state() == State::Pending {
                flights.push(Arc::clone(flight));
            }
        });
        flights.extend(self.forgotten.under_way());
        // One that was forgotten in between would be there twice.
        flights.sort_by_key(Arc::as_ptr);
        flights.dedup_by(|one, other| Arc::ptr_eq(one, other));
        flights.iter().filter_map(|flight| flight.view(time)).collect()
    }

    pub fn stats(&self) -> Stats {
        let counted_from = *self.counted_from.lock();
        self.count().since(&counted_from)
    }

    /// Counts from here on.
    pub fn reset_stats(&self) {
        *self.counted_from.lock() = self.count();
    }

    fn count(&self) -> Stats {
        // Relaxed: as for all counters. What must not be the larger is read first.
        let uncounted = self.uncounted_hits.load(Ordering::Relaxed);
        let mut stats = Stats { hits: self.hits.sum().saturating_sub(uncounted), ..Stats::default() };
        for shard in &self.shards {
            shard.counters.add_to(&mut stats);
        }
        stats
    }

    /// What ends when a flight does; `owned` if the table may still have it.
    pub(crate) fn flight_over(&self, flight: &Arc<Flight<F>>, owned: bool) {
        if self.take_away(flight, owned) {
            self.shard(flight.hash()).table.flush();
        }
    }

    /// The same without dropping it. True if it was in the table.
    pub(crate) fn take_away(&self, flight: &Arc<Flight<F>>, owned: bool) -> bool {
        let shard = self.shard(flight.hash());
        shard.counters.ended.fetch_add(1, Ordering::Relaxed);
        owned && shard.remove(flight)
    }

    pub(crate) fn settle(self: &Arc<Self>, flight: &Arc<Flight<F>>, mut handed: HandedOver<F>) {
        loop {
            match handed.to {
                NextLead::Nobody { owned } => self.flight_over(flight, owned),
                NextLead::Task => self.watch(flight),
                NextLead::Thread => {}
            }
            let offered_to = handed.offered_to.take();
            handed.wake();
            let Some(waiter) = offered_to else { return };
            if !waiter.task().is_some_and(F::task_is_lost) {
                return;
            }
            let Some(next) = flight.withdraw_offer_to(&waiter) else { return };
            handed = next;
        }
    }

    /// The call can no longer end by itself: its loop is closed.
    fn lose_call(self: &Arc<Self>, flight: &Arc<Flight<F>>, epoch: u32) {
        if let Some(mut handed) = flight.hand_over(epoch, true) {
            let call = handed.call.take();
            self.settle(flight, handed);
            if let Some(call) = call {
                F::call_lost(call);
            }
        }
    }

    /// Looks after the flight from time to time, as long as it [needs that](Flight::needs_watch).
    pub fn watch(self: &Arc<Self>, flight: &Arc<Flight<F>>) {
        if flight.note_watched() {
            self.watch_noted(flight);
        }
    }

    /// The flight has just been marked as watched.
    fn watch_noted(self: &Arc<Self>, flight: &Arc<Flight<F>>) {
        self.watched.lock().push(Arc::downgrade(flight));
        expiry::wake_for_watch(self);
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
            if let Some(handed) = flight.withdraw_stale_offer(now().saturating_sub(OFFER_STANDS)) {
                self.settle(&flight, handed);
            }
            if let Some(age) = flight.report_over_age(now()) {
                let name = self.settings.name.as_deref();
                F::report_over_age(name, flight.key(), Duration::from_nanos(age));
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

//! What callers hold of a flight: the lead, which ends it, or a place, which waits for it. Both let go when dropped.

use std::cell::Cell;

use crate::aftermath::Left;
use crate::clock::{FOREVER, Nanos};
use crate::family::Family;
use crate::flight::{Flight, State};
use crate::map::Map;
use crate::seat::{Seat, Standing};
use crate::stats::Counters;
use crate::sync::{Arc, AtomicU64, Ordering};
use crate::waiter::LoopId;

/// The right and the duty to end a flight. Dropping it unfinished hands the flight over.
pub struct Lead<F: Family> {
    map: Arc<Map<F>>,
    flight: Arc<Flight<F>>,
    epoch: u32,
    over: bool,
}

impl<F: Family> Lead<F> {
    pub(crate) fn new(map: &Arc<Map<F>>, flight: Arc<Flight<F>>, epoch: u32) -> Self {
        Self { map: Arc::clone(map), flight, epoch, over: false }
    }

    pub fn flight(&self) -> &Arc<Flight<F>> {
        &self.flight
    }

    pub fn map(&self) -> &Arc<Map<F>> {
        &self.map
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// A seat for the caller, where the call is to run in a task of `loop_id`. If it `finishes`, it goes on though all
    /// callers have left.
    pub fn seat_caller(&self, loop_id: LoopId, finishes: bool) -> Place<F> {
        let (seat, awaited) = self.flight.seat_caller(self.epoch, loop_id, finishes);
        if awaited {
            self.map.awaited.add(&self.flight);
        }
        Place::new(&self.map, seat, true)
    }

    /// Tells which task runs the call.
    pub fn led_by(&self, call: F::Call) {
        self.flight.led_by(self.epoch, call);
    }

    /// Whether an outcome that came now could be retained.
    pub fn is_owned(&self) -> bool {
        self.map.is_current() && self.flight.is_owned(self.epoch)
    }

    /// Gives up a claim that led to no call: its caller was refused, and is no request.
    pub fn refuse(self) {
        self.map.shard(self.flight.hash()).counters.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts its caller as served by a store, and not by a call.
    pub fn count_store_hit(&self) {
        self.map.shard(self.flight.hash()).counters.store_hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Shares the outcome, retained for `ttl` from now. False if the lead was taken away in the meantime.
    pub fn complete(mut self, outcome: F::Outcome, ttl: Nanos, failed: bool) -> bool {
        self.over = true;
        if !self.map.is_current() {
            return false;
        }
        let shard = self.map.shard(self.flight.hash());
        if failed {
            shard.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        let Ok(landed) = self.flight.land(self.epoch, outcome, ttl) else { return false };
        // Dropping anything may run foreign code, for as long as that likes: not before the waiters are awake.
        if landed.state == State::Retained {
            self.map.note_retained(shard, &self.flight);
            landed.wake.now();
            self.map.make_room(shard);
        } else {
            let removed = self.map.take_away(&self.flight, landed.owned);
            landed.wake.now();
            if removed {
                shard.table.flush();
            }
        }
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
        if !self.map.is_current() {
            return false;
        }
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

/// A seat in a flight of a map. Dropping it leaves the flight, and counts a waiter that was not served as cancelled.
pub struct Place<F: Family> {
    map: Arc<Map<F>>,
    seat: Seat<F>,
    /// Whether this request is counted elsewhere.
    counted: Cell<bool>,
}

impl<F: Family> std::ops::Deref for Place<F> {
    type Target = Seat<F>;

    fn deref(&self) -> &Seat<F> {
        &self.seat
    }
}

impl<F: Family> Place<F> {
    pub(crate) fn new(map: &Arc<Map<F>>, seat: Seat<F>, counted: bool) -> Self {
        Self { map: Arc::clone(map), seat, counted: Cell::new(counted) }
    }

    pub fn map(&self) -> &Arc<Map<F>> {
        &self.map
    }

    /// Becomes the leader, if the lead is still offered.
    pub fn take_lead(&self, thread: u64) -> Option<Lead<F>> {
        if !self.map.is_current() {
            return None;
        }
        let epoch = self.seat.accept_offer(thread, self.map.settings().max_flight)?;
        let flight = Arc::clone(self.seat.flight());
        self.count(|counters| &counters.taken_over);
        if self.map.settings().max_flight != FOREVER {
            self.map.watch(&flight);
        }
        Some(Lead::new(&self.map, flight, epoch))
    }

    /// From now on the lead may be offered to it.
    pub fn begin_waiting(&self) {
        // In a child the flight's mutex may be held by a thread that stayed behind.
        if self.map.is_current() {
            self.seat.begin_waiting();
        }
    }

    /// How it stands. A flight that stayed behind in the parent of a fork has nothing for those who wait for it.
    pub fn standing(&self) -> Standing {
        match self.seat.standing() {
            Standing::Waiting | Standing::Offered if !self.map.is_current() => Standing::Withdrawn,
            standing => standing,
        }
    }

    /// Blocks this thread until there is something for it, or until `limit` has passed.
    pub fn wait(&self, limit: Option<std::time::Duration>) -> Standing {
        if self.map.is_current() {
            self.seat.wait(limit);
        }
        self.standing()
    }

    /// Counts a waiter that was served.
    pub fn count_joined(&self) {
        self.count(|counters| &counters.joined);
    }

    /// Counts a waiter whose timeout has passed.
    pub fn count_timeout(&self) {
        self.count(|counters| &counters.timeouts);
    }

    /// Leaves it to the caller's next attempt to be counted.
    pub fn ask_again(&self) {
        self.counted.set(true);
    }

    fn count(&self, counter: impl FnOnce(&Counters) -> &AtomicU64) {
        if !self.counted.replace(true) {
            counter(&self.map.shard(self.seat.flight().hash()).counters).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Gives the caller its future. False when there is nothing to wait for any more.
    pub fn wait_with(&self, task: F::Task) -> bool {
        self.seat.wait_with(task)
    }
}

impl<F: Family> Drop for Place<F> {
    fn drop(&mut self) {
        if !self.map.is_current() {
            return;
        }
        self.count(|counters| &counters.cancelled);
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

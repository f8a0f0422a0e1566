//! Every request is counted once, whatever happens around it.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::Flight;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;
use llm_batch_coalesce::stats::Stats;
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Wakeup};

use crate::ops::{cancel, forget, peek, put};
use crate::support::{
    Call, Clock, Outcome, Plain, SECOND, Tasks, Turn, eventually, hit, in_time, lead, request, turn_on,
};

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

const HOUR: u64 = 3600 * SECOND;

/// One thread of callers, some of which are tasks of loop 1 or 2.
struct Crowd<'a> {
    map: &'a Arc<Map<Plain>>,
    clock: &'a Clock,
    made: &'a AtomicU64,
    dropped: mpsc::Sender<u64>,
    tasks: Tasks,
    dice: Dice,
}

impl Crowd<'_> {
    fn request(&mut self, key: u64) {
        loop {
            let roll = self.dice.roll(3);
            match turn_on(self.map, key, self.loop_id(roll)) {
                Turn::Hit(_) => return,
                Turn::Lead(lead) => return self.call(lead, roll),
                Turn::Join(flight) => {
                    if self.dice.roll(8) == 0 {
                        return self.map.count_timeout(flight.hash());
                    }
                    if self.join(&flight) {
                        return;
                    }
                }
            }
        }
    }

    /// Ends a call in one of the ways that there are; now and then one on a loop, whose caller may leave before.
    fn call(&mut self, lead: Lead<Plain>, roll: u64) {
        let mut caller = None;
        if roll > 0 {
            let place = lead.seat_caller(self.loop_id(roll), self.dice.roll(2) == 0);
            lead.led_by(Call::new());
            caller = (self.dice.roll(4) > 0).then_some(place);
        }
        let ttl = [0, HOUR, FOREVER];
        match self.dice.roll(6) {
            0 => drop(lead),
            1 => drop(lead.abandon(true)),
            2 => lead.lose_loop(),
            way => {
                let value = self.made.fetch_add(1, SeqCst);
                lead.complete(
                    Outcome::watched(value, &self.dropped),
                    ttl[usize::try_from(way - 3).expect("small")],
                    false,
                );
            }
        }
        drop(caller);
    }

    /// False if the request has to ask again.
    fn join(&mut self, flight: &Arc<Flight<Plain>>) -> bool {
        let roll = self.dice.roll(3);
        let wakeup = match roll {
            0 => Wakeup::this_thread(),
            name => Wakeup::Task(self.tasks.task(name)),
        };
        let Some(place) = self.map.join(flight, self.loop_id(roll), wakeup) else { return false };
        let patient = self.dice.roll(4) > 0;
        match self.wait(&place, roll > 0, patient) {
            Standing::Landed => {
                assert!(place.outcome().is_some());
                place.count_joined();
            }
            Standing::Offered => {
                if let Some(lead) = place.take_lead(0) {
                    self.call(lead, roll);
                } else if place.standing() == Standing::Withdrawn {
                    place.ask_again();
                    return false;
                } else {
                    assert_eq!(place.standing(), Standing::Cancelled);
                }
            }
            Standing::Waiting if self.dice.roll(2) == 0 => place.count_timeout(),
            // Counted when it leaves.
            Standing::Waiting | Standing::Cancelled => {}
            Standing::Withdrawn => {
                place.ask_again();
                return false;
            }
            Standing::Private => panic!("it did not lead"),
        }
        true
    }

    /// What is done to a key by who does not ask for it.
    fn meddle(&mut self, key: u64) {
        match self.dice.roll(64) {
            0..4 => drop(forget(self.map, key)),
            4..8 => drop(cancel(self.map, key)),
            8..10 => {
                let value = self.made.fetch_add(1, SeqCst);
                put(self.map, key, Outcome::watched(value, &self.dropped), FOREVER);
            }
            10 => self.map.clear(),
            11 => self.clock.advance(2 * HOUR),
            _ => drop(peek(self.map, key)),
        }
    }

    fn wait(&self, place: &Place<Plain>, as_task: bool, patient: bool) -> Standing {
        if !as_task {
            return place.wait((!patient).then_some(Duration::ZERO));
        }
        while patient && place.standing() == Standing::Waiting {
            self.tasks.next();
        }
        place.standing()
    }

    fn loop_id(&self, roll: u64) -> LoopId {
        // Each thread has two loops of its own.
        let base = std::ptr::from_ref(self).addr();
        if roll == 0 { NO_LOOP } else { base + usize::from(roll == 2) }
    }
}

/// How many outcomes are really there.
fn retained(map: &Map<Plain>) -> u64 {
    let mut retained = 0;
    map.for_each(|flight| retained += u64::from(flight.retained_at_all().is_some()));
    retained
}

fn every_request_is_counted_once_and_every_outcome_dropped_once(settings: Settings) {
    const THREADS: u64 = 4;
    const REQUESTS: u64 = 5000;
    in_time(move || {
        let clock = &Clock::hold();
        let map = Map::<Plain>::new(settings);
        let made = AtomicU64::new(0);
        let (sender, dropped) = mpsc::channel();
        thread::scope(|scope| {
            for seed in 1..=THREADS {
                let (map, made, sender) = (&map, &made, sender.clone());
                scope.spawn(move || {
                    let (tasks, dice) = (Tasks::new(), Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
                    let mut crowd = Crowd { map, clock, made, dropped: sender, tasks, dice };
                    for _ in 0..REQUESTS {
                        let key = crowd.dice.roll(8);
                        crowd.request(key);
                        crowd.meddle(key);
                    }
                });
            }
        });
        let stats = map.stats();
        let counted = stats.calls + stats.joined + stats.hits + stats.timeouts + stats.cancelled;
        assert_eq!(counted, THREADS * REQUESTS, "{stats:?}");
        assert_eq!((stats.in_flight, map.flights().len()), (0, 0));
        // The sweeper may be dropping something.
        eventually(|| {
            map.expire();
            map.stats().retained == retained(&map)
        });
        assert_eq!(map.keys() as u64, retained(&map));
        map.clear();
        assert_eq!((map.keys(), map.stats().retained), (0, 0));

        drop((map, sender));
        // Ends when no outcome is left that could tell.
        let mut values: Vec<_> = dropped.iter().collect();
        values.sort_unstable();
        assert_eq!(values, (0..made.into_inner()).collect::<Vec<_>>());
    });
}

#[test]
fn requests_and_outcomes_add_up() {
    every_request_is_counted_once_and_every_outcome_dropped_once(Settings::default());
}

#[test]
fn requests_and_outcomes_add_up_though_there_is_room_for_few() {
    let settings = Settings { max_retained: Some(2), ..Settings::default() };
    every_request_is_counted_once_and_every_outcome_dropped_once(settings);
}

#[test]
fn requests_and_outcomes_add_up_though_flights_are_soon_too_old() {
    let settings = Settings { max_flight: HOUR, ..Settings::default() };
    every_request_is_counted_once_and_every_outcome_dropped_once(settings);
}

#[test]
fn nothing_is_counted_before_anybody_asks() {
    assert_eq!(Map::<Plain>::new(Settings::default()).stats(), Stats::default());
}

#[test]
fn hits_of_many_threads_add_up() {
    const THREADS: u64 = 32;
    in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        assert!(lead(&map, 1).complete(Outcome::new(1), FOREVER, false));
        // Waves, so that threads take over what others have left behind.
        for _ in 0..4 {
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        for _ in 0..250 {
                            assert_eq!(hit(&map, 1), Some(1));
                            request(&map, 1, |_| panic!("it is retained"));
                        }
                    });
                }
            });
        }
        assert_eq!((map.stats().hits, map.stats().calls), (THREADS * 2000, 1));
    });
}

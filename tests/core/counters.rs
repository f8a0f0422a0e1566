//! Every request is counted once, whatever happens around it.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::{Flight, Standing};
use llm_batch_coalesce::map::{Lead, Map, Place, Settings};
use llm_batch_coalesce::stats::Stats;
use llm_batch_coalesce::waiter::{LoopId, NO_LOOP, Wakeup};

use crate::support::{
    Call, Clock, Outcome, Plain, SECOND, Tasks, Turn, hit, in_time, lead, request, turn_on,
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

/// How the requests ended that the map does not count.
#[derive(Default)]
struct Uncounted {
    left: AtomicU64,
    cancelled: AtomicU64,
}

/// One thread of callers, some of which are tasks of loop 1 or 2.
struct Crowd<'a> {
    map: &'a Arc<Map<Plain>>,
    uncounted: &'a Uncounted,
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
            let place = lead.seat_caller(self.loop_id(roll), false);
            lead.led_by(Call::new());
            caller = (self.dice.roll(4) > 0).then_some(place);
        }
        let ttl = [0, 3600 * SECOND, FOREVER];
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
            Standing::Offered => match place.take_lead(0) {
                Some(lead) => self.call(lead, roll),
                None => return false,
            },
            Standing::Cancelled => drop(self.uncounted.cancelled.fetch_add(1, SeqCst)),
            Standing::Waiting => drop(self.uncounted.left.fetch_add(1, SeqCst)),
            Standing::Withdrawn => return false,
            Standing::Private => panic!("it did not lead"),
        }
        true
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

#[test]
fn every_request_is_counted_once_and_every_outcome_dropped_once() {
    const THREADS: u64 = 4;
    const REQUESTS: u64 = 5000;
    in_time(|| {
        let _clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (made, uncounted) = (AtomicU64::new(0), Uncounted::default());
        let (sender, dropped) = mpsc::channel();
        thread::scope(|scope| {
            for seed in 1..=THREADS {
                let (map, made, uncounted, sender) = (&map, &made, &uncounted, sender.clone());
                scope.spawn(move || {
                    let (tasks, dice) = (Tasks::new(), Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
                    let mut crowd = Crowd { map, uncounted, made, dropped: sender, tasks, dice };
                    for _ in 0..REQUESTS {
                        let key = crowd.dice.roll(8);
                        crowd.request(key);
                        if crowd.dice.roll(16) == 0 {
                            map.clear();
                        }
                    }
                });
            }
        });
        let stats = map.stats();
        let counted = stats.calls + stats.joined + stats.hits;
        let uncounted = uncounted.left.into_inner() + uncounted.cancelled.into_inner();
        assert_eq!(counted + uncounted, THREADS * REQUESTS);
        assert_eq!((stats.in_flight, stats.retained), (0, map.keys() as u64));
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

//! Of all callers of a key one leads, and the others get its outcome.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use llm_batch_coalesce::clock::{FOREVER, Nanos};
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::support::{Outcome, Plain, Served, in_time, join, lead, read, request};

const KEY: u64 = 7;

#[test]
fn exactly_one_caller_leads_each_flight() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 300;
    let stats = in_time(|| {
        let map = Map::<Plain>::new(Settings::default());
        let barrier = Barrier::new(4);
        let leaders = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 0..ROUNDS {
                        barrier.wait();
                        let served = request(&map, KEY, |lead| {
                            leaders.fetch_add(1, SeqCst);
                            assert!(lead.complete(Outcome::new(round), FOREVER, false));
                        });
                        assert!([Served::Led, Served::Joined(round), Served::Hit(round)].contains(&served));
                        if barrier.wait().is_leader() {
                            assert_eq!(leaders.swap(0, SeqCst), 1);
                            map.clear();
                        }
                    }
                });
            }
        });
        map.stats()
    });
    assert_eq!((stats.calls, stats.joined + stats.hits), (ROUNDS, ROUNDS * (THREADS - 1)));
    assert_eq!((stats.in_flight, stats.retained), (0, 0));
}

/// All join before the call ends, so each of them has to be woken.
fn all_who_wait_are_woken<const FAN: usize>(ttl: Nanos) {
    const WAITERS: usize = 16;
    in_time(move || {
        let map = Map::<Plain<FAN>>::new(Settings::default());
        let lead = lead(&map, KEY);
        let joined = Barrier::new(WAITERS + 1);
        let values: Vec<u64> = thread::scope(|scope| {
            let wait = || {
                let place = join(&map, KEY);
                joined.wait();
                assert_eq!(place.wait(None), Standing::Landed);
                place.pass_baton();
                read(&place)
            };
            let waiters: Vec<_> = (0..WAITERS).map(|_| scope.spawn(wait)).collect();
            joined.wait();
            assert!(lead.complete(Outcome::new(1), ttl, false));
            waiters.into_iter().map(|waiter| waiter.join().expect("no panic")).collect()
        });
        assert_eq!(values, [1; WAITERS]);
    });
}

#[test]
fn all_who_wait_are_woken_one_by_one() {
    all_who_wait_are_woken::<1>(FOREVER);
}

#[test]
fn all_who_wait_are_woken_by_two_each() {
    all_who_wait_are_woken::<2>(FOREVER);
}

#[test]
fn all_who_wait_are_woken_though_nothing_is_retained() {
    all_who_wait_are_woken::<2>(0);
}

#[test]
fn a_waiter_that_has_waited_long_enough_goes_alone() {
    let map = Map::<Plain>::new(Settings::default());
    let lead = lead(&map, KEY);
    let (patient, hasty) = (join(&map, KEY), join(&map, KEY));
    assert_eq!(lead.flight().waiters(), 2);
    assert_eq!(hasty.wait(Some(Duration::ZERO)), Standing::Waiting);
    drop(hasty);
    assert_eq!(lead.flight().waiters(), 1);
    assert!(lead.complete(Outcome::new(1), 0, false));
    assert_eq!(read(&patient), 1);
}

#[test]
fn keys_do_not_wait_for_each_other() {
    let map = Map::<Plain>::new(Settings::default());
    let leads: Vec<_> = (0..1000).map(|key| lead(&map, key)).collect();
    assert_eq!((map.keys(), map.stats().in_flight), (1000, 1000));
    for (value, lead) in (0..).zip(leads) {
        assert!(lead.complete(Outcome::new(value), FOREVER, false));
    }
    for key in 0..1000 {
        assert_eq!(request(&map, key, |_| panic!("it is retained")), Served::Hit(key));
    }
    assert_eq!((map.keys(), map.stats().in_flight), (1000, 0));
}

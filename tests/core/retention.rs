//! How long an outcome stays, and when it is dropped.

use std::sync::mpsc::{self, TryRecvError};

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::State;
use llm_batch_coalesce::map::{Map, Settings};

use crate::support::{Clock, Outcome, Plain, SECOND, contains, hit, in_time, join, lead, read};

const KEY: u64 = 7;
const YEAR: u64 = 31_557_600 * SECOND;

#[test]
fn without_a_ttl_an_outcome_is_for_those_in_flight() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    let (first, second) = (join(&map, KEY), join(&map, KEY));
    let flight = leads.flight().clone();
    assert!(leads.complete(Outcome::watched(1, &sender), 0, false));
    assert_eq!((hit(&map, KEY), contains(&map, KEY), map.keys()), (None, false, 0));
    assert_eq!((read(&first), read(&second)), (1, 1));
    drop(first);
    assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
    drop(second);
    assert_eq!(dropped.try_recv(), Ok(1));
    // Whoever still holds the flight cannot see it.
    assert_eq!((flight.state(), flight.retained_at_all().is_none()), (State::Ended, true));
    assert!(lead(&map, KEY).complete(Outcome::new(2), 0, false));
}

#[test]
fn without_a_ttl_and_waiters_an_outcome_is_dropped_at_once() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    drop(join(&map, KEY));
    assert!(leads.complete(Outcome::watched(1, &sender), 0, false));
    assert_eq!(dropped.try_recv(), Ok(1));
}

#[test]
fn an_outcome_with_a_ttl_outlives_its_waiters() {
    let _clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(leads.complete(Outcome::watched(1, &sender), 3600 * SECOND, false));
    assert_eq!(read(&waiter), 1);
    drop(waiter);
    assert_eq!((hit(&map, KEY), dropped.try_recv()), (Some(1), Err(TryRecvError::Empty)));
}

#[test]
fn forever_is_longer_than_any_ttl() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    assert!(lead(&map, KEY).complete(Outcome::new(1), FOREVER, false));
    assert!(lead(&map, KEY + 1).complete(Outcome::new(1), FOREVER - 1, false));
    clock.advance(YEAR);
    assert_eq!((hit(&map, KEY), hit(&map, KEY + 1), map.keys()), (Some(1), Some(1), 2));
}

#[test]
fn the_ttl_runs_from_completion() {
    in_time(|| {
        let clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (sender, dropped) = mpsc::channel();
        let leads = lead(&map, KEY);
        clock.advance(3600 * SECOND);
        assert!(leads.complete(Outcome::watched(1, &sender), 3600 * SECOND, false));
        clock.advance(1800 * SECOND);
        assert_eq!((hit(&map, KEY), contains(&map, KEY)), (Some(1), true));
        clock.advance(1801 * SECOND);
        assert_eq!((hit(&map, KEY), contains(&map, KEY)), (None, false));

        // The next one leads, and what has expired is dropped.
        assert!(lead(&map, KEY).complete(Outcome::new(2), FOREVER, false));
        assert_eq!(dropped.recv(), Ok(1));
        assert_eq!((hit(&map, KEY), map.keys(), map.stats().retained), (Some(2), 1, 1));
    });
}

#[test]
fn who_counts_the_keys_counts_no_expired_ones() {
    in_time(|| {
        let clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (sender, dropped) = mpsc::channel();
        for key in 0..100 {
            let ttl = if key < 90 { 3600 * SECOND } else { FOREVER };
            assert!(lead(&map, key).complete(Outcome::watched(key, &sender), ttl, false));
        }
        assert_eq!((map.keys(), map.stats().retained), (100, 100));
        clock.advance(3601 * SECOND);
        assert_eq!((map.keys(), map.stats().retained), (10, 10));
        let mut gone: Vec<_> = dropped.iter().take(90).collect();
        gone.sort_unstable();
        assert_eq!(gone, (0..90).collect::<Vec<_>>());
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
    });
}

#[test]
fn expired_outcomes_are_dropped_though_nobody_calls() {
    in_time(|| {
        let _clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (sender, dropped) = mpsc::channel();
        // More than the sweeper takes in one go, some of them due at once and some a little later.
        for key in 0..2500 {
            let ttl = if key % 2 == 0 { 1 } else { SECOND / 50 };
            assert!(lead(&map, key).complete(Outcome::watched(key, &sender), ttl, false));
        }
        let mut gone: Vec<_> = dropped.iter().take(2500).collect();
        gone.sort_unstable();
        assert_eq!(gone, (0..2500).collect::<Vec<_>>());
        assert_eq!(map.keys(), 0);
    });
}

#[test]
fn a_short_ttl_is_not_overslept_because_of_a_long_one() {
    in_time(|| {
        let _clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (sender, dropped) = mpsc::channel();
        assert!(lead(&map, 1).complete(Outcome::watched(1, &sender), YEAR, false));
        assert!(lead(&map, 2).complete(Outcome::watched(2, &sender), 1, false));
        assert_eq!(dropped.recv(), Ok(2));
        assert_eq!((hit(&map, 1), hit(&map, 2)), (Some(1), None));
    });
}

#[test]
fn a_map_that_is_dropped_drops_what_it_retains() {
    in_time(|| {
        let _clock = Clock::hold();
        let map = Map::<Plain>::new(Settings::default());
        let (sender, dropped) = mpsc::channel();
        for key in 0..100 {
            let ttl = if key % 2 == 0 { FOREVER } else { YEAR };
            assert!(lead(&map, key).complete(Outcome::watched(key, &sender), ttl, false));
        }
        drop(map);
        // The sweeper may be looking at the map, and drops it then.
        let mut gone: Vec<_> = dropped.iter().take(100).collect();
        gone.sort_unstable();
        assert_eq!(gone, (0..100).collect::<Vec<_>>());
    });
}

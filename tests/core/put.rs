//! An outcome that no call has made is there at once, whatever the key had before.

use std::sync::mpsc::{self, TryRecvError};

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::ops::{load, peek, put};
use crate::support::{Clock, Outcome, Plain, SECOND, Served, contains, hit, join, lead, read, request};

const KEY: u64 = 7;

#[test]
fn it_is_a_hit_at_once_and_no_call() {
    let map = Map::<Plain>::new(Settings::default());
    put(&map, KEY, Outcome::new(1), FOREVER);
    assert_eq!(request(&map, KEY, |_| panic!("it is retained")), Served::Hit(1));
    let stats = map.stats();
    assert_eq!((stats.calls, stats.joined, stats.hits, stats.errors), (0, 0, 1, 0));
    assert_eq!((load(&map), map.keys(), contains(&map, KEY)), ((0, 1), 1, true));
}

#[test]
fn it_takes_the_place_of_a_retained_outcome_which_is_dropped() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    assert!(lead(&map, KEY).complete(Outcome::watched(1, &sender), FOREVER, false));
    put(&map, KEY, Outcome::watched(2, &sender), FOREVER);
    assert_eq!((hit(&map, KEY), dropped.try_recv()), (Some(2), Ok(1)));
    put(&map, KEY, Outcome::new(3), FOREVER);
    assert_eq!((hit(&map, KEY), dropped.try_recv()), (Some(3), Ok(2)));
    assert_eq!((load(&map), map.keys(), map.stats().calls), ((0, 1), 1, 1));
}

#[test]
fn it_takes_the_place_of_a_flight_whose_waiters_keep_waiting() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    put(&map, KEY, Outcome::new(2), FOREVER);
    assert_eq!((hit(&map, KEY), waiter.standing()), (Some(2), Standing::Waiting));
    assert_eq!((load(&map), map.keys(), map.flights().len()), ((1, 1), 1, 1));

    assert!(leads.complete(Outcome::watched(1, &sender), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY)), (1, Some(2)));
    assert_eq!((load(&map), map.keys(), map.flights().len()), ((0, 1), 1, 0));
    assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
    drop(waiter);
    assert_eq!(dropped.try_recv(), Ok(1));
}

#[test]
fn a_flight_whose_place_it_took_is_still_handed_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (heir, waiter) = (join(&map, KEY), join(&map, KEY));
    put(&map, KEY, Outcome::new(3), FOREVER);
    drop(leads);
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), load(&map)), (2, Some(3), (0, 1)));
}

#[test]
fn a_flight_whose_place_it_took_may_end_without_an_outcome() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    put(&map, KEY, Outcome::new(2), FOREVER);
    drop(leads);
    assert_eq!((hit(&map, KEY), load(&map), map.keys()), (Some(2), (0, 1), 1));
}

#[test]
fn its_ttl_runs_from_now_on() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    clock.advance(3600 * SECOND);
    put(&map, KEY, Outcome::new(1), 3600 * SECOND);
    clock.advance(1800 * SECOND);
    assert_eq!((hit(&map, KEY), contains(&map, KEY)), (Some(1), true));
    clock.advance(1801 * SECOND);
    assert_eq!((hit(&map, KEY), contains(&map, KEY), map.keys()), (None, false, 0));
    assert_eq!(load(&map), (1, 0));
    drop(leads);
}

#[test]
fn it_takes_the_place_of_what_has_expired() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    put(&map, KEY, Outcome::new(1), SECOND);
    clock.advance(2 * SECOND);
    put(&map, KEY, Outcome::new(2), FOREVER);
    assert_eq!((hit(&map, KEY), map.keys(), load(&map)), (Some(2), 1, (0, 1)));
}

#[test]
fn many_keys_may_be_put() {
    let map = Map::<Plain>::new(Settings::default());
    for key in 0..1000 {
        put(&map, key, Outcome::new(key), FOREVER);
    }
    assert!((0..1000).all(|key| hit(&map, key) == Some(key)));
    assert_eq!((map.keys(), load(&map), map.stats().calls), (1000, (0, 1000), 0));
}

#[test]
fn who_peeks_sees_what_is_retained_and_is_no_request() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    assert_eq!(peek(&map, KEY), None);
    let leads = lead(&map, KEY);
    assert_eq!(peek(&map, KEY), None);
    assert!(leads.complete(Outcome::new(1), 3600 * SECOND, false));
    assert_eq!(peek(&map, KEY), Some(1));
    put(&map, KEY + 1, Outcome::new(2), FOREVER);
    assert_eq!(peek(&map, KEY + 1), Some(2));
    clock.advance(3601 * SECOND);
    assert_eq!(peek(&map, KEY), None);
    let stats = map.stats();
    assert_eq!((stats.calls, stats.hits, stats.joined), (1, 0, 0));
}

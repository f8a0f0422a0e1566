//! Forgetting everything takes nothing from those who wait.

use std::sync::mpsc::{self, TryRecvError};

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::support::{Outcome, Plain, contains, hit, join, lead, read};

const KEY: u64 = 7;

#[test]
fn what_was_retained_is_dropped() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    for key in 0..100 {
        assert!(lead(&map, key).complete(Outcome::watched(key, &sender), FOREVER, false));
    }
    map.clear();
    let mut gone: Vec<_> = dropped.try_iter().collect();
    gone.sort_unstable();
    assert_eq!(gone, (0..100).collect::<Vec<_>>());
    assert_eq!((map.keys(), map.stats().retained, hit(&map, 1)), (0, 0, None));
}

#[test]
fn a_flight_that_was_cleared_lands_but_is_not_retained() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    map.clear();
    assert_eq!((contains(&map, KEY), map.keys(), map.stats().in_flight), (false, 0, 1));
    assert!(leads.complete(Outcome::watched(1, &sender), FOREVER, false));
    assert_eq!(read(&waiter), 1);
    assert_eq!((hit(&map, KEY), map.keys(), map.stats().retained, map.stats().in_flight), (None, 0, 0, 0));
    assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
    drop(waiter);
    assert_eq!(dropped.try_recv(), Ok(1));
}

#[test]
fn a_cleared_flight_does_not_touch_a_newer_one_under_way() {
    let map = Map::<Plain>::new(Settings::default());
    let old = lead(&map, KEY);
    map.clear();
    let new = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(old.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((waiter.standing(), hit(&map, KEY)), (Standing::Waiting, None));
    assert!(new.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), map.keys()), (2, Some(2), 1));
}

#[test]
fn a_cleared_flight_does_not_touch_a_newer_one_that_is_retained() {
    let map = Map::<Plain>::new(Settings::default());
    let (landing, dropped) = (lead(&map, KEY), lead(&map, KEY + 1));
    map.clear();
    for key in [KEY, KEY + 1] {
        assert!(lead(&map, key).complete(Outcome::new(2), FOREVER, false));
    }
    assert!(landing.complete(Outcome::new(1), FOREVER, false));
    drop(dropped);
    assert_eq!((hit(&map, KEY), hit(&map, KEY + 1)), (Some(2), Some(2)));
    assert_eq!((map.stats().retained, map.stats().in_flight), (2, 0));
}

#[test]
fn a_cleared_flight_is_still_handed_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (heir, waiter) = (join(&map, KEY), join(&map, KEY));
    map.clear();
    drop(leads);
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), map.keys()), (2, None, 0));
}

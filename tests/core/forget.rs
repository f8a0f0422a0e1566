//! A key that was forgotten is led anew, and what was under way then is not retained.

use std::sync::mpsc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::ops::{forget, load, put};
use crate::support::{Clock, Outcome, Plain, SECOND, Served, contains, hit, join, lead, read, request};

const KEY: u64 = 7;

#[test]
fn there_is_nothing_to_forget_of_a_key_that_nobody_asked_for() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(!forget(&map, KEY));
    assert!(lead(&map, KEY).complete(Outcome::new(1), 0, false));
    assert!(!forget(&map, KEY), "nothing was retained");
    drop(lead(&map, KEY));
    assert!(!forget(&map, KEY), "its flight has ended");
}

#[test]
fn what_was_retained_is_dropped_and_the_next_caller_leads() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    assert!(lead(&map, KEY).complete(Outcome::watched(1, &sender), FOREVER, false));
    put(&map, KEY + 1, Outcome::new(2), FOREVER);
    assert!(forget(&map, KEY));
    assert_eq!((dropped.try_recv(), hit(&map, KEY), contains(&map, KEY)), (Ok(1), None, false));
    assert_eq!((load(&map), map.keys(), hit(&map, KEY + 1)), ((0, 1), 1, Some(2)));
    assert!(!forget(&map, KEY), "it is forgotten");

    let call = |lead: llm_batch_coalesce::lead::Lead<Plain>| {
        assert!(lead.complete(Outcome::new(3), FOREVER, false));
    };
    assert_eq!((request(&map, KEY, call), hit(&map, KEY)), (Served::Led, Some(3)));
    assert!(forget(&map, KEY + 1), "though no call has made it");
}

#[test]
fn what_has_expired_is_dropped_but_was_not_there() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    assert!(lead(&map, KEY).complete(Outcome::new(1), 3600 * SECOND, false));
    clock.advance(3601 * SECOND);
    assert!(!forget(&map, KEY));
    assert_eq!((map.keys(), load(&map)), (0, (0, 0)));
}

#[test]
fn who_waits_keeps_waiting_and_the_outcome_is_not_retained() {
    let map = Map::<Plain>::new(Settings::default());
    let (sender, dropped) = mpsc::channel();
    let leads = lead(&map, KEY);
    let waiter = join(&map, KEY);
    assert!(forget(&map, KEY));
    assert_eq!((waiter.standing(), contains(&map, KEY)), (Standing::Waiting, false));
    assert_eq!((map.keys(), load(&map)), (0, (1, 0)));
    assert!(!forget(&map, KEY), "it is forgotten");

    assert!(leads.complete(Outcome::watched(1, &sender), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), load(&map)), (1, None, (0, 0)));
    drop(waiter);
    assert_eq!(dropped.try_recv(), Ok(1));
}

#[test]
fn the_first_flight_does_not_touch_a_second_one_under_way() {
    let map = Map::<Plain>::new(Settings::default());
    let first = lead(&map, KEY);
    let early = join(&map, KEY);
    assert!(forget(&map, KEY));
    let second = lead(&map, KEY);
    let late = join(&map, KEY);
    assert_eq!((map.keys(), load(&map)), (1, (2, 0)));

    assert!(first.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((read(&early), late.standing(), hit(&map, KEY)), (1, Standing::Waiting, None));
    assert_eq!((contains(&map, KEY), load(&map)), (true, (1, 0)));
    assert!(second.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&late), hit(&map, KEY), load(&map)), (2, Some(2), (0, 1)));
}

#[test]
fn the_first_flight_does_not_touch_what_the_second_one_has_retained() {
    for ttl in [0, FOREVER] {
        let map = Map::<Plain>::new(Settings::default());
        let first = lead(&map, KEY);
        let early = join(&map, KEY);
        assert!(forget(&map, KEY));
        assert!(lead(&map, KEY).complete(Outcome::new(2), FOREVER, false));
        assert!(first.complete(Outcome::new(1), ttl, false));
        assert_eq!((read(&early), hit(&map, KEY)), (1, Some(2)));
        assert_eq!((map.keys(), load(&map), map.stats().calls), (1, (0, 1), 2));
    }
}

#[test]
fn a_first_flight_that_is_dropped_does_not_end_the_second_one() {
    let map = Map::<Plain>::new(Settings::default());
    let first = lead(&map, KEY);
    assert!(forget(&map, KEY));
    let second = lead(&map, KEY);
    drop(first);
    assert_eq!((contains(&map, KEY), load(&map)), (true, (1, 0)));
    assert!(second.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (Some(2), (0, 1)));
}

#[test]
fn of_several_forgotten_flights_none_is_retained() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = [(); 3].map(|()| {
        let leads = lead(&map, KEY);
        assert!(forget(&map, KEY));
        leads
    });
    assert_eq!((map.keys(), load(&map)), (0, (3, 0)));
    for leads in leads {
        assert!(leads.complete(Outcome::new(1), FOREVER, false));
        assert_eq!((hit(&map, KEY), map.keys()), (None, 0));
    }
    assert_eq!(load(&map), (0, 0));
}

#[test]
fn a_forgotten_flight_is_still_handed_over() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let (heir, waiter) = (join(&map, KEY), join(&map, KEY));
    assert!(forget(&map, KEY));
    drop(leads);
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY), load(&map)), (2, None, (0, 0)));
}

#[test]
fn a_flight_may_be_forgotten_while_its_lead_is_offered() {
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let heir = join(&map, KEY);
    drop(leads);
    assert!(forget(&map, KEY));
    assert_eq!((heir.standing(), contains(&map, KEY)), (Standing::Offered, false));
    assert!(heir.take_lead(0).expect("it was offered").complete(Outcome::new(2), FOREVER, false));
    assert_eq!((hit(&map, KEY), load(&map)), (None, (0, 0)));
}

//! A lead that was taken away publishes nothing and ends nothing.

use std::sync::Arc;
use std::sync::mpsc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::lead::{Lead, Place};
use llm_batch_coalesce::map::{Map, Settings};
use llm_batch_coalesce::seat::Standing;

use crate::support::{Call, Outcome, Plain, hit, join, lead_on, read};

const KEY: u64 = 7;
const LOOP: usize = 1;

/// A lead on a loop that somebody has found closed, and the waiter elsewhere that inherits it.
fn taken_away(map: &Arc<Map<Plain>>) -> (Lead<Plain>, Place<Plain>) {
    let stale = lead_on(map, KEY, LOOP);
    let caller = stale.seat_caller(LOOP, false);
    let call = Call::new();
    stale.led_by(Arc::clone(&call));
    let heir = join(map, KEY);
    call.lose();
    drop(join(map, KEY));
    assert_eq!((caller.standing(), heir.standing()), (Standing::Cancelled, Standing::Offered));
    (stale, heir)
}

#[test]
fn it_publishes_nothing_while_the_lead_is_offered() {
    let map = Map::<Plain>::new(Settings::default());
    let (stale, heir) = taken_away(&map);
    let (sender, dropped) = mpsc::channel();
    assert!(!stale.complete(Outcome::watched(1, &sender), FOREVER, false));
    assert_eq!(dropped.try_recv(), Ok(1));
    assert_eq!((heir.standing(), hit(&map, KEY)), (Standing::Offered, None));
    assert_eq!((map.stats().in_flight, map.stats().retained), (1, 0));
}

#[test]
fn it_publishes_nothing_while_another_leads() {
    let map = Map::<Plain>::new(Settings::default());
    let (stale, heir) = taken_away(&map);
    let leads = heir.take_lead(0).expect("it was offered");
    let waiter = join(&map, KEY);
    assert!(!stale.complete(Outcome::new(1), FOREVER, false));
    assert_eq!((waiter.standing(), hit(&map, KEY)), (Standing::Waiting, None));
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert_eq!((read(&waiter), hit(&map, KEY)), (2, Some(2)));
    assert_eq!((map.stats().calls, map.stats().in_flight, map.stats().retained), (2, 0, 1));
}

#[test]
fn it_publishes_nothing_when_the_flight_has_landed() {
    let map = Map::<Plain>::new(Settings::default());
    let (stale, heir) = taken_away(&map);
    let leads = heir.take_lead(0).expect("it was offered");
    assert!(leads.complete(Outcome::new(2), FOREVER, false));
    assert!(!stale.complete(Outcome::new(1), 0, false));
    assert_eq!((hit(&map, KEY), map.stats().in_flight, map.stats().retained), (Some(2), 0, 1));
}

#[test]
fn it_hands_nothing_over() {
    let map = Map::<Plain>::new(Settings::default());
    let (stale, heir) = taken_away(&map);
    let leads = heir.take_lead(0).expect("it was offered");
    let waiter = join(&map, KEY);
    drop(stale);
    assert_eq!(waiter.standing(), Standing::Waiting);
    assert!(leads.complete(Outcome::new(2), 0, false));
    assert_eq!((read(&waiter), map.stats().in_flight), (2, 0));
}

#[test]
fn it_neither_names_the_call_nor_gets_a_seat() {
    let map = Map::<Plain>::new(Settings::default());
    let (stale, heir) = taken_away(&map);
    let leads = heir.take_lead(0).expect("it was offered");
    let waiter = join(&map, KEY);
    let call = Call::new();
    stale.led_by(Arc::clone(&call));
    let caller = stale.seat_caller(LOOP, false);
    assert_eq!((caller.standing(), Arc::strong_count(&call)), (Standing::Private, 1));
    drop(caller);
    drop(waiter);
    assert!(!call.cancelled());
    assert!(leads.complete(Outcome::new(2), 0, false));
}

//! What an operator sees of flights, and what is told of those that have landed.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::flight::View;
use llm_batch_coalesce::map::{Map, Settings};

use crate::ops::{forget, lead_in_task, put};
use crate::support::{Clock, Outcome, Plain, SECOND, Tasks, join, join_as, lead};

const KEY: u64 = 7;

/// All flights under way, oldest first.
fn flights(map: &Map<Plain>) -> Vec<View<Plain>> {
    let mut flights = map.flights();
    flights.sort_by_key(|view| std::cmp::Reverse(view.age));
    flights
}

fn keys(map: &Map<Plain>) -> Vec<u64> {
    let mut keys: Vec<_> = map.flights().iter().map(|view| *view.flight.key()).collect();
    keys.sort_unstable();
    keys
}

#[test]
fn flights_are_listed_while_they_are_under_way() {
    let map = Map::<Plain>::new(Settings::default());
    assert!(map.flights().is_empty());
    let leads: Vec<_> = (0..3).map(|key| lead(&map, key)).collect();
    put(&map, 10, Outcome::new(1), FOREVER);
    assert_eq!(keys(&map), [0, 1, 2]);
    let mut leads = leads.into_iter();
    assert!(leads.next().expect("there are 3").complete(Outcome::new(1), FOREVER, false));
    assert_eq!(keys(&map), [1, 2]);
    assert!(leads.next().expect("there are 2").complete(Outcome::new(1), 0, false));
    drop(leads.next());
    assert!(map.flights().is_empty());
}

#[test]
fn a_flight_is_listed_with_its_age_its_waiters_and_its_leader() {
    let clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let led = lead_in_task(&map, KEY, 5, tasks.task(0), false);
    clock.advance(60 * SECOND);
    let _other = lead(&map, KEY + 1);
    let waiters = [join(&map, KEY), join_as(&map, KEY, 2, tasks.task(1))];
    clock.advance(60 * SECOND);

    let [first, second] = &flights(&map)[..] else { panic!("there are two") };
    assert_eq!((*first.flight.key(), *second.flight.key()), (KEY, KEY + 1));
    assert_eq!((first.age / SECOND, second.age / SECOND), (120, 60));
    assert_eq!((first.waiters, second.waiters), (2, 0));
    assert_eq!((first.led_by.loop_id, second.led_by.loop_id), (5, 0));
    assert_eq!((first.offered, second.offered, second.call.is_none()), (false, false, true));
    assert!(first.call.as_ref().is_some_and(|call| Arc::ptr_eq(call, &led.call)));
    drop(waiters);
    assert_eq!(flights(&map)[0].waiters, 0);
}

#[test]
fn an_offer_is_listed_until_it_is_taken() {
    let clock = Clock::hold();
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let leads = lead(&map, KEY);
    let (heir, waiter) = (join_as(&map, KEY, 3, tasks.task(1)), join(&map, KEY));
    clock.advance(60 * SECOND);
    drop(leads);
    let [view] = &flights(&map)[..] else { panic!("there is one") };
    assert_eq!((view.offered, view.waiters, view.led_by.loop_id, view.age / SECOND), (true, 2, 3, 60));

    let leads = heir.take_lead(77).expect("it was offered");
    let [view] = &flights(&map)[..] else { panic!("there is one") };
    assert_eq!((view.offered, view.waiters, view.led_by.thread, view.age / SECOND), (false, 1, 77, 0));
    drop((leads, waiter));
}

#[test]
fn forgotten_flights_are_listed_once_until_they_have_landed() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings { max_flight: 3600 * SECOND, ..Settings::default() });
    let mut leads = vec![lead(&map, KEY)];
    clock.advance(3601 * SECOND);
    // One is replaced because of its age, one by an outcome; then come one that is forgotten and one that is cleared.
    leads.push(lead(&map, KEY));
    put(&map, KEY, Outcome::new(9), FOREVER);
    assert!(forget(&map, KEY));
    leads.push(lead(&map, KEY));
    assert!(forget(&map, KEY));
    leads.push(lead(&map, KEY));
    map.clear();
    leads.push(lead(&map, KEY));
    for left in (0..5).rev() {
        assert_eq!((keys(&map), map.stats().in_flight), (vec![KEY; left + 1], left as u64 + 1));
        assert!(leads.swap_remove(0).complete(Outcome::new(1), 0, false));
    }
    assert!(map.flights().is_empty());
}

#[test]
fn of_many_forgotten_flights_those_under_way_are_listed() {
    let map = Map::<Plain>::new(Settings::default());
    let mut stay = Vec::new();
    for key in 0..1000 {
        let leads = lead(&map, key);
        assert!(forget(&map, key));
        if key % 100 == 0 {
            stay.push(leads);
        } else {
            assert!(leads.complete(Outcome::new(1), FOREVER, false));
        }
        assert_eq!(map.flights().len(), stay.len());
    }
    assert_eq!(keys(&map), (0..10).map(|key| 100 * key).collect::<Vec<_>>());
    drop(stay);
    assert!(map.flights().is_empty());
}

#[test]
fn the_tasks_that_wait_are_shown_to_the_garbage_collector() {
    let (map, tasks) = (Map::<Plain>::new(Settings::default()), Tasks::new());
    let count = |map: &Map<Plain>| {
        let mut count = 0;
        map.for_each_task(|_| count += 1);
        count
    };
    let led = lead_in_task(&map, KEY, 1, tasks.task(0), false);
    let places = [1, 2].map(|name| join_as(&map, KEY, 1, tasks.task(name)));
    let _thread = join(&map, KEY);
    assert_eq!(count(&map), 3);
    // Wherever they are.
    assert!(forget(&map, KEY));
    assert_eq!(count(&map), 3);
    drop(places);
    assert_eq!(count(&map), 1);
    assert!(led.lead.complete(Outcome::new(1), FOREVER, false));
    assert_eq!(count(&map), 0);
}

#[test]
fn a_landed_flight_tells_how_many_have_joined_it_and_how_long_the_call_took() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    for ttl in [0, FOREVER] {
        let leads = lead(&map, KEY);
        let flight = Arc::clone(leads.flight());
        let waiters = [(); 3].map(|()| join(&map, KEY));
        clock.advance(60 * SECOND);
        assert!(leads.complete(Outcome::new(1), ttl, false));
        let (joined, seconds) = flight.report();
        assert_eq!((joined, seconds.round()), (3, 60.0));
        drop(waiters);
        assert_eq!(flight.report().0, 3, "it stays as it was");
    }
}

#[test]
fn who_takes_over_has_not_joined_and_starts_anew() {
    let clock = Clock::hold();
    let map = Map::<Plain>::new(Settings::default());
    let leads = lead(&map, KEY);
    let flight = Arc::clone(leads.flight());
    let (heir, _waiter) = (join(&map, KEY), join(&map, KEY));
    clock.advance(60 * SECOND);
    drop(leads);
    clock.advance(60 * SECOND);
    let leads = heir.take_lead(0).expect("it was offered");
    clock.advance(30 * SECOND);
    assert!(leads.complete(Outcome::new(1), FOREVER, false));
    let (joined, seconds) = flight.report();
    assert_eq!((joined, seconds.round()), (1, 30.0));
}

#[test]
fn an_outcome_that_no_call_has_made_was_joined_by_nobody() {
    let map = Map::<Plain>::new(Settings::default());
    put(&map, KEY, Outcome::new(1), FOREVER);
    let mut reports = Vec::new();
    map.for_each(|flight| reports.push(flight.report()));
    let [(joined, seconds)] = reports[..] else { panic!("there is one") };
    assert_eq!((joined, seconds.to_bits()), (0, 0));
}

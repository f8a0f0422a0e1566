//! Rule 7: what was under way when its key was forgotten is never found again, and takes nothing from anybody.

use std::sync::Arc;

use llm_batch_coalesce::clock::FOREVER;
use llm_batch_coalesce::map::Map;
use loom::thread;

use crate::support::{
    Plain, Served, Turn, forget, hit, join, join_as_task, lead, load, new_map, put, request, requests, sit,
    turn,
};

/// The waiter is served, nothing is retained, and the counters add up.
#[test]
fn a_flight_that_lands_while_it_is_forgotten_is_not_found_again() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let place = join(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        assert_eq!(sit(&place, 2, 0), Served::Shared(1));
        assert!(other.join().expect("no panic"), "it was under way or retained all the time");
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 2));
        assert!(map.flights().is_empty());
    });
}

/// Of an outcome that is not retained either, the flight ends once.
#[test]
fn a_flight_that_ends_while_it_is_forgotten_ends_once() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        assert!(leads.complete(Arc::new(1), 0, false));
        other.join().expect("no panic");
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 1));
    });
}

/// Nobody hangs. Whoever asks is served by the flight or leads; only what it led itself is retained.
#[test]
fn who_asks_while_a_landing_flight_is_forgotten_is_served_or_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let asks = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        let forgets = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        let theirs = asks.join().expect("no panic");
        assert!(forgets.join().expect("no panic"), "something was there all the time");
        assert_eq!(requests(&map), 2);
        match theirs {
            Served::Led => assert_eq!((load(&map), hit(&map)), ((0, 1, 1), Some(2))),
            theirs => assert_eq!((theirs, load(&map), hit(&map)), (Served::Shared(1), (0, 0, 0), None)),
        }
    });
}

/// The flight lands only when all the others are done: nobody is left waiting, and nobody is forgotten.
#[test]
fn who_joins_a_flight_that_is_forgotten_is_served_by_it_or_leads() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let asks = {
            let map = Arc::clone(&map);
            thread::spawn(move || request(&map, 2, FOREVER))
        };
        assert!(forget(&map));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        match asks.join().expect("no panic") {
            Served::Led => assert_eq!((load(&map), requests(&map), hit(&map)), ((0, 1, 1), 2, Some(2))),
            theirs => {
                assert_eq!((theirs, load(&map), requests(&map)), (Served::Shared(1), (0, 0, 0), 2));
            }
        }
    });
}

/// The second flight's outcome is what is retained, in whatever order the two land.
#[test]
fn the_first_flight_that_lands_at_last_does_not_touch_the_second_one() {
    loom::model(|| {
        let map = new_map();
        let first = lead(&map);
        let early = join_as_task(&map, first.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || {
                assert!(forget(&map));
                let Turn::Lead(second) = turn(&map) else { panic!("it was forgotten") };
                let late = join_as_task(&map, second.flight()).expect("it is pending");
                assert!(second.complete(Arc::new(2), FOREVER, false));
                assert_eq!(late.outcome().map(|outcome| **outcome), Some(2));
            })
        };
        assert!(first.complete(Arc::new(1), FOREVER, false));
        other.join().expect("no panic");
        assert_eq!(early.outcome().map(|outcome| **outcome), Some(1));
        assert_eq!((hit(&map), load(&map), map.stats().calls), (Some(2), (0, 1, 1), 2));
    });
}

/// The waiter leads, and nothing is retained.
#[test]
fn a_flight_that_is_forgotten_while_its_lead_is_given_up_is_handed_over() {
    loom::model(|| {
        let map = new_map();
        let leads = lead(&map);
        let heir = join_as_task(&map, leads.flight()).expect("it is pending");
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || forget(&map))
        };
        drop(leads);
        let leads = heir.take_lead(0).expect("it was offered");
        assert!(leads.complete(Arc::new(2), FOREVER, false));
        assert!(other.join().expect("no panic"));
        assert_eq!((hit(&map), load(&map), requests(&map)), (None, (0, 0, 0), 2));
    });
}

/// Both take the same flight out, which is listed and counted once.
fn a_flight_that_both_let_go_is_gone_once(also: fn(&Map<Plain>)) {
    loom::model(move || {
        let map = new_map();
        let leads = lead(&map);
        let other = {
            let map = Arc::clone(&map);
            thread::spawn(move || also(&map))
        };
        forget(&map);
        other.join().expect("no panic");
        assert_eq!((load(&map), map.flights().len()), ((1, 0, 0), 1));
        put(&map, 2);
        assert_eq!((load(&map), map.flights().len()), ((1, 1, 1), 1));
        assert!(leads.complete(Arc::new(1), FOREVER, false));
        assert_eq!((load(&map), map.flights().len()), ((0, 1, 1), 0));
    });
}

#[test]
fn a_flight_that_is_forgotten_twice_is_gone_once() {
    a_flight_that_both_let_go_is_gone_once(|map| {
        forget(map);
    });
}

#[test]
fn a_flight_that_is_forgotten_and_cleared_is_gone_once() {
    a_flight_that_both_let_go_is_gone_once(Map::clear);
}
